"""Natural and robust accuracy of a batch, under PGD.

An example counts as robust if the model gives it its label at x and at the x'
that each restart of the attack ends with. Logits that are not finite count as
wrong at either.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax import objectives
from awp_jax.attacks import pgd as pgd_lib
from awp_jax.attacks.pgd import Attack
from awp_jax.core import checks, numerics
from awp_jax.threat import ThreatModel
from awp_jax.training.state import TrainState, forward
from awp_jax.types import Array


class EvalMetrics(NamedTuple):
  """Sums over the valid examples of a batch (and, under an axis, over devices).

  Attributes:
    examples: how many examples are valid.
    natural_loss: sum of cross-entropies at x.
    natural_correct: how many are classified right at x.
    robust_loss: sum of cross-entropies at x'.
    robust_correct: how many are classified right at x' and at x.
    nonfinite: how many had a number that is not finite: in the logits at x or
      x', or in a gradient of the attack. Such gradient entries count as 0, so
      the attack is weaker there: robust accuracy is in doubt unless this is 0.
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
  """Natural and robust accuracy on a batch, with the running statistics.

  The attack ascends the cross-entropy, whatever the objective of training was.
  Matrix products run at `jax.default_matmul_precision('float32')`. A model that
  computes in a smaller type than float32 still does: give the state of one that
  does not.

  Args:
    state: the model, its parameters and running statistics.
    batch: (images [B, ...], floating, cast to float32 where they are narrower;
      labels [B] or [B, C]; valid [B] bools);
      examples that are not valid fill up a batch and count for nothing.
    key: a PRNG key, the batch's own; under an axis the device's index is folded
      in.
    threat: the ball and the box.
    attack: the attack; its mode is 'eval' whatever it says.
    axis_name: the axis of the devices, or None; sums run over it.

  Returns:
    Sums over the valid examples.

  Raises:
    TypeError: if the model cannot be called.
    ValueError: for an attack that is out of range, or images that are not
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

  def loss_fn(x: Array, nothing: Any) -> tuple[Array, Any]:
    return objectives.cross_entropy(logits_fn(x), labels), nothing

  # By default accelerators multiply float32 in fewer bits.
  with jax.default_matmul_precision('float32'):
    out = pgd_lib.run_pgd(
        key, loss_fn, (), images, threat, step_size=attack.step_size,
        num_steps=attack.num_steps, start=attack.start,
        restarts=attack.restarts, broken_fn=lambda x: ~objectives.is_correct(
            logits_fn(x), labels))
    natural, robust = logits_fn(images), logits_fn(out.x_adv)
  is_natural = objectives.is_correct(natural, labels)
  is_robust = is_natural & objectives.is_correct(robust, labels)
  is_finite = jnp.all(jnp.isfinite(natural) & jnp.isfinite(robust), axis=-1)

  def total(values: Array) -> Array:
    return jnp.sum(jnp.where(valid, values, 0), dtype=jnp.float32)

  metrics = EvalMetrics(
      examples=total(valid),
      natural_loss=total(objectives.cross_entropy(natural, labels)),
      natural_correct=total(is_natural),
      robust_loss=total(objectives.cross_entropy(robust, labels)),
      robust_correct=total(is_robust),
      nonfinite=total(out.nonfinite | ~is_finite))
  return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)
