"""Natural and robust accuracy of a batch under PGD.

An example counts as robust if the model classifies x and the final x' of every
restart correctly. Non-finite logits count as incorrect.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.attacks.pgd import Attack
from awp_jax.attacks.robustness import robustness
from awp_jax.core import checks, numerics
from awp_jax.threat import ThreatModel
from awp_jax.training.state import TrainState, forward
from awp_jax.types import Array


class EvalMetrics(NamedTuple):
  """Sums over the valid examples of a batch (and, under an axis, over devices).

  Attributes:
    examples: the number of valid examples.
    natural_loss: the sum of cross-entropies at x.
    natural_correct: the number classified correctly at x.
    robust_loss: the sum of cross-entropies at x'.
    robust_correct: the number classified correctly at both x and x'.
    nonfinite: the number with non-finite logits at x or x', or with non-finite
      entries in a gradient of the attack. Such entries are set to 0, which
      weakens the attack: trust robust accuracy only if this is 0.
  """

  examples: Array
  natural_loss: Array
  natural_correct: Array
  robust_loss: Array
  robust_correct: Array
  nonfinite: Array


def eval_step(
    state: TrainState, batch: tuple[Array, Array, Array], key: Array, *,
    threat: ThreatModel, attack: Attack, axis_name: str | None = None,
) -> EvalMetrics:
  """Evaluates natural and robust accuracy on a batch, with running statistics.

  The attack ascends the cross-entropy, regardless of the training objective.
  Matrix products run at `jax.default_matmul_precision('float32')`. This does
  not change models that compute in a narrower dtype: evaluate a state whose
  model computes in float32.

  Args:
    state: the model, its parameters and running statistics.
    batch: (images, labels, valid). Images [B, ...] are floating and cast to
      float32 if narrower. Labels are [B] or [B, C]. Valid is bool [B]; invalid
      examples are padding and excluded from the sums.
    key: a PRNG key specific to the batch; under an axis the device's index is
      folded in.
    threat: the ball and the box.
    attack: the attack; its mode is ignored and always 'eval'.
    axis_name: the axis of the devices, or None. Sums run over it.

  Returns:
    Sums over the valid examples.

  Raises:
    TypeError: if the model cannot be called.
    ValueError: if the attack's settings are out of range or images are not
      floating.
  """
  images, labels, valid = batch
  checks.floating('images', images)
  images = numerics.wide(images)
  if axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

  def logits_fn(x: Array) -> Array:
    return forward(
        state, state.params, state.batch_stats, x, train=False)[0]

  found = robustness(key, logits_fn, images, labels, threat, attack)

  def total(values: Array) -> Array:
    return jnp.sum(jnp.where(valid, values.astype(jnp.float32), 0))

  metrics = EvalMetrics(
      examples=total(valid),
      natural_loss=total(found.natural_loss),
      natural_correct=total(found.natural_accuracy),
      robust_loss=total(found.robust_loss),
      robust_correct=total(found.robust_accuracy),
      nonfinite=total(found.nonfinite))
  return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)
