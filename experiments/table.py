"""Runs configs and seeds, and compares the results with published ones.

  python experiments/table.py --seeds=0,1 --workdir=runs/table \
    --configs=experiments/configs/cifar10_at.py,experiments/configs/cifar10_awp.py

Every run is a separate process. Finished runs are not repeated, stopped runs
resume from their last checkpoint, and failed runs are listed in the table with
the reason. After Ctrl-C or SIGTERM, the current run saves a checkpoint first.
`--config.NAME=VALUE` changes a field of every run. `--vary=NAME=VALUE,VALUE`
runs every config with each of the values, and draws a figure over them; given
several times, with every combination. `--only_table` runs nothing.
Below the table are the differences between runs of the same seed, with 95 %
confidence intervals, to the row of `--baseline` (default: the first config).
A seed sets the initial weights, the order of images and the noise. The choice
of images depends only on `--config.data_seed`, 0 by default.
The table covers all runs in the workdir, including those of other processes
with the same workdir: start one process per accelerator.
"""

import argparse
from collections.abc import Sequence
import json
import math
import pathlib
import re
import statistics
import sys
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.reports import comparison, curves
from experiments.sweeps import jobs, pairs, records, runner, varied
from experiments.util import atomic, console, paths
from experiments.util.errors import UserError

#: Key of `records.measure` -> heading.
COLUMNS = {
    'best': 'best', 'final': 'final', 'fall': 'fall', 'last': 'last 6',
    'natural': 'natural', 'gap': 'gap', 'autoattack': 'AutoAttack',
    'seconds_per_step': 's/step', 'seconds_per_epoch': 's/epoch'}

#: Columns that have published values.
PUBLISHED = ('best', 'last', 'natural', 'autoattack')

LEGEND = (
    'Mean ± standard deviation over seeds. Accuracies are in percent on test '
    'images. best, final: robust accuracy at the best and at the last '
    "evaluation; fall: best minus final, with Student's 95 % confidence "
    'interval of the mean, above 0 by selection alone if best is selected on '
    'test images; last 6: robust accuracy, mean over the last six '
    'evaluations; natural: natural accuracy at the best one; gap: robust '
    'accuracy on training images minus that on test images at the last '
    'evaluation; s/step, s/epoch: seconds of training. Unfinished runs have '
    'separate rows.')

PAIRS_LEGEND = (
    "Differences to {baseline} in points, between runs of the same seed: mean "
    "and Student's 95 % confidence interval. best and fall are selected from "
    'several noisy evaluations in both runs.')


def rows(groups: dict[str, list[records.Record]]) -> list[list[str]]:
  """The table's cells; '-' for missing values."""
  measured = {key for runs in groups.values() for key in runs[0].measured}
  keys = [key for key in COLUMNS if key != 'autoattack' or key in measured]
  head = ['config', 'seeds']
  for key in keys:
    head += [COLUMNS[key]] + ['published'] * (key in PUBLISHED)
  table = [[*head, 'state']]
  for name, runs in groups.items():
    cells = [name, ', '.join(str(run.seed) for run in runs)]
    reference = records.published_for(runs[0]) or {}
    for key in keys:
      cells.append(_cell(key, [run.measured.get(key) for run in runs]))
      if key in PUBLISHED:
        cells.append(f'{reference[key]:.2f}' if key in reference else '-')
    table.append([*cells, _progress(runs[0])])
  return table


def _cell(key: str, values: Sequence[float | None]) -> str:
  numbers = [value for value in values if value is not None]
  if not numbers:
    return '-'
  if key == 'fall':
    return _interval(pairs.interval(numbers), len(numbers))
  if key.startswith('seconds'):
    return f'{statistics.mean(numbers):.3g}'
  return comparison.mean_and_spread(numbers)


