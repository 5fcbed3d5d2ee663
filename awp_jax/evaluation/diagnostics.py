"""Warnings of an unreliable evaluation, checked before and after attacks."""

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

#: Largest relative difference of logits that counts as rounding.
_ROUNDING = 1e-3

#: Largest fraction of classes that may differ between the models of the attacks
#: and of the verdicts, and largest median difference of their logits.
_SAME_CLASSES = 0.1
_SAME_LOGITS = 0.25

_IN_FLOAT32 = (
    'Robust accuracy is comparable in float32 only: build the model with '
    'dtype=float32 and the same weights.')

#: Largest accuracy that Square may take after an attack with gradients.
_SQUARE_GAIN = 0.002


def warn(
    kind: WarningKind, message: str, attack: str = '', num_examples: int = 0
) -> AttackWarning:
  """Emits a `RobustnessWarning` and returns its record."""
  warnings.warn(message, RobustnessWarning, stacklevel=4)
  return AttackWarning(kind, message, attack, num_examples)


def _differ(left: Any, right: Any) -> np.ndarray:
  """Which rows differ by more than rounding."""
  left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
  scale = np.maximum(np.max(np.abs(left), axis=-1), 1e-12)
  with np.errstate(invalid='ignore'):
    return np.max(np.abs(left - right), axis=-1) > _ROUNDING * scale


