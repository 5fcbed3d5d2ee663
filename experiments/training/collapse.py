"""Detects a collapsed network, whose output is the same for every input.

Strong weight perturbation can cause a collapse: the loss settles at that of a
constant output. With class shares p among the training labels, constant outputs
reach

  accuracy  max_k p_k         (1 / C for balanced classes),
  loss      between H(p) = -sum_k p_k log p_k and log C.

Each check compares the means since the previous check with these values and
with the lowest loss so far. A loss twice that large, and above that of constant
outputs, marks the onset of a collapse. A run has collapsed if no check passes
for `guard.stretch_steps`, or if the gradient is exactly zero.
"""

import json
import math
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from experiments.parallel import processes
from experiments.util import atomic, paths

#: Relative tolerance around the loss of constant outputs.
_NEAR = 0.01

#: Largest loss above chance, as a multiple of the lowest loss so far.
_JUMP = 2.0

#: Standard deviations by which an accuracy must exceed chance.
_SIGMAS = 3.0


class Diverged(RuntimeError):
  """Training produced non-finite values."""


class Collapsed(Diverged):
  """The output of the network does not depend on its input."""


class Chance(NamedTuple):
  """The performance of constant outputs.

  Attributes:
    accuracy: share of the most frequent class.
    lowest_loss: H(p), in nats.
    highest_loss: log C.
  """

  accuracy: float
  lowest_loss: float
  highest_loss: float


def chance(labels: np.ndarray, num_classes: int) -> Chance:
  """`Chance` for training labels [N] in [0, num_classes)."""
  shares = np.bincount(labels, minlength=num_classes) / len(labels)
  present = shares[shares > 0]
  return Chance(
      float(np.max(shares)), float(-np.sum(present * np.log(present))),
      math.log(num_classes))


class Window(NamedTuple):
  """Means over the images since the previous check.

  Attributes:
    loss: training loss.
    accuracy: robust accuracy on the batches, in [0, 1].
    gradient_norm: norm of the whole gradient.
    images: number of images.
  """

  loss: float
  accuracy: float
  gradient_norm: float
  images: float


def fault(
    window: Window, level: Chance, lowest_loss: float = math.inf) -> str:
  """Describes a metric that is no better than that of constant outputs.

  An accuracy below chance by more than its spread is not a fault by itself: an
  attack can cause it in a network that separates classes. Neither is a loss
  above that of chance, because MART's loss is a sum of several terms.

  Args:
    window: the metrics to check.
    level: the performance of constant outputs.
    lowest_loss: lowest loss of earlier checks.

  Returns:
    The description, or '' without a fault.
  """
  if window.gradient_norm == 0:
    return 'the gradient is zero'
  spread = _SIGMAS * math.sqrt(
      level.accuracy * (1 - level.accuracy) / max(window.images, 1))
  lowest, highest = (
      (1 - _NEAR) * level.lowest_loss, (1 + _NEAR) * level.highest_loss)
  if window.loss > max(highest, _JUMP * lowest_loss):
    return (
        f'the loss {window.loss:.4f} is worse than that of a constant output, '
        f'and was {lowest_loss:.4f} before')
  if window.accuracy > level.accuracy + spread or window.loss < lowest:
    return ''
  if window.loss <= highest:
    return (
        f'the loss {window.loss:.4f} is that of a constant output '
        f'({level.lowest_loss:.4f} to {level.highest_loss:.4f})')
  if window.accuracy >= level.accuracy - spread:
    return (
        f'robust accuracy {100 * window.accuracy:.2f} % is that of a constant '
        f'output ({100 * level.accuracy:.2f} %)')
  return ''


class Detector:
  """Counts for how many steps the metrics have been no better than chance."""

  def __init__(
      self, settings: ml_collections.ConfigDict, level: Chance, first_step: int,
      lowest_loss: float = math.inf) -> None:
    """Starts without suspicion.

    Args:
      settings: `config.guard`.
      level: the performance of constant outputs.
      first_step: faults up to this step, the start of training and the warm-up
        of AWP, are ignored, except a gradient of zero.
      lowest_loss: lowest loss so far, if the run is resumed.
    """
    self._settings, self._level, self._first = settings, level, first_step
    self._lowest_loss = lowest_loss
    self._since: int | None = None
    self._last_step = first_step

  @property
  def is_suspicious(self) -> bool:
    """Whether the last check found a fault after `first_step`."""
    return self._since is not None

  def suspect(self, step: int) -> None:
    """Marks the network as suspicious since `step`."""
    self._since = step

  def update(self, step: int, window: Window) -> None:
    """Checks the metrics since the previous update.

    Args:
      step: number of completed steps.
      window: means since the previous update.

    Raises:
      Collapsed: if the gradient is zero, or the metrics have been no better
        than chance for `stretch_steps`.
    """
    found = fault(window, self._level, self._lowest_loss)
    if not found:
      self._lowest_loss = min(self._lowest_loss, window.loss)
    if window.gradient_norm == 0:
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
  """`guard.json`: the perturbation factor and its changes, across restarts."""

  def __init__(self, workdir: paths.Path) -> None:
    """Reads the file if it exists.

    Args:
      workdir: the run's folder.
    """
    self._path = workdir / 'guard.json'
    self.factor = 1.0
    self.shrinks: list[dict[str, Any]] = []
    stored = processes.from_main(self._read)
    if stored:
      self.factor, self.shrinks = stored['factor'], stored['shrinks']

  def _read(self) -> dict[str, Any]:
    exists = self._path.exists()
    return dict(json.loads(self._path.read_text())) if exists else {}

  def shrink(self, factor: float, step: int, back_to: int, why: str) -> None:
    """Records a smaller perturbation; on disk before this returns.

    Args:
      factor: multiplies the current factor.
      step: the step of the failure.
      back_to: the step that the run returns to.
      why: the error message.
    """
    self.factor *= factor
    self.shrinks.append({
        'step': step, 'back_to': back_to, 'factor': self.factor, 'why': why})
    values = {'factor': self.factor, 'shrinks': self.shrinks}
    processes.on_main(lambda: atomic.write_json(self._path, values))
