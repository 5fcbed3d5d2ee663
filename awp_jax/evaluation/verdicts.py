"""Verdicts: a separate forward pass checks every candidate of an attack.

Natural images and candidates are classified by the same forward pass, in
float32 with exact matrix products, at whatever precision the attack ran. An
attack's own step may round differently, because it is compiled together with
the gradient, and a custom attack may leave the ball.

A candidate x' for x counts as adversarial if

  |x' - x|_p <= epsilon (1 + 1e-5) + rounding,   lower <= x' <= upper,

and the model misclassifies it or returns logits that are not finite.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.evaluation import diagnostics
from awp_jax.evaluation.model import Model, margins, misclassified
from awp_jax.evaluation.protocol import run_keys
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

#: Distance outside the ball allowed for rounding, relative to epsilon.
_BALL_TOLERANCE = 1e-5

#: Margin of the true class below which a candidate is close to misclassified,
#: relative to `Natural.spread`.
CLOSE = 0.05


class Group(NamedTuple):
  """Examples on the host that are attacked together.

  Attributes:
    indices: their rows in the whole data set, [n].
    images: [n, ...].
    labels: [n].
    targets: [n, T].
  """

  indices: np.ndarray
  images: np.ndarray
  labels: np.ndarray
  targets: np.ndarray


class Verdicts(NamedTuple):
  """Results of checking candidates.

  Attributes:
    broken: whether the candidate counts: inside ball and box, misclassified,
      [n].
    distances: from the natural images, [n].
    outside: whether it has a NaN or is outside ball or box, [n].
    nonfinite: whether its logits are not finite, [n].
    close: whether it is inside and the logit of the true class is ahead by at
      most `CLOSE` times `VerdictSettings.spread`, or not ahead, [n].
  """

  broken: np.ndarray
  distances: np.ndarray
  outside: np.ndarray
  nonfinite: np.ndarray
  close: np.ndarray


#: (examples, their runs [n], candidates [n, ...]) -> `Verdicts`.
CheckCandidates = Callable[[Group, np.ndarray, np.ndarray], Verdicts]


class Natural(NamedTuple):
  """The model's predictions on the natural images.

  Attributes:
    correct: whether the logits are finite and the top class is right, [N].
    targets: the likeliest wrong classes, most likely first, [N, T].
    nonfinite: number of images with logits that are not finite.
    spread: median over the images of the range of the logits, max - min.
    probable: whether all rows look like probabilities.
    devices: devices of the logits.
    dtype: of the images on the devices.
  """

  correct: np.ndarray
  targets: np.ndarray
  nonfinite: int
  spread: float
  probable: bool
  devices: tuple[jax.Device, ...]
  dtype: str


class VerdictSettings(NamedTuple):
  """What all verdicts of an evaluation share.

  Attributes:
    model: the model whose logits decide.
    threat: ball and box.
    key: a PRNG key, for models that take one.
    size: examples per forward pass.
    few: examples per forward pass if there are no more.
    place: puts arrays with a leading batch axis onto the devices.
    spread: of `Natural`, once it is known.
  """

  model: Model
  threat: ThreatModel
  key: Array
  size: int
  few: int
  place: Callable[[Any], Any]
  spread: float = 0.0


def blocks(count: int, size: int) -> Iterator[np.ndarray]:
  """Row indices batch by batch; the last batch repeats its last row."""
  for begin in range(0, count, size):
    yield np.minimum(np.arange(begin, begin + size), count - 1)


def _logits(
    settings: VerdictSettings, purpose: str, indices: np.ndarray,
    runs: np.ndarray, images: Array) -> Array:
  """Logits whose draws depend only on purpose, example and run."""
  key = jax.random.fold_in(settings.key, zlib.crc32(purpose.encode()))
  keys = run_keys(key, *settings.place(
      (indices.astype(np.int32), runs.astype(np.int32))))
  return settings.model.logits(images, keys)


def classify_natural(
    settings: VerdictSettings, images: np.ndarray, labels: np.ndarray,
    num_targets: int) -> Natural:
  """Classifies the natural images in one pass.

  Args:
    settings: model, key and placement.
    images: [N, ...], on the host.
    labels: [N].
    num_targets: how many wrong classes to return; at most C - 1 are.

  Returns:
    The predictions.
  """
  num_wrong = max(1, min(num_targets, settings.model.num_classes - 1))
  correct = np.zeros(labels.size, bool)
  targets = np.zeros((labels.size, num_wrong), np.int32)
  nonfinite, probable, ranges = 0, True, np.zeros(labels.size)
  devices: set[jax.Device] = set()
  dtype = ''
  for rows in blocks(labels.size, settings.size):
    batch = settings.place(images[rows])
    raw = _logits(settings, 'natural', rows, np.zeros_like(rows), batch)
    devices, dtype = devices | raw.devices(), str(batch.dtype)
    logits = np.asarray(raw, np.float32)
    bad_rows, probabilities = diagnostics.check_logits(
        logits[:labels.size - rows[0]])
    nonfinite += bad_rows
    probable = probable and probabilities
    ranges[rows] = np.ptp(logits, axis=-1)
    truth = labels[rows]
    correct[rows] = ~np.asarray(misclassified(raw, settings.place(truth)))
    others = logits.copy()
    others[np.arange(rows.size), truth] = -np.inf
    targets[rows] = np.argsort(-others, axis=-1, kind='stable')[:, :num_wrong]
  ranges = ranges[np.isfinite(ranges)]
  spread = float(np.median(ranges)) if ranges.size else 0.0
  return Natural(
      correct, targets, nonfinite, spread, probable,
      tuple(sorted(devices, key=lambda device: device.id)), dtype)


def _rounding(threat: ThreatModel, images: Array) -> tuple[float, float]:
  """Rounding error of one entry of x', and of the norm of all entries."""
  one = float(jnp.finfo(images.dtype).eps) * max(
      abs(threat.lower), abs(threat.upper))
  power = {'Linf': 0.0, 'L2': 0.5, 'L1': 1.0}[threat.norm]
  return one, one * images[0].size ** power


