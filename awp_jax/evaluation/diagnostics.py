"""Signs that an evaluation may mislead, looked for before and after it."""

from collections.abc import Callable, Sequence
import re
from typing import Any
import warnings

import jax
import numpy as np

from awp_jax.evaluation.arguments import Traced
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import (
    Anomalies,
    AttackWarning,
    RobustnessWarning,
    WarningKind,
)
from awp_jax.types import Array

#: Relative differences of logits above this are no rounding.
_SAME = 1e-3

_IN_FLOAT32 = (
    'Robust accuracy is comparable in float32 only: build the model with '
    'dtype=float32 and the same weights.')

#: How much accuracy Square may take after gradients were used.
_SQUARE_GAIN = 0.002


def warn(
    kind: WarningKind, message: str, attack: str = '', num_examples: int = 0
) -> AttackWarning:
  """Emits a `RobustnessWarning` and returns its record."""
  warnings.warn(message, RobustnessWarning, stacklevel=4)
  return AttackWarning(kind, message, attack, num_examples)


def _apart(left: Any, right: Any) -> np.ndarray:
  """Which rows differ by more than rounding."""
  left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
  scale = np.maximum(np.max(np.abs(left), axis=-1), 1e-12)
  with np.errstate(invalid='ignore'):
    return np.max(np.abs(left - right), axis=-1) > _SAME * scale


