"""Losses of logits that attacks ascend, per example.

`LOSSES` names them; `loss_functions` returns those that a number of classes
allows. Larger is better for the adversary.
"""

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp

from awp_jax import objectives
from awp_jax.core import numerics
from awp_jax.types import Array


class LogitsLoss(Protocol):
  """A loss of logits: (logits [B, C], labels [B], targets [B]) -> losses [B].

  Larger is better for the adversary. `targets` holds a wrong class per example.
  """

  def __call__(
      self, logits: Array, labels: Array, targets: Array, /) -> Array:
    """Returns the losses, one per example."""
    ...


def _sorted_and_selected(
    logits: Array, labels: Array, targets: Array) -> tuple[Array, Array, Array]:
  """Logits in rising order [B, C], those of labels [B] and of targets [B]."""
  wide = numerics.wide(logits)
  ranked = jnp.sort(wide, axis=-1)
  true = jnp.take_along_axis(wide, labels[:, None], axis=-1)[:, 0]
  target = jnp.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]
  return ranked, true, target


def difference(logits: Array, labels: Array, targets: Array) -> Array:
  """z_t - z_y of each example: logits [B, C], labels and targets [B] -> [B]."""
  _, true, target = _sorted_and_selected(logits, labels, targets)
  return target - true


def dlr(logits: Array, labels: Array) -> Array:
  """Difference of logits ratio, invariant to shifts and scales of the logits.

    -(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12),   z sorted downwards

  Args:
    logits: [B, C], C >= 3.
    labels: integers [B].

  Returns:
    Losses [B], above 0 exactly where the example is misclassified; 0 where the
    three largest logits are equal.

  Raises:
    ValueError: with fewer than 3 classes.

  References:
    Croce and Hein, Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks, ICML 2020.
  """
  if logits.shape[-1] < 3:
    raise ValueError(
        f'the DLR loss needs at least 3 classes, got {logits.shape[-1]}.')
  ranked, _, _ = _sorted_and_selected(logits, labels, labels)
  margin = objectives.cw_margin(logits, labels)
  return margin / (ranked[:, -1] - ranked[:, -3] + 1e-12)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
  """The DLR loss towards a class t.

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)

  Args:
    logits: [B, C], C >= 4.
    labels: integers [B].
    targets: integers [B].

  Returns:
    Losses [B].

  Raises:
    ValueError: with fewer than 4 classes.

  References:
    As `dlr`.
  """
  if logits.shape[-1] < 4:
    raise ValueError(
        'the targeted DLR loss needs at least 4 classes, got '
        f'{logits.shape[-1]}.')
  ranked, true, target = _sorted_and_selected(logits, labels, targets)
  spread = ranked[:, -1] - (ranked[:, -3] + ranked[:, -4]) / 2
  return (target - true) / (spread + 1e-12)


#: Names of the losses, in the order of `loss_functions`.
LOSSES: tuple[str, ...] = ('ce', 'margin', 'difference', 'dlr', 'dlr-targeted')


def loss_functions(num_classes: int) -> list[Callable[..., Array]]:
  """The functions of `LOSSES` that are defined for `num_classes` classes.

  Args:
    num_classes: C >= 2. 'dlr' needs 3 classes, 'dlr-targeted' 4.

  Returns:
    Functions (logits [B, C], labels [B], targets [B]) -> losses [B].
  """
  functions: list[Callable[..., Array]] = [
      lambda z, y, t: objectives.cross_entropy(z, y),
      lambda z, y, t: objectives.cw_margin(z, y), difference]
  if num_classes >= 3:
    functions.append(lambda z, y, t: dlr(z, y))
  if num_classes >= 4:
    functions.append(targeted_dlr)
  return functions