@functools.partial(jax.jit, static_argnames=('threat',))
def _verdicts(
    logits: Array, x_adv: Array, labels: Array, images: Array, spread: float,
    threat: ThreatModel) -> tuple[Array, ...]:
  one, all_of_them = _rounding(threat, images)
  distances = threat.distance(x_adv, images)
  # Written so that NaN fails as well.
  near = distances <= threat.epsilon * (1 + _BALL_TOLERANCE) + all_of_them
  boxed = jnp.all(
      ((x_adv >= threat.lower - one) & (x_adv <= threat.upper + one)).reshape(
          labels.size, -1), axis=-1)
  inside = near & boxed
  nonfinite = ~jnp.all(jnp.isfinite(logits), axis=-1)
  close = inside & (margins(logits, labels) >= -CLOSE * spread)
  broken = inside & misclassified(logits, labels)
  return broken, distances, ~inside, nonfinite, close


def make_check(settings: VerdictSettings, attack: str) -> CheckCandidates:
  """Makes the function that checks the candidates of an attack.

  Args:
    settings: model, threat model, key and placement.
    attack: its name. Draws of a randomized model depend on this name, the
      example and the run.

  Returns:
    The function; several threads may call it.
  """

  def check(
      group: Group, runs: np.ndarray, candidates: np.ndarray) -> Verdicts:
    parts = []
    size = settings.few if runs.size <= settings.few else settings.size
    for rows in blocks(runs.size, size):
      x_adv, labels, images = settings.place(
          (candidates[rows], group.labels[rows], group.images[rows]))
      # The text seeds the draws: other words give other results.
      logits = _logits(
          settings, f'judge {attack}', group.indices[rows], runs[rows], x_adv)
      parts.append([np.asarray(leaf) for leaf in _verdicts(
          logits, x_adv, labels, images, settings.spread, settings.threat)])
    return Verdicts(*(
        np.concatenate(leaves)[:runs.size] for leaves in zip(
            *parts, strict=True)))

  return check