def _traces_alike(logits_fn: Callable[[Array], Array], images: Array) -> bool:
  """Whether tracing twice gives the same program and the same constants.

  A model that draws from NumPy or splits a key it holds is frozen when it is
  compiled, so only its traces tell.
  """
  traces = [jax.make_jaxpr(lambda x: logits_fn(x))(images) for _ in range(2)]
  texts = [re.sub(r'0x[0-9a-f]+', '', str(t.jaxpr)) for t in traces]
  pairs = list(zip(traces[0].consts, traces[1].consts, strict=False))
  return texts[0] == texts[1] and all(
      a is b or np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def check_randomized(
    logits_fn: Callable[[Array], Array], logits: Callable[[Array], Array],
    images: Array) -> list[AttackWarning]:
  """Warns where the same images give different logits.

  Args:
    logits_fn: the model as it was given.
    logits: the model compiled.
    images: one batch.
  """
  if not _traces_alike(logits_fn, images):
    differing = len(images)
  else:
    first = logits(images)
    differing = max(
        int(np.sum(_apart(first, logits(images)))) for _ in range(2))
  if not differing:
    return []
  return [warn(
      'randomized', 'the model gives different logits for the same images: a '
      "randomised defence. Give it a key, use version='rand' and "
      'EvalOptions(takes_key=True).', num_examples=differing)]


def check_batch_dependence(
    logits: Callable[[Array], Array], images: np.ndarray,
    place: Callable[[Any], Any]) -> list[AttackWarning]:
  """Warns where an image's logits depend on the rest of its batch."""
  half = max(len(images) // 2, 1)
  alone = images.copy()
  # The first half stays; its companions become copies of a single image.
  alone[half:] = alone[0]
  apart = _apart(
      np.asarray(logits(place(images)))[:half],
      np.asarray(logits(place(alone)))[:half])
  if half == len(images) or not apart.any():
    return []
  return [warn(
      'batch-dependent', f'the logits of {apart.sum()} of {half} images depend '
      'on the other images of the batch (BatchNorm in train mode?): no verdict '
      'on one example means anything.', num_examples=int(apart.sum()))]


def check_logits(logits: np.ndarray) -> tuple[int, bool]:
  """The number of rows that are not finite; whether rows are probabilities."""
  finite = np.all(np.isfinite(logits), axis=-1)
  rows = logits[finite]
  sums = np.abs(rows.sum(axis=-1) - 1) < 1e-5
  probable = rows.size > 0 and bool(
      (rows > -1e-5).all() and (rows < 1 + 1e-5).all() and sums.all())
  return int(np.sum(~finite)), probable


def about_logits(
    nonfinite: int, probable: bool, traced: Traced) -> list[AttackWarning]:
  """Warns of what the natural logits show.

  Args:
    nonfinite: of how many images they are not finite.
    probable: whether they look like probabilities.
    traced: the model.
  """
  found = []
  if nonfinite:
    found.append(warn(
        'non-finite', f'the logits of {nonfinite} natural images are not '
        'finite. Those images count as misclassified.',
        num_examples=nonfinite))
  if probable:
    found.append(warn(
        'probabilities', 'the outputs are probabilities, not logits: their '
        'gradients vanish where the model is sure. Leave out the softmax.'))
  if traced.dtype.itemsize < 4:
    found.append(warn(
        'half-precision', f'the model returns {traced.dtype} logits, whose '
        f'largest entries often tie. {_IN_FLOAT32}'))
  elif traced.product not in ('float32', 'float64'):
    found.append(warn(
        'half-precision', 'the model computes matrix products or convolutions '
        f'in {traced.product}. {_IN_FLOAT32}'))
  return found


def check_classes(
    specs: Sequence[AttackSpec], num_classes: int) -> list[AttackWarning]:
  """Warns of attacks that want more classes than there are."""
  found = []
  for spec in specs:
    told = []
    if num_classes < spec.min_classes:
      told.append(
          f'its loss needs {spec.min_classes} classes and ascends the plain '
          'difference of logits instead')
    if num_classes - 1 < spec.num_targets:
      told.append(
          f'{num_classes - 1} target classes take the place of '
          f'{spec.num_targets}')
    if told:
      found.append(warn(
          'few-classes', f'{spec.name} with {num_classes} classes: '
          f'{"; ".join(told)}.', spec.name))
  return found


def looks_channels_first(shape: tuple[int, ...]) -> bool:
  """Whether an image of this shape seems to be [C, H, W]: 1 or 3 channels."""
  return len(shape) == 3 and shape[0] in (1, 3) and shape[2] > 4


def check_layout(
    specs: Sequence[AttackSpec], shape: tuple[int, ...]) -> list[AttackWarning]:
  """Warns where an attack reads images by place and they look channels-first.

  Args:
    specs: the attacks.
    shape: of an image.
  """
  if not looks_channels_first(shape):
    return []
  return [
      warn('layout', f'{spec.name} reads images of shape {shape} as [H, W, C], '
           'channels last. If they are [C, H, W], its windows are no squares '
           'and the robust accuracy is too high: give them as [H, W, C] and '
           'transpose inside logits_fn.', spec.name)
      for spec in specs if spec.needs_images]


def after_attack(
    spec: AttackSpec, anomalies: Anomalies, gain: float, any_white_box: bool
) -> list[AttackWarning]:
  """Warns of what an attack met.

  Args:
    spec: the attack.
    anomalies: what was odd, and on how many examples.
    gain: the accuracy that it took.
    any_white_box: whether an attack by gradients went before.
  """
  told: list[tuple[WarningKind, int, str]] = [
      ('zero-gradients', anomalies.zero_gradient,
       'have a gradient of zero in every entry. Attacks by gradients are '
       'unreliable here.'),
      ('non-finite-gradient', anomalies.nonfinite_gradient,
       'have a gradient with entries that are not finite. The attack took them '
       'for 0 and is weaker for it: mend the gradient (sqrt or a norm at 0, a '
       'division by 0 behind `where`).'),
      ('non-finite', anomalies.nonfinite_logits,
       'have an adversarial example whose logits are not finite. They count as '
       'misclassified.'),
      ('outside', anomalies.outside,
       'were given points outside of the ball or the box, or with NaN, which '
       'were rejected. The attack needs a projection.')]
  found = [
      warn(kind, f'{spec.name}: {count} examples {text}', spec.name, count)
      for kind, count, text in told if count]
  if spec.name == 'square' and any_white_box and gain > _SQUARE_GAIN:
    found.append(warn(
        'square-stronger', f'Square took {gain:.2%} off the robust accuracy '
        'that attacks by gradients had left: the model may mask its gradients. '
        'Run Square longer and with restarts, or an adaptive attack.',
        spec.name))
  return found
