"""Natural and robust verdicts of a batch under PGD on the cross-entropy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax import objectives
from awp_jax.attacks import pgd as pgd_lib
from awp_jax.attacks.pgd import Attack
from awp_jax.threat import ThreatModel
from awp_jax.types import Array


class Robustness(NamedTuple):
  """Values of the examples of a batch, each [B].

  Attributes:
    natural_loss: cross-entropy at x.
    natural_accuracy: whether x is classified correctly.
    robust_loss: cross-entropy at x'.
    robust_accuracy: whether both x and x' are classified correctly.
    nonfinite: whether logits at x or x', or a gradient of the attack, had a
      non-finite entry. Such gradient entries are set to 0, which weakens the
      attack.
  """

  natural_loss: Array
  natural_accuracy: Array
  robust_loss: Array
  robust_accuracy: Array
  nonfinite: Array


def robustness(
    key: Array, logits_fn: Callable[[Array], Array], images: Array,
    labels: Array, threat: ThreatModel, attack: Attack) -> Robustness:
  """Attacks a batch by PGD and compares the logits at x and x'.

  Matrix products run at `jax.default_matmul_precision('float32')`, because
  accelerators multiply float32 in lower precision by default.

  Args:
    key: a PRNG key.
    logits_fn: images [B, ...] -> logits [B, C], in evaluation mode.
    images: x [B, ...], floating, in the box of `threat`.
    labels: integers [B], or probabilities [B, C].
    threat: the ball and the box.
    attack: its settings; `mode` is ignored.

  Returns:
    The values of each example. Non-finite logits count as incorrect. With
    several restarts, one that breaks an example is preferred to a higher loss.

  Raises:
    ValueError: if a setting of the attack is out of range, or it has an
      algorithm, which only `train_step` runs.
  """
  if attack.algorithm is not None:
    raise ValueError(
        'attack.algorithm must be None here, where PGD attacks; '
        'awp_jax.evaluate runs other attacks.')

  def loss_fn(x: Array, state: Any) -> tuple[Array, Any]:
    return objectives.cross_entropy(logits_fn(x), labels), state

  def broken_fn(x: Array) -> Array:
    return ~objectives.is_correct(logits_fn(x), labels)

  with jax.default_matmul_precision('float32'):
    out = pgd_lib.run_pgd(
        key, loss_fn, (), images, threat, step_size=attack.step_size,
        num_steps=attack.num_steps, start=attack.start,
        restarts=attack.restarts, broken_fn=broken_fn)
    natural, robust = logits_fn(images), logits_fn(out.x_adv)
  is_natural = objectives.is_correct(natural, labels)
  is_finite = jnp.all(jnp.isfinite(natural) & jnp.isfinite(robust), axis=-1)
  return Robustness(
      natural_loss=objectives.cross_entropy(natural, labels),
      natural_accuracy=is_natural,
      robust_loss=objectives.cross_entropy(robust, labels),
      robust_accuracy=is_natural & objectives.is_correct(robust, labels),
      nonfinite=out.nonfinite | ~is_finite)
