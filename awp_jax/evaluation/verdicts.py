"""Verdicts: the plain forward pass that decides what counts.

Attacks propose; this module decides. Natural images and adversarial examples
are judged by the same forward pass, in float32 with exact matrix products,
whatever the attack computed with. The step of an attack is compiled together
with its gradient and may round otherwise; an attack of one's own may leave the
ball.

A candidate x' for x counts where

  |x' - x|_p <= epsilon (1 + 1e-5) + rounding,   lower <= x' <= upper,

and the model misclassifies it or gives logits that are not finite.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.evaluation import diagnostics
from awp_jax.evaluation.model import Model, misclassified
from awp_jax.evaluation.protocol import run_keys
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

#: How far outside of the ball rounding may carry a point, relative to epsilon.
_BALL_TOLERANCE = 1e-5


class Group(NamedTuple):
  """Examples on the host that are attacked together.

  Attributes:
    indices: their places in the whole data set, [n].
    images: [n, ...].
    labels: [n].
    targets: [n, T].
  """

  indices: np.ndarray
  images: np.ndarray
  labels: np.ndarray
  targets: np.ndarray


class Verdicts(NamedTuple):
  """What a judge finds at candidates.

  Attributes:
    broken: whether the candidate counts: inside ball and box, misclassified,
      [n].
    distances: from the natural images, [n].
    outside: whether it is NaN or lies outside of ball or box, [n].
    nonfinite: whether its logits are not finite, [n].
  """

  broken: np.ndarray
  distances: np.ndarray
  outside: np.ndarray
  nonfinite: np.ndarray


#: (examples, their runs [n], candidates [n, ...]) -> `Verdicts`.
Judge = Callable[[Group, np.ndarray, np.ndarray], Verdicts]


class Natural(NamedTuple):
  """What the model says of the natural images.

  Attributes:
    correct: which are classified correctly, by finite logits, [N].
    targets: the likeliest wrong classes, most likely first, [N, T].
    nonfinite: how many have logits that are not finite.
    probable: whether all rows look like probabilities.
    devices: where the logits lay.
    dtype: of the images on the devices.
  """

  correct: np.ndarray
  targets: np.ndarray
  nonfinite: int
  probable: bool
  devices: tuple[jax.Device, ...]
  dtype: str


class JudgeSettings(NamedTuple):
  """What every verdict of an evaluation is made with.

  Attributes:
    model: its logits are the ones that count.
    threat: ball and box.
    key: a PRNG key, for models that take one.
    size: examples per forward pass.
    place: puts arrays with a leading batch axis onto the devices.
  """

  model: Model
  threat: ThreatModel
  key: Array
  size: int
  place: Callable[[Any], Any]


def blocks(count: int, size: int) -> Iterator[np.ndarray]:
  """Rows of one batch after the other; the last repeats its last row."""
  for begin in range(0, count, size):
    yield np.minimum(np.arange(begin, begin + size), count - 1)


def _logits(
    judging: JudgeSettings, purpose: str, indices: np.ndarray, runs: np.ndarray,
    images: Array) -> Array:
  """Logits under draws that depend on purpose, example and run alone."""
  key = jax.random.fold_in(judging.key, zlib.crc32(purpose.encode()))
  keys = run_keys(key, *judging.place(
      (indices.astype(np.int32), runs.astype(np.int32))))
  return judging.model.logits(images, keys)


def judge_natural(
    judging: JudgeSettings, images: np.ndarray, labels: np.ndarray, num_targets: int
) -> Natural:
  """One pass over the natural images.

  Args:
    judging: what to judge with.
    images: [N, ...], on the host.
    labels: [N].
    num_targets: how many wrong classes to name; at most C - 1 are.

  Returns:
    The verdicts.
  """
  wanted = max(1, min(num_targets, judging.model.num_classes - 1))
  correct = np.zeros(labels.size, bool)
  targets = np.zeros((labels.size, wanted), np.int32)
  nonfinite, probable = 0, True
  devices: set[jax.Device] = set()
  dtype = ''
  for rows in blocks(labels.size, judging.size):
    batch = judging.place(images[rows])
    raw = _logits(judging, 'natural', rows, np.zeros_like(rows), batch)
    devices, dtype = devices | raw.devices(), str(batch.dtype)
    logits = np.asarray(raw, np.float32)
    strange, alike = diagnostics.check_logits(logits[:labels.size - rows[0]])
    nonfinite, probable = nonfinite + strange, probable and alike
    truth = labels[rows]
    correct[rows] = ~np.asarray(misclassified(raw, judging.place(truth)))
    others = logits.copy()
    others[np.arange(rows.size), truth] = -np.inf
    targets[rows] = np.argsort(-others, axis=-1, kind='stable')[:, :wanted]
  return Natural(
      correct, targets, nonfinite, probable,
      tuple(sorted(devices, key=lambda device: device.id)), dtype)


def _rounding(threat: ThreatModel, images: Array) -> tuple[float, float]:
  """Error of the rounded entries of x': of one, and of the norm of all."""
  one = float(jnp.finfo(images.dtype).eps) * max(
      abs(threat.lower), abs(threat.upper))
  power = {'Linf': 0.0, 'L2': 0.5, 'L1': 1.0}[threat.norm]
  return one, one * images[0].size ** power


@functools.partial(jax.jit, static_argnames=('threat',))
def _verdicts(
    logits: Array, x_adv: Array, labels: Array, images: Array,
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
  return inside & misclassified(logits, labels), distances, ~inside, nonfinite


def make_judge(judging: JudgeSettings, attack: str) -> Judge:
  """The judge of an attack.

  Args:
    judging: what to judge with.
    attack: its name; a randomised model draws by it, by example and by run.

  Returns:
    The judge; it may be called from several threads.
  """

  def judge(
      group: Group, runs: np.ndarray, candidates: np.ndarray) -> Verdicts:
    parts = []
    for rows in blocks(runs.size, judging.size):
      x_adv, labels, images = judging.place(
          (candidates[rows], group.labels[rows], group.images[rows]))
      logits = _logits(
          judging, f'judge {attack}', group.indices[rows], runs[rows], x_adv)
      parts.append([np.asarray(leaf) for leaf in _verdicts(
          logits, x_adv, labels, images, judging.threat)])
    return Verdicts(*(
        np.concatenate(leaves)[:runs.size] for leaves in zip(
            *parts, strict=True)))

  return judge