def pair_rows(found: pairs.Differences) -> list[list[str]]:
  """The cells of the table of differences."""
  keys = [key for key in pairs.COMPARED if any(
      key in values for values in found.intervals.values())]
  table = [['config', 'pairs', *(COLUMNS[key] for key in keys)]]
  for name, values in found.intervals.items():
    count = max(value.size for value in values.values())
    table.append([name, str(count), *(
        _interval(values.get(key), count) for key in keys)])
  return table


def _interval(value: pairs.Interval | None, count: int) -> str:
  if value is None:
    return '-'
  # Adding 0 turns a rounded -0 into +0.
  mean, low, high = (round(x, 2) + 0.0 for x in value[:3])
  text = f'{mean:+.2f}'
  if value.size > 1:
    text += f' ({low:+.2f} to {high:+.2f})'
  return text if value.size == count else (
      f'{text}, {value.size} of {count} pairs')


def _progress(run: records.Record) -> str:
  if run.state.kind == 'finished' or not run.config:
    return run.state.kind
  return f'{run.state.kind}, epoch {run.state.epochs}/{run.config["epochs"]}'


def notes(groups: dict[str, list[records.Record]]) -> list[str]:
  """Notes below the table, one line each."""
  found = []
  for name, runs in groups.items():
    if runs[0].state.error:
      found.append(f'{name}: {runs[0].state.error}')
    found += [f'{run.name}: {run.left_out}.' for run in runs if run.left_out]
    fields = records.changed(runs[0])
    if fields:
      found.append(
          f'{name} differs from its config: '
          f'{", ".join(f"{key}={fields[key]!r}" for key in sorted(fields))}'
          + ('. The published numbers do not apply.'
             if records.published_for(runs[0]) else '.'))
  return found


def markdown(cells: Sequence[Sequence[str]]) -> str:
  """The table in Markdown."""
  lines = [f'| {" | ".join(row)} |' for row in cells]
  return '\n'.join([lines[0], '|---' * len(cells[0]) + '|', *lines[1:]])


def as_json(
    groups: dict[str, list[records.Record]],
    found: pairs.Differences) -> dict[str, Any]:
  """The contents of `table.json`."""
  return {
      name: {
          'config': runs[0].label,
          'varied': dict(runs[0].varied),
          'changed': records.changed(runs[0]),
          'published': records.published_for(runs[0]),
          'runs': [
              {'name': run.name, 'seed': run.seed, **run.state._asdict(),
               'measured': run.measured} for run in runs],
          **({'baseline': found.baseline, 'differences': {
              key: {name: number if math.isfinite(number) else None
                    for name, number in value._asdict().items()}
              for key, value in found.intervals[name].items()}}
             if name in found.intervals else {})}
      for name, runs in groups.items()}


