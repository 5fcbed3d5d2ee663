"""A gallery of test images, their perturbations and predicted classes."""

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import awp_jax
from experiments.evaluation import probe
from experiments.util import atomic, paths

#: Class names by data set; others show class numbers.
CLASS_NAMES = {
    'cifar10': (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog',
        'horse', 'ship', 'truck')}

_TILE, _MARGIN, _TEXT = 96, 6, 28  # pixels of the PNG


class Card(NamedTuple):
  """One image of the gallery; pictures are data URIs.

  Attributes:
    image: the test image.
    perturbation: the perturbation, magnified; gray is zero.
    adversarial: the adversarial image.
    label: the true class.
    before: the predicted class of the image.
    after: the predicted class of the adversarial image.
    verdict: 'robust', 'broken' or 'misclassified' (without the attack).
  """

  image: str
  perturbation: str
  adversarial: str
  label: str
  before: str
  after: str
  verdict: str


def _bytes(images: np.ndarray) -> np.ndarray:
  """uint8 images of one or three channels."""
  if images.shape[-1] not in (1, 3):
    images = images.mean(axis=-1, keepdims=True)
  return np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)


def _picture(image: np.ndarray) -> Image.Image:
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _uri(image: np.ndarray) -> str:
  buffer = io.BytesIO()
  _picture(image).save(buffer, 'PNG')
  encoded = base64.b64encode(buffer.getvalue()).decode()
  return f'data:image/png;base64,{encoded}'


def magnified(
    probed: probe.Probe, threat: awp_jax.ThreatModel
) -> tuple[np.ndarray, float]:
  """Perturbations magnified around gray, and the factor.

  Args:
    probed: measurements of a model.
    threat: the threat model of the attack.

  Returns:
    Images in [0, 1], where 0.5 is no change, and the factor. It makes the
    largest allowed change (L_inf) or the largest found change (other norms)
    black or white.
  """
  change = probed.adversarial - probed.images
  largest = float(np.abs(change).max())
  reach = threat.epsilon if threat.norm == 'Linf' else largest
  factor = 0.5 / reach if reach else 1.0
  return 0.5 + factor * change, factor


def _verdict(label: int, before: int, after: int) -> str:
  if before != label:
    return 'misclassified'
  return 'robust' if after == label else 'broken'


def draw(
    folder: paths.Path, probed: probe.Probe, threat: awp_jax.ThreatModel,
    dataset: str) -> tuple[list[Card], float]:
  """Makes the gallery and saves it as `gallery.png` and `gallery.json`.

  Args:
    folder: for the files.
    probed: measurements of a model.
    threat: the threat model of the attack.
    dataset: name of the data set, for its class names.

  Returns:
    The cards and the magnification.
  """
  names = CLASS_NAMES.get(dataset, ())

  def name(number: int) -> str:
    if number < 0:
      return 'none'
    return names[number] if number < len(names) else str(number)

  shown, factor = magnified(probed, threat)
  rows = [_bytes(part) for part in (probed.images, shown, probed.adversarial)]
  cards = []
  for index, classes in enumerate(
      zip(probed.labels, probed.before, probed.after, strict=True)):
    label, before, after = (int(number) for number in classes)
    image, perturbation, adversarial = (_uri(row[index]) for row in rows)
    cards.append(Card(
        image, perturbation, adversarial, name(label), name(before),
        name(after), _verdict(label, before, after)))
  _save(folder, rows, cards, factor, probed)
  return cards, factor


def _save(
    folder: paths.Path, rows: list[np.ndarray], cards: list[Card],
    factor: float, probed: probe.Probe) -> None:
  step = _TILE + _MARGIN
  sheet = Image.new(
      'RGB', (_MARGIN + step * len(cards), _MARGIN + 3 * step + _TEXT), 'white')
  pen = ImageDraw.Draw(sheet)
  for column, card in enumerate(cards):
    left = _MARGIN + column * step
    for number, row in enumerate(rows):
      tile = _picture(row[column]).convert('RGB').resize(
          (_TILE, _TILE), Image.Resampling.NEAREST)
      sheet.paste(tile, (left, _MARGIN + number * step))
    pen.text(
        (left, _MARGIN + 3 * step), f'{card.before} ->\n{card.after}',
        fill='black')
  with atomic.replacing(folder / 'gallery.png') as file:
    sheet.save(file, 'PNG')
  values: dict[str, Any] = {
      'attack': probed.attack, 'checkpoint_step': int(probed.step),
      'magnification': factor, 'images': [
          {'label': card.label, 'before': card.before, 'after': card.after,
           'verdict': card.verdict} for card in cards]}
  atomic.write_json(folder / 'gallery.json', values)
