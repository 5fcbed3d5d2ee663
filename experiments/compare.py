"""Compares finished runs: a table, and their curves in one picture.

  python experiments/compare.py runs/demo/AT runs/demo/AT-AWP

Give runs of several seeds as well: runs whose configs differ in nothing but the
seed share a row, with mean and standard deviation.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import statistics
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import results

#: Heading -> where the value stands in summary.json. All but the last are
#: fractions, shown in per cent.
COLUMNS = {
    'robust best': ('best', 'robust_accuracy'),
    'robust last': ('last', 'robust_accuracy'),
    'last 6 epochs': ('last', 'mean_of_last_6'),
    'natural last': ('last', 'natural_accuracy'),
    'gap': ('robust_generalisation_gap',),
}


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
  """Summary, config and metrics of a finished run.

  Raises:
    ValueError: if there is no finished run in the folder.
  """
  path = workdir / 'summary.json'
  if not path.exists():
    raise ValueError(
        f'{str(workdir)!r} holds no summary.json: it is no folder of a '
        'finished run.')
  return {
      'name': workdir.name,
      'summary': json.loads(path.read_text()),
      'config': json.loads((workdir / 'config.json').read_text()),
      'lines': results.read_metrics(workdir)}


def group_by_config(
    runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """Runs that differ in their seed alone, by the name of the first of them."""
  groups: dict[str, list[dict[str, Any]]] = {}
  keys: dict[str, str] = {}
  for run in runs:
    fields = {k: v for k, v in run['config'].items() if k != 'seed'}
    key = json.dumps(fields, sort_keys=True)
    if key not in keys:
      name = run['name']
      while name in groups:
        name += "'"
      keys[key] = name
    groups.setdefault(keys[key], []).append(run)
  return groups


def mean_and_spread(values: Sequence[float]) -> str:
  """The mean, and the standard deviation where there are several values."""
  spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.2f}{spread}'


def rows(groups: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
  """The table's cells, per cent, with a spread where seeds are several."""
  table = [['run', 'seeds', *COLUMNS, 'seconds']]
  for name, runs in groups.items():
    cells = [name, str(len(runs))]
    for path in COLUMNS.values():
      values = []
      for run in runs:
        value = run['summary']
        for part in path:
          value = value[part]
        values.append(100 * value)
      cells.append(mean_and_spread(values))
    seconds = statistics.mean(run['summary']['seconds'] for run in runs)
    table.append([*cells, f'{seconds:.0f}'])
  return table


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the table and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path)
  parser.add_argument(
      '--output', type=pathlib.Path, default=pathlib.Path('comparison.png'),
      help='where the picture goes (default: comparison.png)')
  options = parser.parse_args(argv)
  try:
    groups = group_by_config([read_run(path) for path in options.workdirs])
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  print('Accuracies on test images, per cent; the gap is robust accuracy on '
        'training less that on test images at the last epoch.\n')
  print(results.table(rows(groups)))
  results.plot_comparison(
      {name: runs[0]['lines'] for name, runs in groups.items()},
      options.output)
  print(f'\ncurves: {options.output}')


if __name__ == '__main__':
  main()
