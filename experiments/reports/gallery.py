"""Test images, what an attack adds to them, and what the model sees."""

import base64
import io
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import awp_jax
from experiments.evaluation import probe
from experiments.util import atomic

#: Class names, where there are some and numbers do not say it.
CLASS_NAMES = {
    'cifar10': (
        'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog',
        'horse', 'ship', 'truck')}

_TILE, _MARGIN, _TEXT = 96, 6, 28  # pixels of the PNG


class Card(NamedTuple):
  """One image of a gallery; pictures are data URIs.

  Attributes:
    image: the test image.
    perturbation: what the attack added, magnified; grey is nothing.
    adversarial: their sum.
    label: the class.
    before: what the model sees in the image.
    after: what it sees in the adversarial one.
    verdict: 'stands', 'broken', or 'wrong from the start'.
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
    look: probe.Look, threat: awp_jax.ThreatModel) -> tuple[np.ndarray, float]:
  """Perturbations around grey, and by how much they are magnified.

  Args:
    look: at a model.
    threat: what the attack was allowed.

  Returns:
    Images in [0, 1], where 0.5 is no change, and the factor: with it the
    largest change allowed (L_inf) or found (other norms) is black or white.
  """
  change = look.adversarial - look.images
  largest = float(np.abs(change).max())
  reach = threat.epsilon if threat.norm == 'Linf' else largest
  factor = 0.5 / reach if reach else 1.0
  return 0.5 + factor * change, factor


def _verdict(label: int, before: int, after: int) -> str:
  if before != label:
    return 'wrong from the start'
  return 'stands' if after == label else 'broken'


def draw(
    folder: pathlib.Path, look: probe.Look, threat: awp_jax.ThreatModel,
    dataset: str) -> tuple[list[Card], float]:
  """Makes the gallery, and keeps it as `gallery.png` and `gallery.json`.

  Args:
    folder: for the files.
    look: at a model.
    threat: what the attack was allowed.
    dataset: its name, for the names of the classes.

  Returns:
    The cards, and the magnification.
  """
  names = CLASS_NAMES.get(dataset, ())

  def name(number: int) -> str:
    if number < 0:
      return 'none'
    return names[number] if number < len(names) else str(number)

  shown, factor = magnified(look, threat)
  rows = [_bytes(part) for part in (look.images, shown, look.adversarial)]
  cards = []
  for index, classes in enumerate(
      zip(look.labels, look.before, look.after, strict=True)):
    label, before, after = (int(number) for number in classes)
    image, perturbation, adversarial = (_uri(row[index]) for row in rows)
    cards.append(Card(
        image, perturbation, adversarial, name(label), name(before),
        name(after), _verdict(label, before, after)))
  _save(folder, rows, cards, factor, look)
  return cards, factor


def _save(
    folder: pathlib.Path, rows: list[np.ndarray], cards: list[Card],
    factor: float, look: probe.Look) -> None:
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
  sheet.save(folder / 'gallery.png')
  values: dict[str, Any] = {
      'attack': look.attack, 'checkpoint_step': int(look.step),
      'magnification': factor, 'images': [
          {'label': card.label, 'before': card.before, 'after': card.after,
           'verdict': card.verdict} for card in cards]}
  atomic.write_json(folder / 'gallery.json', values)
