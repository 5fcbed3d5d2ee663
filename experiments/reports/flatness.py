"""Flatness of the weight loss landscape and the robust gap, over runs.

The paper claims that a flatter landscape of the training loss comes with a
smaller gap between robust training and test accuracy (its Fig. 2). Flatness is
measured by the mean rise of the loss: the smaller, the flatter. The measure of
the claim is Spearman's rank correlation rho of mean rise and gap over runs,
positive if flatter runs have smaller gaps. Its 95 % interval is

  tanh( artanh(rho) +- 1.96 sqrt((1 + rho^2 / 2) / (n - 3)) )

(Bonett and Wright, Psychometrika 2000), which does not exist at rho = +-1. Runs
that share a method are not independent of each other, so the interval is a
rough guide.
"""

from collections.abc import Mapping, Sequence
import json
import math
from typing import Any, NamedTuple

from scipy import stats

from experiments.reports import figures
from experiments.reports.figures import Drawn
from experiments.runs import metrics
from experiments.util import paths

#: The checkpoint, the series and the split of a landscape that count.
_CHECKPOINT, _SERIES, _SPLIT = 'last', 'random', 'train'


class Correlation(NamedTuple):
  """A rank correlation with its 95 % confidence interval.

  Attributes:
    rho: Spearman's coefficient.
    low: the end of the interval; NaN at rho = +-1.
    high: the other end.
    size: number of points.
  """

  rho: float
  low: float
  high: float
  size: int


class Points(NamedTuple):
  """What a comparison of runs shows.

  Attributes:
    groups: name -> (mean rise, gap in percent) of each run with a landscape of
      its last checkpoint; no group without one.
    left_out: number of runs whose mean rise or gap is not finite.
    comparable: whether threat model, data and settings of the landscapes agree.
  """

  groups: dict[str, list[tuple[float, float]]]
  left_out: int
  comparable: bool


def problem(landscape: dict[str, Any], *more: str) -> str:
  """What comparable landscapes share: threat model, attack, data and `more`."""
  data = {key: value for key, value in landscape['dataset'].items()
          if key != 'source'}
  return json.dumps(
      [data, *(landscape[key] for key in ('threat', 'attack', *more))],
      sort_keys=True)


def correlation(points: Sequence[tuple[float, float]]) -> Correlation | None:
  """Spearman's rho of points (x, y).

  Args:
    points: of which x and y are finite.

  Returns:
    The correlation; None with fewer than five points, or if all x or all y are
    equal.
  """
  count = len(points)
  if count < 5 or any(
      len({point[axis] for point in points}) == 1 for axis in (0, 1)):
    return None
  rho = float(stats.spearmanr(*zip(*points, strict=True)).statistic)
  if abs(rho) > 1 - 1e-12:
    return Correlation(round(rho), math.nan, math.nan, count)
  half = 1.959964 * math.sqrt((1 + rho ** 2 / 2) / (count - 3))
  center = math.atanh(rho)
  return Correlation(
      rho, math.tanh(center - half), math.tanh(center + half), count)


def points(groups: Mapping[str, Sequence[dict[str, Any]]]) -> Points:
  """Mean rise of the robust training loss and robust gap of each run.

  Args:
    groups: from `comparison.group_by_config`.

  Returns:
    The points. A landscape of another step than the last one of its run does
    not count.
  """
  found: dict[str, list[tuple[float, float]]] = {}
  left_out, shared = 0, set()
  for name, runs in groups.items():
    for run in runs:
      landscape = run['landscape'] or {}
      subject = landscape.get('subjects', {}).get(_CHECKPOINT)
      steps = metrics.num_steps(run['lines'], run['config']['batch_size'])
      if subject is None or subject['step'] != steps:
        continue
      rise = subject[_SERIES][_SPLIT]['mean_rise']['mean']
      gap = run['summary']['robust_generalisation_gap']
      if rise is None or gap is None:
        left_out += 1
        continue
      shared.add(problem(landscape, 'settings', 'images'))
      found.setdefault(name, []).append((rise, 100 * gap))
  return Points(found, left_out, len(shared) <= 1)


def sentence(found: Points) -> str:
  """The correlation over all points in words; '' with fewer than five."""
  everything = [point for group in found.groups.values() for point in group]
  rank = correlation(everything)
  if rank is None:
    return ''
  if not found.comparable:
    return ('Flatness and robust gap are not compared: the landscapes differ '
            'in threat model, attack, data or settings.')
  text = (
      "Spearman's rho of the mean rise of the robust training loss and the "
      f'robust gap over {rank.size} runs: {rank.rho:+.2f}, ')
  text += 'without an interval' if math.isnan(rank.low) else (
      f'95 % interval {rank.low:+.2f} to {rank.high:+.2f}')
  text += '. It is positive if flatter runs have smaller gaps.'
  if found.left_out:
    text += (f' {found.left_out} runs with values that are not finite are left '
             'out.')
  return text


def draw(folder: paths.Path, found: Points) -> list[Drawn]:
  """The figure of `points`; none without a correlation."""
  text = sentence(found)
  if not text or not found.comparable:
    return []
  curves = [
      figures.Curve(
          name, [rise for rise, _ in group], [gap for _, gap in group], number)
      for number, (name, group) in enumerate(found.groups.items())]
  return [figures.lines(
      folder, 'flatness', curves, title='Mean rise and gap', caption=text,
      xlabel='mean rise of the robust training loss',
      ylabel='robust gap, percent', joined=False)]
