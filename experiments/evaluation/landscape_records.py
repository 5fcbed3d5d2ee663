"""The points of a landscape: which there are, and those measured so far."""

import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import ml_collections
import tqdm

from experiments.runs import precision
from experiments.util import atomic

#: What is measured at each point.
METRICS = (
    'robust_loss', 'robust_accuracy', 'natural_loss', 'natural_accuracy',
    'nonfinite')
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
  """Measured points of one checkpoint on disk, a line each.

  Attributes:
    judged_by: the different precisions, devices and versions that judged.
  """

  def __init__(self, path: pathlib.Path) -> None:
    """Reads what is there; a line that was cut off is dropped."""
    self._path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    self._known: dict[tuple[str, str, tuple[float, ...]], dict[str, float]] = {}
    self.judged_by: list[dict[str, Any]] = []
    self._judge: dict[str, Any] = {}
    text = path.read_text() if path.exists() else ''
    good = ''
    for one in text.splitlines(keepends=True):
      try:
        line = json.loads(one)
      except json.JSONDecodeError:
        break
      if not one.endswith('\n'):
        break
      self._take(line)
      good += one
    if good != text:
      atomic.write_text(path, good)

  def _take(self, line: dict[str, Any]) -> None:
    """Adds a line: who judges the points behind it, or a point."""
    if 'judged_by' in line:
      self._judge = line['judged_by']
      if self._judge not in self.judged_by:
        self.judged_by.append(self._judge)
    elif line.keys() >= set(METRICS):  # not one of an older version
      self._known[line['series'], line['split'], tuple(line['point'])] = {
          name: line[name] for name in METRICS}

  def find(self, series: Series, point: list[float]) -> dict[str, float] | None:
    """The values at a point, if they were measured."""
    return self._known.get((series.name, series.split, tuple(point)))

  def append(
      self, series: Series, point: list[float], means: dict[str, float]
  ) -> None:
    """Adds a point, on disk before this returns."""
    judge = precision.judged_by()
    lines: list[dict[str, Any]] = [] if judge == self._judge else [
        {'judged_by': judge}]
    lines.append({
        'series': series.name, 'split': series.split, 'point': point} | means)
    for line in lines:
      self._take(line)
    with self._path.open('a') as file:
      file.write(''.join(json.dumps(line) + '\n' for line in lines))


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
