"""Notices that a network has collapsed: it says the same whatever it sees.

Weight perturbation can do that to a run: the loss settles at that of a constant
answer and stays there. With p the shares of the classes among the training
labels, constant answers reach

  accuracy  max_k p_k         (1 / C where classes are balanced),
  loss      between H(p) = -sum_k p_k log p_k and log C.

A look compares the means since the last look with these, and with the lowest
loss so far: one that is twice as large, and worse than a constant answer's, is
the jump into a collapse. A stretch of looks without a better one is a collapse.
A gradient of exactly zero is one at once.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments.util import atomic

#: How far the loss may be from that of a constant answer, relative to it.
_NEAR = 0.01

#: How many times the lowest loss so far a loss may be, above that of chance.
_JUMP = 2.0

#: Standard deviations of chance that an accuracy must be better by.
_SIGMAS = 3.0


class Diverged(RuntimeError):
  """Training has produced numbers that are not finite."""


class Collapsed(Diverged):
  """The network gives a constant answer."""


class Chance(NamedTuple):
  """What constant answers reach.

  Attributes:
    accuracy: the share of the most frequent class.
    lowest_loss: H(p), in nats.
    highest_loss: log C.
  """

  accuracy: float
  lowest_loss: float
  highest_loss: float


def chance(labels: np.ndarray, num_classes: int) -> Chance:
  """The `Chance` of training labels [N] in [0, num_classes)."""
  shares = np.bincount(labels, minlength=num_classes) / len(labels)
  present = shares[shares > 0]
  return Chance(
      float(np.max(shares)), float(-np.sum(present * np.log(present))),
      math.log(num_classes))


class Look(NamedTuple):
  """Means over the images since the last look.

  Attributes:
    loss: the train loss.
    accuracy: robust accuracy on the batches, in [0, 1].
    gradient_norm: of the whole gradient.
    images: how many.
  """

  loss: float
  accuracy: float
  gradient_norm: float
  images: float


def fault(look: Look, level: Chance, lowest_loss: float = math.inf) -> str:
  """What is no better than a constant answer, in words; '' if all is well.

  An accuracy below chance by more than its spread is no fault by itself: an
  attack does that to a network which tells classes apart. Nor is a loss above
  that of chance: MART's is a sum of several terms.

  Args:
    look: what to judge.
    level: what constant answers reach.
    lowest_loss: of the looks before.

  Returns:
    The fault.
  """
  if look.gradient_norm == 0:
    return 'the gradient is zero'
  spread = _SIGMAS * math.sqrt(
      level.accuracy * (1 - level.accuracy) / max(look.images, 1))
  lowest, highest = (
      (1 - _NEAR) * level.lowest_loss, (1 + _NEAR) * level.highest_loss)
  if look.loss > max(highest, _JUMP * lowest_loss):
    return (
        f'the loss {look.loss:.4f} is worse than that of a constant answer, '
        f'and was {lowest_loss:.4f} before')
  if look.accuracy > level.accuracy + spread or look.loss < lowest:
    return ''
  if look.loss <= highest:
    return (
        f'the loss {look.loss:.4f} is that of a constant answer '
        f'({level.lowest_loss:.4f} to {level.highest_loss:.4f})')
  if look.accuracy >= level.accuracy - spread:
    return (
        f'robust accuracy {100 * look.accuracy:.2f} % is that of a constant '
        f'answer ({100 * level.accuracy:.2f} %)')
  return ''


class Watch:
  """Counts how long looks have been no better than chance."""

  def __init__(
      self, settings: ml_collections.ConfigDict, level: Chance, first_step: int,
      lowest_loss: float = math.inf) -> None:
    """Starts with all well.

    Args:
      settings: `config.guard`.
      level: what constant answers reach.
      first_step: looks up to this step are always well: the start of training
        and the warm-up of AWP.
      lowest_loss: seen before, in a run that goes on.
    """
    self._settings, self._level, self._first = settings, level, first_step
    self._lowest_loss = lowest_loss
    self._since: int | None = None
    self._last_step = first_step

  @property
  def is_well(self) -> bool:
    """Whether the last look was better than chance, or too early to judge."""
    return self._since is None

  def suspect(self, step: int) -> None:
    """Puts the network under suspicion since `step`."""
    self._since = step

  def see(self, step: int, look: Look) -> None:
    """Takes note of a look.

    Args:
      step: steps done.
      look: means since the last look.

    Raises:
      Collapsed: at a gradient of zero, or at the end of a stretch.
    """
    found = fault(look, self._level, self._lowest_loss)
    if not found:
      self._lowest_loss = min(self._lowest_loss, look.loss)
    if look.gradient_norm == 0:
      raise Collapsed(f'the network has collapsed by step {step}: {found}.')
    if step <= self._first or not found:
      self._since = None
    elif self._since is None:
      self._since = max(self._last_step, self._first)
    self._last_step = step
    if self._since is not None and (
        step - self._since >= self._settings.stretch_steps):
      raise Collapsed(
          f'the network has collapsed: {found}, and has been no better since '
          f'step {self._since}, for {step - self._since} steps.')


class Record:
  """`guard.json`: the factor in force and what was done, across restarts."""

  def __init__(self, workdir: pathlib.Path) -> None:
    """Reads the file if there is one.

    Args:
      workdir: the run's folder.
    """
    self._path = workdir / 'guard.json'
    self.factor = 1.0
    self.shrinks: list[dict[str, Any]] = []
    if self._path.exists():
      stored: dict[str, Any] = json.loads(self._path.read_text())
      self.factor, self.shrinks = stored['factor'], stored['shrinks']

  def shrink(self, factor: float, step: int, back_to: int, why: str) -> None:
    """Notes a smaller perturbation, on disk before this returns.

    Args:
      factor: by which the present one is multiplied.
      step: at which the present one failed.
      back_to: the step of the state that the run goes on from.
      why: what had gone wrong.
    """
    self.factor *= factor
    self.shrinks.append({
        'step': step, 'back_to': back_to, 'factor': self.factor, 'why': why})
    atomic.write_json(
        self._path, {'factor': self.factor, 'shrinks': self.shrinks})
