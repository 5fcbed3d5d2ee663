"""Results of a sweep by the values of a varied field, for its figure."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from experiments.sweeps import records
from experiments.sweeps.records import Record

#: Series -> value of the field -> key of `records.measure` -> one per seed.
Series = dict[str, dict[Any, dict[str, list[float]]]]


def collect(groups: Mapping[str, Sequence[Record]]) -> dict[str, Series]:
  """Finds the results of finished runs for every varied field.

  Runs that differ in nothing but the field and the seed are one series. Runs
  of a config without varied fields belong to it too, if their fields match.

  Args:
    groups: rows of the table, from `records.group`.

  Returns:
    For each field that a run's name varies, series by name. Those of a single
    value are left out. Of equal runs with the same seed only the first counts.
  """
  runs = [run for group in groups.values() for run in group
          if run.state.kind == 'finished' and run.measured]
  fields = dict.fromkeys(field for run in runs for field, _ in run.varied)
  return {field: series for field in fields
          if (series := _series(field, runs))}


def _series(field: str, runs: Sequence[Record]) -> Series:
  by_rest: dict[str, list[Record]] = {}
  for run in runs:
    if field not in run.config:  # from before the field was added
      continue
    rest = {name: value for name, value
            in records.result_fields(run.config).items() if name != field}
    by_rest.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
  found: Series = {}
  for members in by_rest.values():
    varied = [run for run in members if field in dict(run.varied)]
    if varied and len({str(run.config[field]) for run in members}) > 1:
      name = varied[0]._replace(varied=tuple(
          part for part in varied[0].varied if part[0] != field)).row
      while name in found:
        name += "'"
      found[name] = _by_value(field, members)
  return found


def _by_value(
    field: str, runs: Sequence[Record]) -> dict[Any, dict[str, list[float]]]:
  """The results of one series; numbers are sorted."""
  found: dict[Any, dict[str, list[float]]] = {}
  seen = set()
  for run in runs:
    value = run.config[field]
    value = value if isinstance(value, int | float) else str(value)
    if (value, run.seed) not in seen:
      seen.add((value, run.seed))
      for key, number in run.measured.items():
        found.setdefault(value, {}).setdefault(key, []).append(number)
  if all(isinstance(value, int | float) for value in found):
    return dict(sorted(found.items()))
  return found
