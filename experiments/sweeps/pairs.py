"""Paired differences between two groups of runs with the same seeds.

Runs of one seed share the images, the initial weights and the order of batches
if their configs have the same data and network. They usually differ less than
runs of different seeds, so their differences show more clearly whether a method
helps than two means do.

  >>> found = interval([1.0, 2.0, 3.0])
  >>> print(f'{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})')
  2.00 (-0.48 to 4.48)
"""

from collections.abc import Mapping, Sequence
import math
import statistics
from typing import Any, NamedTuple

from scipy import stats

from experiments.sweeps.records import Record

#: Keys of `records.measure` that are compared.
COMPARED = ('best', 'final', 'fall', 'last', 'natural', 'gap', 'autoattack')

#: Fields of a config that select the images.
_DATA = ('dataset', 'npz_path', 'data_seed', 'num_train', 'num_test',
         'num_validation', 'image_size')


class Interval(NamedTuple):
  """A mean with its 95 % confidence interval.

  Attributes:
    mean: of the values.
    low: the end of the interval; NaN for a single value.
    high: the other end.
    size: number of values.
  """

  mean: float
  low: float
  high: float
  size: int


class Differences(NamedTuple):
  """Differences of several groups to one.

  Attributes:
    baseline: name of the group that is subtracted.
    intervals: name of each other group -> key -> interval.
    other_data: names of groups that are not compared, because their images are
      not those of the baseline.
  """

  baseline: str
  intervals: dict[str, dict[str, Interval]]
  other_data: tuple[str, ...] = ()


def interval(values: Sequence[float]) -> Interval:
  """Student's interval, mean +- t_{n-1}(0.975) s / sqrt(n).

  Args:
    values: independent, at least one; s is their standard deviation.

  Returns:
    The interval. It assumes normally distributed values.
  """
  count, mean = len(values), statistics.fmean(values)
  if count == 1:
    return Interval(mean, math.nan, math.nan, count)
  half = (stats.t.ppf(0.975, count - 1) * statistics.stdev(values)
          / math.sqrt(count))
  return Interval(mean, mean - half, mean + half, count)


def differences(
    runs: Sequence[Record], baseline: Sequence[Record]) -> dict[str, Interval]:
  """Values of runs minus those of the baseline's runs of the same seeds.

  Args:
    runs: of one group, with different seeds.
    baseline: of another.

  Returns:
    An interval for each key of `COMPARED` that a pair has; empty without a
    common seed.
  """
  by_seed = {run.seed: run.measured for run in baseline}
  found = {}
  for key in COMPARED:
    values = [
        run.measured[key] - by_seed[run.seed][key] for run in runs
        if key in run.measured and key in by_seed.get(run.seed, {})]
    if values:
      found[key] = interval(values)
  return found


def against(
    groups: Mapping[str, Sequence[Record]], baseline: str = '') -> Differences:
  """`differences` of all finished groups to one of them.

  Args:
    groups: name -> runs, from `records.group`.
    baseline: one of the names; '' selects the first finished group.

  Returns:
    The differences, without groups that share no seed with the baseline; none
    if the baseline is not finished.
  """
  finished = {name: runs for name, runs in groups.items()
              if runs[0].state.kind == 'finished'}
  baseline = baseline or next(iter(finished), '')
  subtracted = finished.pop(baseline, [])
  data = _data(subtracted)
  found = {
      name: differences(runs, subtracted) for name, runs in finished.items()
      if _data(runs) == data}
  return Differences(
      baseline, {name: values for name, values in found.items() if values},
      tuple(name for name in finished if subtracted and name not in found))


def _data(runs: Sequence[Record]) -> list[Any]:
  """The values of the fields that select the images."""
  return [runs[0].config.get(name) for name in _DATA] if runs else []
