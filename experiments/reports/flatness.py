"""Flatness of the weight loss landscape against the robust gap, over runs.

The paper claims that a flatter landscape of the training loss comes with a
smaller gap between robust training and test accuracy (its Fig. 2). The measure
here is Spearman's rank correlation rho over runs. Its 95 % interval is

  tanh( artanh(rho) +- 1.96 sqrt((1 + rho^2 / 2) / (n - 3)) )

(Bonett and Wright, Psychometrika 2000). Runs that share a method are not
independent of each other, so the interval is a rough guide.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from scipy import stats

from experiments.reports import figures
from experiments.reports.figures import Drawn
from experiments.util import paths

#: The checkpoint, the series and the split of a landscape that count.
_CHECKPOINT, _SERIES, _SPLIT = 'last', 'random', 'train'


class Correlation(NamedTuple):
  """A rank correlation with its 95 % confidence interval.

  Attributes:
    rho: Spearman's coefficient.
    low: the end of the interval.
    high: the other end.
    size: number of points.
  """

  rho: float
  low: float
  high: float
  size: int


def correlation(points: Sequence[tuple[float, float]]) -> Correlation | None:
  """Spearman's rho of points (x, y).

  Args:
    points: of which x and y are finite.

  Returns:
    The correlation; None with fewer than four points, or if all x or all y are
    equal.
  """
  count = len(points)
  if count < 4 or any(
      len({point[axis] for point in points}) == 1 for axis in (0, 1)):
    return None
  rho = float(stats.spearmanr(*zip(*points, strict=True)).statistic)
  if abs(rho) > 1 - 1e-12:
    return Correlation(round(rho), round(rho), round(rho), count)
  half = 1.959964 * math.sqrt((1 + rho ** 2 / 2) / (count - 3))
  center = math.atanh(rho)
  return Correlation(
      rho, math.tanh(center - half), math.tanh(center + half), count)


def points(
    groups: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, list[tuple[float, float]]]:
  """Mean rise of the robust training loss and robust gap of each run.

  Args:
    groups: from `comparison.group_by_config`.

  Returns:
    Name -> (mean rise over random directions, gap in percent) of the last
    checkpoint of each run with a landscape; no group without one.
  """
  found: dict[str, list[tuple[float, float]]] = {}
  for name, runs in groups.items():
    for run in runs:
      subject = (run['landscape'] or {}).get('subjects', {}).get(_CHECKPOINT)
      rise = subject and subject[_SERIES][_SPLIT]['mean_rise']['mean']
      gap = run['summary']['robust_generalisation_gap']
      if rise is not None and gap is not None:
        found.setdefault(name, []).append((rise, 100 * gap))
  return found


def sentence(groups: Mapping[str, Sequence[tuple[float, float]]]) -> str:
  """The correlation over all points in words; '' if there is none."""
  found = correlation([point for group in groups.values() for point in group])
  if found is None:
    return ''
  return (
      f"Spearman's rho of flatness (mean rise of the robust training loss) and "
      f'robust gap over {found.size} runs: {found.rho:+.2f}, 95 % interval '
      f'{found.low:+.2f} to {found.high:+.2f}.')


def draw(
    folder: paths.Path, groups: dict[str, list[tuple[float, float]]]
) -> list[Drawn]:
  """The figure of `points`; none with fewer than four."""
  text = sentence(groups)
  if not text:
    return []
  curves = [
      figures.Curve(
          name, [rise for rise, _ in group], [gap for _, gap in group], number)
      for number, (name, group) in enumerate(groups.items())]
  return [figures.lines(
      folder, 'flatness', curves, title='Flatness and gap', caption=text,
      xlabel='mean rise of the robust training loss',
      ylabel='robust gap, percent', joined=False)]
