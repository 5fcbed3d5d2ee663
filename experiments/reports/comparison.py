"""Compares finished runs: one table, one page."""

from collections.abc import Sequence
import json
import statistics
from typing import Any

from experiments.reports import flatness, panels, tables
from experiments.reports import page as page_lib
from experiments.runs import metrics, workdirs
from experiments.util import atomic, paths

#: Heading -> path of the value in summary.json. Values are fractions, shown in
#: percent.
COLUMNS = {
    'robust best': ('best', 'robust_accuracy'),
    'robust last': ('last', 'robust_accuracy'),
    'last 6': ('last', 'mean_of_last_6'),
    'natural last': ('last', 'natural_accuracy'),
    'gap': ('robust_generalisation_gap',),
}


def read_run(workdir: paths.Path) -> dict[str, Any]:
  """Summary, config and metrics of a finished run.

  Raises:
    ValueError: if there is no finished run in the folder.
  """
  path = workdir / 'summary.json'
  if not path.exists():
    raise ValueError(
        f'{str(workdir)!r} has no summary.json: it is not the folder of a '
        'finished run.')
  summary, lines = atomic.read_json(path), metrics.read_metrics(workdir)
  if changed := metrics.changed_epochs(lines, summary):
    raise ValueError(
        f'{workdir / "metrics.jsonl"} was damaged, in the lines of epochs '
        f'{", ".join(map(str, changed))}: run main.py there again.')
  return {
      'name': workdir.name,
      'summary': summary,
      'config': workdirs.with_defaults(
          json.loads((workdir / 'config.json').read_text())),
      'evaluation': atomic.read_json(workdir / 'evaluation.json'),
      'landscape': atomic.read_json(workdir / 'landscape.json'),
      'lines': lines}


def group_by_config(
    runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """Groups runs that differ only in the seed, named after the first."""
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


def check_seeds(groups: dict[str, list[dict[str, Any]]]) -> None:
  """Raises ValueError if a run is there twice, which would narrow intervals."""
  for runs in groups.values():
    by_seed: dict[int, str] = {}
    for run in runs:
      seed = run['config']['seed']
      if seed in by_seed:
        raise ValueError(
            f'{by_seed[seed]!r} and {run["name"]!r} are runs of one config '
            f'with the same seed, {seed}: name one of them.')
      by_seed[seed] = run['name']


def mean_and_spread(values: Sequence[float]) -> str:
  """The mean, and for several values the standard deviation."""
  spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.2f}{spread}'


def rows(groups: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
  """The table's cells in percent, with a spread for several seeds."""
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


def differences(groups: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
  """The config fields, other than the seed, that differ between groups."""
  configs = [runs[0]['config'] for runs in groups.values()]
  table = [['field', *groups]]
  for field in dict.fromkeys(name for config in configs for name in config):
    if field in ('seed', *workdirs.FREE_FIELDS) or field.startswith(
        workdirs.FREE_GROUPS):
      continue
    values = [str(config.get(field, 'absent')) for config in configs]
    if len(set(values)) > 1:
      table.append([field, *values])
  return table if len(table) > 1 else []


def _facts(groups: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
  table = [['run', 'seeds', 'data', 'devices', 'versions']]
  for name, runs in groups.items():
    summary = runs[0]['summary']
    dataset = summary['dataset']
    table.append([
        name, ', '.join(str(run['config']['seed']) for run in runs),
        f'{dataset["name"]}: {dataset["num_train"]} training and '
        f'{dataset["num_test"]} test images',
        ', '.join(dict.fromkeys(summary['devices'])),
        f'jax {summary["versions"]["jax"]}, Python '
        f'{summary["versions"]["python"]}'])
  return table


def write_page(
    groups: dict[str, list[dict[str, Any]]], path: paths.Path) -> None:
  """Writes the page, and its figures to a folder next to it.

  Curves, landscapes and attacks are those of the first run of each group;
  flatness is compared over all runs.

  Args:
    groups: from `group_by_config`.
    path: of the page; the figures go to `<its stem>_figures/`.
  """
  folder = path.with_name(f'{path.stem}_figures')
  first = {name: runs[0] for name, runs in groups.items()}
  landscape, evaluation = (
      {name: run[part] for name, run in first.items() if run[part]}
      for part in ('landscape', 'evaluation'))
  several = any(len(runs) > 1 for runs in groups.values())
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page_lib.render('comparison.html.j2', {
      'title': ' vs. '.join(groups), 'subtitle': 'Comparison of runs',
      'summary': rows(groups),
      'seeds_note': ', mean and standard deviation over seeds; the figures '
      'of training, landscapes and attacks show the first run of each row'
      if several else '',
      'training': panels.training(
          folder, {name: run['lines'] for name, run in first.items()}),
      'landscape': [
          *(panels.landscapes(folder, landscape) if landscape else []),
          *flatness.draw(folder, flatness.points(groups))],
      'landscape_note': page_lib.landscape_note(landscape),
      'landscape_table': tables.flatness(landscape),
      'attacks': [
          panels.attacks(folder, evaluation),
          *panels.epsilons(folder, evaluation)] if evaluation else [],
      'attacks_table': tables.attacks(evaluation),
      'differences': differences(groups), 'facts': _facts(groups)}))