def _traces_equal(logits_fn: Callable[[Array], Array], images: Array) -> bool:
  """Whether tracing twice gives the same program and the same constants.

  Compilation freezes the draws of a model that uses NumPy or splits a key that
  it stores, so only its traces show the randomness.
  """
  traces = [jax.make_jaxpr(lambda x: logits_fn(x))(images) for _ in range(2)]
  texts = [re.sub(r'0x[0-9a-f]+', '', str(t.jaxpr)) for t in traces]
  pairs = list(zip(traces[0].consts, traces[1].consts, strict=False))
  return texts[0] == texts[1] and all(
      a is b or np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def check_randomized(
    logits_fn: Callable[[Array], Array], logits: Callable[[Array], Array],
    images: Array) -> list[AttackWarning]:
  """Warns if the same images give different logits.

  Args:
    logits_fn: the model.
    logits: the compiled model.
    images: one batch.
  """
  if not _traces_equal(logits_fn, images):
    differing = len(images)
  else:
    first = logits(images)
    differing = max(
        int(np.sum(_differ(first, logits(images)))) for _ in range(2))
  if not differing:
    return []
  return [warn(
      'randomized', 'the model returns different logits for the same images, '
      "as a randomized defense. Pass logits_fn(images, key), version='rand' "
      'and EvalOptions(takes_key=True).', num_examples=differing)]


def check_batch_dependence(
    logits: Callable[[Array], Array], images: np.ndarray,
    place: Callable[[Any], Any]) -> list[AttackWarning]:
  """Warns if an image's logits depend on the rest of its batch."""
  half = max(len(images) // 2, 1)
  alone = images.copy()
  # The first half stays; the second becomes copies of one image.
  alone[half:] = alone[0]
  dependent = _differ(
      np.asarray(logits(place(images)))[:half],
      np.asarray(logits(place(alone)))[:half])
  if half == len(images) or not dependent.any():
    return []
  number = int(dependent.sum())
  return [warn(
      'batch-dependent', f'the logits of {number} of {half} images depend on '
      'the other images of the batch (BatchNorm in train mode?). Verdicts on '
      'single examples are meaningless.', num_examples=number)]


def check_attack_model(
    attacked: np.ndarray, judged: np.ndarray) -> list[AttackWarning]:
  """Warns if the model of the attacks is another network.

  Two networks of the same data agree on most classes, so logits are compared
  too: the largest difference over the spread of the logits, max - min. Logits
  that are not finite where those of the other model are come from the
  floating-point type or the compiler.

  Args:
    attacked: logits of `EvalOptions.attack_fn` for natural images, [n, C].
    judged: logits of the model under attack, [n, C].
  """
  failed = (np.all(np.isfinite(judged), axis=-1)
            & ~np.all(np.isfinite(attacked), axis=-1))
  if failed.any():
    return [warn(
        'attack-model', 'attack_fn returns NaN or infinite logits for '
        f'{int(failed.sum())} of {len(judged)} natural images, and logits_fn '
        'does not. Attacks on these images are unreliable.',
        num_examples=int(failed.sum())
    ), *check_attack_model(attacked[~failed], judged[~failed])]
  if not len(judged):
    return []
  differ = int(np.sum(attacked.argmax(axis=-1) != judged.argmax(axis=-1)))
  spread = np.maximum(np.ptp(judged, axis=-1), np.finfo(np.float32).tiny)
  distance = float(np.median(
      np.max(np.abs(attacked - judged), axis=-1) / spread))
  if (differ <= max(1, _SAME_CLASSES * len(judged))
      and not distance > _SAME_LOGITS):
    return []
  return [warn(
      'attack-model', f'attack_fn predicts another class than logits_fn for '
      f'{differ} of {len(judged)} natural images, and their logits differ by '
      f'{distance:.0%} of their range. Are these two networks the same? '
      'Attacks on another network are weaker.', num_examples=differ)]


def check_logits(logits: np.ndarray) -> tuple[int, bool]:
  """Counts rows that are not finite; checks for rows of probabilities."""
  finite = np.all(np.isfinite(logits), axis=-1)
  rows = logits[finite]
  sums = np.abs(rows.sum(axis=-1) - 1) < 1e-5
  probable = rows.size > 0 and bool(
      (rows > -1e-5).all() and (rows < 1 + 1e-5).all() and sums.all())
  return int(np.sum(~finite)), probable


def about_logits(
    nonfinite: int, probable: bool, traced: Traced) -> list[AttackWarning]:
  """Warns of natural logits that are not finite, probabilities or too narrow.

  Args:
    nonfinite: number of images with logits that are not finite.
    probable: whether the logits look like probabilities.
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
        'gradients vanish where the model is confident. Remove the softmax.'))
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
  """Warns of attacks that need more classes than the model has."""
  found = []
  for spec in specs:
    changes = []
    if num_classes < spec.min_classes:
      changes.append(
          f'its loss needs {spec.min_classes} classes, so it ascends the plain '
          'difference of logits instead')
    if num_classes - 1 < spec.num_targets:
      changes.append(
          f'{num_classes - 1} target classes instead of {spec.num_targets}')
    if changes:
      found.append(warn(
          'few-classes', f'{spec.name} with {num_classes} classes: '
          f'{"; ".join(changes)}.', spec.name))
  return found


def looks_channels_first(shape: tuple[int, ...]) -> bool:
  """Whether an image shape looks like [C, H, W], with 1 or 3 channels."""
  return len(shape) == 3 and shape[0] in (1, 3) and shape[2] > 4


def check_layout(
    specs: Sequence[AttackSpec], shape: tuple[int, ...]) -> list[AttackWarning]:
  """Warns if an attack needs images [H, W, C] and they look channels-first.

  Args:
    specs: the attacks.
    shape: of an image.
  """
  if not looks_channels_first(shape):
    return []
  return [
      warn('layout', f'{spec.name} reads images of shape {shape} as [H, W, C], '
           'channels last. If they are [C, H, W], its windows are not squares '
           'and the robust accuracy is too high: pass them as [H, W, C] and '
           'transpose inside logits_fn.', spec.name)
      for spec in specs if spec.needs_images]


def after_attack(
    spec: AttackSpec, anomalies: Anomalies, gain: float, any_white_box: bool
) -> list[AttackWarning]:
  """Warns of the anomalies of an attack.

  Args:
    spec: the attack.
    anomalies: counts over all examples.
    gain: the accuracy that it took.
    any_white_box: whether an earlier attack used gradients.
  """
  texts: list[tuple[WarningKind, int, str]] = [
      ('zero-gradients', anomalies.zero_gradient,
       'have a gradient of zero in every entry. Attacks with gradients are '
       'unreliable here.'),
      ('non-finite-gradient', anomalies.nonfinite_gradient,
       'have a gradient with entries that are not finite. The attack set them '
       'to 0, which weakens it. Fix the gradient (sqrt or a norm at 0, a '
       'division by 0 masked by `where`).'),
      ('non-finite', anomalies.nonfinite_logits,
       'have an adversarial example whose logits are not finite. They count as '
       'misclassified.'),
      ('outside', anomalies.outside,
       'have candidates with NaN or outside the ball or the box, which were '
       'rejected. The attack needs a projection.')]
  found = [
      warn(kind, f'{spec.name}: {count} examples {text}', spec.name, count)
      for kind, count, text in texts if count]
  if spec.name == 'square' and any_white_box and gain > _SQUARE_GAIN:
    found.append(warn(
        'square-stronger', f'Square took {gain:.2%} of accuracy after attacks '
        'with gradients: the model may mask its gradients. Run Square longer '
        'and with restarts, or an adaptive attack.', spec.name))
  return found
