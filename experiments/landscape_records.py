"""The points of a landscape: which there are, and those measured so far."""

import json
import pathlib
import sys
import time
from typing import NamedTuple

import ml_collections
import tqdm

#: What is measured at each point.
METRICS = (
    'robust_loss', 'robust_accuracy', 'natural_loss', 'natural_accuracy')
SPLITS = ('train', 'test')


class Series(NamedTuple):
  """Points to measure.

  Attributes:
    name: 'direction-0', ..., 'adversarial' or 'plane'.
    split: 'train' or 'test'.
    points: coordinates [P, 1] or [P, 2].
  """

  name: str
  split: str
  points: list[list[float]]


def coordinates(reach: float, count: int) -> list[float]:
  """Evenly spaced from -reach to reach, with an exact 0 in the middle."""
  half = count // 2
  return [reach * k / half for k in range(-half, half + 1)]


def make_series(settings: ml_collections.ConfigDict) -> list[Series]:
  """All that is to be measured of one checkpoint, in its order."""
  line = [[a] for a in coordinates(settings.range, settings.points)]
  series = [
      Series(f'direction-{number}', split, line)
      for number in range(settings.num_directions) for split in SPLITS]
  if settings.adversarial_range:
    line = [
        [a] for a in coordinates(settings.adversarial_range, settings.points)]
    series += [Series('adversarial', split, line) for split in SPLITS]
  if settings.plane_points:
    side = coordinates(settings.range, settings.plane_points)
    plane = [[a, b] for a in side for b in side]
    series.append(Series('plane', 'train', plane))
  return series


class Records:
  """Measured points of one checkpoint on disk, a line each."""

  def __init__(self, path: pathlib.Path) -> None:
    """Reads what is there; a line that was cut off is dropped."""
    self._path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    self._known: dict[tuple[str, str, tuple[float, ...]], dict[str, float]] = {}
    good = ''
    for text in path.read_text().splitlines() if path.exists() else ():
      try:
        line = json.loads(text)
      except json.JSONDecodeError:
        break
      self._known[line['series'], line['split'], tuple(line['point'])] = {
          name: line[name] for name in METRICS}
      good += text + '\n'
    path.write_text(good)

  def find(self, series: Series, point: list[float]) -> dict[str, float] | None:
    """The values at a point, if they were measured."""
    return self._known.get((series.name, series.split, tuple(point)))

  def append(
      self, series: Series, point: list[float], means: dict[str, float]
  ) -> None:
    """Adds a point, on disk before this returns."""
    self._known[series.name, series.split, tuple(point)] = means
    line = {'series': series.name, 'split': series.split, 'point': point}
    with self._path.open('a') as file:
      file.write(json.dumps(line | means) + '\n')


class Teller:
  """A bar in a terminal, a line a series elsewhere."""

  def __init__(self, label: str, total: int) -> None:
    """Starts the clock of `total` points."""
    self._label, self._started = label, time.perf_counter()
    self._bar = tqdm.tqdm(
        total=total, unit='point', desc=label, dynamic_ncols=True,
        disable=not sys.stderr.isatty())

  def heard(self, points: int) -> None:
    """So many points more are known."""
    self._bar.update(points)

  def finished(self, series: Series, values: list[dict[str, float]]) -> None:
    """All points of a series are known."""
    centre = values[len(values) // 2]['robust_loss']
    highest = max(value['robust_loss'] for value in values)
    text = (f'{series.name}, {series.split} images: robust loss {centre:.4f} '
            f'at the model, at most {highest:.4f}')
    self._bar.set_postfix_str(text)
    if self._bar.disable:
      seconds = time.perf_counter() - self._started
      print(f'{self._label}  {text}, {seconds:.0f} s', flush=True)

  def close(self) -> None:
    """Leaves the bar as it is."""
    self._bar.close()