def write(
    workdir: paths.Path, listed: Sequence[str], baseline: str = '') -> str:
  """Writes `table.md`, `table.json`, `table.png` and figures of varied fields.

  Args:
    workdir: with the runs.
    listed: names of the runs listed first, in this order, even if they never
      started. All others in the folder follow.
    baseline: as in `pairs.against`.

  Returns:
    The table as text.
  """
  names = dict.fromkeys([*listed, *runner.find_runs(workdir)])
  groups = records.group([records.read(workdir, name) for name in names])
  found = pairs.against(groups, baseline)
  parts: list[list[list[str]] | str] = [rows(groups), LEGEND]
  if found.intervals:
    parts += [
        pair_rows(found), PAIRS_LEGEND.format(baseline=found.baseline)]
  elif len(groups) > 1 and not found.other_data:
    parts.append(f'There are no differences to {found.baseline!r}: it has no '
                 'finished run, or no other row has one of the same seed.')
  if found.other_data:
    parts.append(f'Not compared with {found.baseline}, because of other data: '
                 f'{", ".join(found.other_data)}.')
  parts += notes(groups)
  atomic.write_text(workdir / 'table.md', '\n\n'.join(
      part if isinstance(part, str) else markdown(part)
      for part in parts) + '\n')
  atomic.write_text(workdir / 'table.json', json.dumps(
      as_json(groups, found), indent=2, allow_nan=False) + '\n')
  shown = {
      name: [run.lines for run in runs] for name, runs in groups.items()
      if runs[0].measured}
  if shown:
    curves.plot_comparison(shown, workdir / 'table.png')
  for field, series in varied.collect(groups).items():
    curves.plot_varied(field, series, workdir / f'table_{field}.png')
  return '\n\n'.join(
      textwrap.fill(part, 80) if isinstance(part, str) else console.table(part)
      for part in parts)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses the options and the overrides for every run."""
  parser = console.Parser(__doc__)
  parser.add_argument(
      '--configs', type=str, help='files, separated by commas')
  parser.add_argument(
      '--seeds', default='0', help='separated by commas; default: 0')
  parser.add_argument('--workdir', required=True)
  parser.add_argument(
      '--baseline', default='',
      help='row of the table that the others are compared with, seed by seed; '
      'default: the first config')
  parser.add_argument(
      '--vary', action='append', default=[], metavar='NAME=VALUE,VALUE',
      help='field of the configs and its values; may be given several times')
  parser.add_argument(
      '--only_table', action='store_true',
      help='only write the table; run nothing')
  options, rest = parser.parse_known_args(argv)
  for argument in rest:
    if not re.fullmatch(r'--config\.[\w.]+=.*', argument, re.DOTALL):
      parser.error(
          f'unknown argument {argument!r}; use --config.NAME=VALUE to change a '
          'field of all configs.')
    if argument.startswith('--config.seed='):
      parser.error(f'{argument}: set seeds with --seeds=0,1,2.')
  if not options.configs and (options.vary or not options.only_table):
    parser.error('--configs is missing; only --only_table works without it.')
  return options, rest


def _check_baseline(baseline: str, names: Sequence[str]) -> None:
  """Raises UserError unless a run of that row is listed or stored."""
  rows_of = dict.fromkeys(
      parsed.row for parsed in map(jobs.parse_name, names) if parsed)
  # Rows of one config with other fields are named with primes.
  if baseline and baseline.rstrip("'") not in rows_of:
    raise UserError(
        '--baseline must be one of '
        f'{"; ".join(rows_of) or "the runs"}, got {baseline!r}.')


def main(
    argv: Sequence[str] | None = None,
    script: pathlib.Path = runner.MAIN) -> int:
  """Runs the sweep, writes the table and prints it.

  Args:
    argv: arguments of the command.
    script: the script that runs one config.

  Returns:
    The exit code: 1 if a listed run failed, 2 for wrong arguments.
  """
  options, overrides = _parse(argv)
  try:
    workdir = paths.parse(options.workdir)
    listed = jobs.make(
        jobs.parse_configs(options.configs), jobs.parse_seeds(options.seeds),
        jobs.parse_varied(options.vary)) if options.configs else []
    if options.only_table and not listed and not runner.find_runs(workdir):
      raise UserError(f'{str(workdir)!r} holds no runs.')
    names = [job.name for job in listed]
    _check_baseline(options.baseline, [*names, *runner.find_runs(workdir)])
    baseline = options.baseline or (
        jobs.row_name(jobs.label_of(listed[0].config), listed[0].varied)
        if listed else '')
    stopped = None
    if not options.only_table:
      # Keeps the table up to date during the sweep.
      stopped = runner.run_jobs(
          listed, workdir, overrides, script,
          after_each=lambda: write(workdir, names, baseline))
    workdir.mkdir(parents=True, exist_ok=True)
    print(f'\n{write(workdir, names, baseline)}')
  except (UserError, OSError) as error:
    console.complain(error)
    return 2
  print(f'\ntable.md, table.json and the figures are in {workdir}')
  if stopped:
    print(f'{stopped}: run the same command to resume.')
  return int(any(
      runner.state_of(workdir, name).kind == 'failed' for name in names))


if __name__ == '__main__':
  sys.exit(main())
