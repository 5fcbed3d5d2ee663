"""The points of a landscape to measure, and records of the measured ones."""

import json
import time
from typing import Any, NamedTuple

import ml_collections
import tqdm

from experiments.parallel import processes
from experiments.runs import precision
from experiments.util import atomic, paths
from experiments.util.errors import UserError

#: Metrics of each point.
METRICS = (
    'robust_loss', 'robust_accuracy', 'natural_loss', 'natural_accuracy',
    'nonfinite')
SPLITS = ('train', 'test')


class Series(NamedTuple):
  """Points along one direction, or on the plane, for one split.

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
  """All series of one checkpoint, in the order of measurement."""
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
  """Measured points of one checkpoint on disk, one per line.

  The main process writes one file. Every other process writes one beside it,
  and all read all of them.

  Attributes:
    judged_by: the distinct precisions, devices and versions used.
  """

  def __init__(self, path: paths.Path) -> None:
    """Reads the files; drops truncated last lines.

    Args:
      path: of the main process, with the suffix '.jsonl'.
    """
    self._main = path
    self._path = path if processes.is_main() else path.with_suffix(
        f'.process-{processes.index()}.jsonl')
    path.parent.mkdir(parents=True, exist_ok=True)
    self._known: dict[tuple[str, str, tuple[float, ...]], dict[str, float]] = {}
    self.judged_by: list[dict[str, Any]] = []
    self._environment: dict[str, Any] = {}
    text = self._path.read_text() if self._path.exists() else ''
    if (good := _whole_lines(text)) != text:
      atomic.write_text(self._path, good)
    self.exchange()
    for line in good.splitlines():  # again: the next line follows these
      self._take(json.loads(line))

  def exchange(self) -> None:
    """Waits for all processes, and reads the points of all of them."""
    processes.barrier()
    paths = self._main.parent.glob(f'{self._main.stem}*.jsonl')
    for path in sorted(paths):
      for line in _whole_lines(path.read_text()).splitlines():
        self._take(json.loads(line))
    processes.barrier()

  def _take(self, line: dict[str, Any]) -> None:
    """Adds a line: a point, or the environment of the following points."""
    if 'judged_by' in line:
      self._environment = line['judged_by']
      if self._environment not in self.judged_by:
        self.judged_by.append(self._environment)
    elif line.keys() >= set(METRICS):  # skips lines of older versions
      self._known[line['series'], line['split'], tuple(line['point'])] = {
          name: line[name] for name in METRICS}

  def find(self, series: Series, point: list[float]) -> dict[str, float] | None:
    """The metrics at a point, or None if it was not measured."""
    return self._known.get((series.name, series.split, tuple(point)))

  def all_of(self, series: Series) -> list[dict[str, float]]:
    """The metrics of a series.

    Raises:
      UserError: if a process did not write its points to the folder.
    """
    values = [self.find(series, point) for point in series.points]
    missing = [
        point for point, value in zip(series.points, values, strict=True)
        if value is None]
    if missing:
      raise UserError(
          f'{self._main.parent} lacks {len(missing)} of {len(values)} points '
          f'of {series.name}: all processes must share the workdir.')
    return [value for value in values if value is not None]

  def append(
      self, series: Series, point: list[float], means: dict[str, float]
  ) -> None:
    """Writes a point to disk."""
    environment = precision.judged_by()
    lines: list[dict[str, Any]] = []
    if environment != self._environment:
      lines.append({'judged_by': environment})
    lines.append({
        'series': series.name, 'split': series.split, 'point': point} | means)
    for line in lines:
      self._take(line)
    atomic.append_text(
        self._path, ''.join(json.dumps(line) + '\n' for line in lines))


def _whole_lines(text: str) -> str:
  """The lines up to the first that is truncated."""
  good = ''
  for line in text.splitlines(keepends=True):
    try:
      json.loads(line)
    except json.JSONDecodeError:
      break
    if not line.endswith('\n'):
      break
    good += line
  return good


class Progress:
  """A progress bar in a terminal, otherwise one line per series."""

  def __init__(self, label: str, total: int) -> None:
    """Starts the bar and the clock for `total` points."""
    self._label, self._started = label, time.perf_counter()
    self._bar = tqdm.tqdm(
        total=total, unit='point', desc=label, dynamic_ncols=True,
        disable=not processes.shows_progress())

  def add(self, points: int) -> None:
    """Advances the bar."""
    self._bar.update(points)

  def finish_series(
      self, series: Series, values: list[dict[str, float]]) -> None:
    """Shows the robust loss of a series whose points are all measured."""
    center = values[len(values) // 2]['robust_loss']
    highest = max(value['robust_loss'] for value in values)
    text = (f'{series.name}, {series.split} images: robust loss {center:.4f} '
            f'at the model, at most {highest:.4f}')
    self._bar.set_postfix_str(text)
    if self._bar.disable:
      seconds = time.perf_counter() - self._started
      print(f'{self._label}  {text}, {seconds:.0f} s', flush=True)

  def close(self) -> None:
    """Closes the bar and leaves it on the screen."""
    self._bar.close()
