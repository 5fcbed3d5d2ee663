"""What to measure at each point: per-example losses and accuracies."""

from collections.abc import Callable
import functools
from typing import Any, Protocol

from awp_jax.attacks import pgd as pgd_lib
from awp_jax.attacks.robustness import robustness
from awp_jax.core import numerics
from awp_jax.threat import ThreatModel
from awp_jax.types import Array, Params


class Measure(Protocol):
  """Per-example values to measure at a point.

  `measure(params, batch, key)` returns a dict of arrays [B]. `batch` holds the
  rows of one batch of examples, and `key` is specific to the batch. Compute
  everything that depends on the weights here, adversarial examples included.
  """

  def __call__(
      self, params: Params, batch: Any, key: Array, /) -> dict[str, Array]:
    """Returns values [B] by name."""
    ...


def robust_measure(
    logits_fn: Callable[[Params, Array], Array], threat: ThreatModel, *,
    step_size: float, num_steps: int, start: pgd_lib.Start = 'random',
    restarts: int = 1) -> Measure:
  """Measures natural and robust loss and accuracy of a classifier under PGD.

  Args:
    logits_fn: (params, images [B, ...]) -> logits [B, C], in evaluation mode:
      running statistics, no dropout.
    threat: the ball and the box.
    step_size: the step size of PGD on the cross-entropy, > 0, in the units of
      the images.
    num_steps: the number of PGD steps, >= 1.
    start: as in `awp_jax.pgd`.
    restarts: as in `awp_jax.pgd`.

  Returns:
    A `Measure` of batches (images [B, ...], labels [B]) with the values
    'natural_loss', 'robust_loss', 'natural_accuracy', 'robust_accuracy' and
    'nonfinite'. An example counts as robust if it is classified correctly, with
    finite logits, at x and at x'. 'nonfinite' is 1 if the logits or a gradient
    of the attack had a non-finite entry. Such gradient entries are set to 0,
    which weakens the attack. Images narrower than float32 are cast to float32,
    and matrix products run at `jax.default_matmul_precision('float32')`.
    Reuse the returned object: it compiles once for all points, models and
    directions.

  Raises:
    ValueError: if `step_size`, `num_steps` or `restarts` is out of range, or
      `start` is unknown.
  """
  pgd_lib.check_settings(start, step_size, num_steps, restarts)

  attack = pgd_lib.Attack(
      step_size, num_steps, start=start, restarts=restarts)

  def measure(params: Params, batch: Any, key: Array) -> dict[str, Array]:
    images, labels = batch
    return robustness(
        key, functools.partial(logits_fn, params), numerics.wide(images),
        labels, threat, attack)._asdict()

  return measure
