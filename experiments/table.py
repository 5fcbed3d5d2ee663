"""Runs configs and seeds, and sets their results beside the published ones.

  python experiments/table.py --seeds=0,1 --workdir=runs/table \
    --configs=experiments/configs/cifar10_at.py,experiments/configs/cifar10_awp.py

Every run is a process of its own. What is finished is not run again, what was
stopped goes on from its last checkpoint, and what fails stands in the table
with its reason. Ctrl-C and SIGTERM let the run under way save first.
`--config.NAME=VALUE` changes a field of every run. `--only_table` runs nothing.
A seed is that of the initial weights, the order of images and the noise; the
images themselves depend on `--config.data_seed` alone, 0 by default.
The table covers all runs in the workdir, also those which another process with
the same workdir has made: start one per accelerator.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import re
import statistics
import sys
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.reports import comparison, curves
from experiments.sweeps import jobs, published, records, runner
from experiments.util import atomic, console
from experiments.util.errors import UserError

#: Key of `records.measure` -> heading.
COLUMNS = {
    'best': 'best', 'last': 'last 6', 'natural': 'natural', 'gap': 'gap',
    'autoattack': 'AutoAttack', 'seconds_per_step': 's/step',
    'seconds_per_epoch': 's/epoch'}

#: Of these, those which `published` may know.
PUBLISHED = ('best', 'last', 'natural', 'autoattack')

LEGEND = (
    'Robust accuracy on test images, per cent, mean ± standard deviation over '
    'seeds: the best evaluation and the mean of the last six; natural accuracy '
    'at the best; gap: robust accuracy on training images less that on test '
    'images at the last evaluation; seconds of training. Runs that are not '
    'finished stand for themselves.')


def rows(groups: dict[str, list[records.Record]]) -> list[list[str]]:
  """The table's cells; '-' where nothing is known."""
  measured = {key for runs in groups.values() for key in runs[0].measured}
  keys = [key for key in COLUMNS if key != 'autoattack' or key in measured]
  head = ['config', 'seeds']
  for key in keys:
    head += [COLUMNS[key]] + ['published'] * (key in PUBLISHED)
  table = [[*head, 'state']]
  for name, runs in groups.items():
    cells = [name, ', '.join(str(run.seed) for run in runs)]
    beside = published.find(runs[0].label) or {}
    for key in keys:
      cells.append(_cell(key, [run.measured.get(key) for run in runs]))
      if key in PUBLISHED:
        cells.append(f'{beside[key]:.2f}' if key in beside else '-')
    table.append([*cells, _progress(runs[0])])
  return table


def _cell(key: str, values: Sequence[float | None]) -> str:
  numbers = [value for value in values if value is not None]
  if not numbers:
    return '-'
  if key.startswith('seconds'):
    return f'{statistics.mean(numbers):.3g}'
  return comparison.mean_and_spread(numbers)


def _progress(run: records.Record) -> str:
  if run.state.kind == 'finished' or not run.config:
    return run.state.kind
  return f'{run.state.kind}, epoch {run.state.epochs}/{run.config["epochs"]}'


def notes(groups: dict[str, list[records.Record]]) -> list[str]:
  """What the reader must know beside the table, a line each."""
  found = []
  for name, runs in groups.items():
    if runs[0].state.error:
      found.append(f'{name}: {runs[0].state.error}')
    found += [f'{run.name}: {run.left_out}.' for run in runs if run.left_out]
    fields = records.changed(runs[0].label, runs[0].config)
    if fields:
      found.append(
          f'{name} differs from its config in '
          f'{", ".join(f"{key}={fields[key]!r}" for key in sorted(fields))}'
          + (': the published numbers are not for this.'
             if published.find(runs[0].label) else '.'))
  return found


def markdown(cells: Sequence[Sequence[str]]) -> str:
  """The same table for a README."""
  lines = [f'| {" | ".join(row)} |' for row in cells]
  return '\n'.join([lines[0], '|---' * len(cells[0]) + '|', *lines[1:]])


def as_json(groups: dict[str, list[records.Record]]) -> dict[str, Any]:
  """All of the table as plain values."""
  return {
      name: {
          'config': runs[0].label,
          'changed': records.changed(runs[0].label, runs[0].config),
          'published': published.find(runs[0].label),
          'runs': [
              {'name': run.name, 'seed': run.seed, **run.state._asdict(),
               'measured': run.measured} for run in runs]}
      for name, runs in groups.items()}


def write(workdir: pathlib.Path, listed: Sequence[str]) -> str:
  """Writes `table.md`, `table.json` and `table.png`.

  Args:
    workdir: with the runs.
    listed: names of runs that come first, in this order, also if they never
      started; all others in the folder follow.

  Returns:
    The table as text.
  """
  names = dict.fromkeys([*listed, *runner.find_runs(workdir)])
  groups = records.group([records.read(workdir, name) for name in names])
  cells, beside = rows(groups), notes(groups)
  atomic.write_text(workdir / 'table.md', '\n\n'.join(
      [markdown(cells), LEGEND, *beside]) + '\n')
  atomic.write_text(
      workdir / 'table.json', json.dumps(as_json(groups), indent=2) + '\n')
  shown = {
      name: lines for name, runs in groups.items()
      if (lines := records.mean_lines(runs))}
  if shown:
    curves.plot_comparison(shown, workdir / 'table.png')
  return '\n'.join([
      console.table(cells), '',
      *(textwrap.fill(text, 80) for text in (LEGEND, *beside))])


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Options, and the overrides for every run."""
  parser = console.Parser(__doc__)
  parser.add_argument(
      '--configs', type=str, help='their files, with commas between')
  parser.add_argument('--seeds', default='0', help='by default 0')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument(
      '--only_table', action='store_true', help='run nothing')
  options, rest = parser.parse_known_args(argv)
  for argument in rest:
    if not re.fullmatch(r'--config\.[\w.]+=.*', argument, re.DOTALL):
      parser.error(
          f'unknown argument {argument!r}; fields of all configs are changed '
          'by --config.NAME=VALUE.')
    if argument.startswith('--config.seed='):
      parser.error(f'{argument}: the seeds are those of --seeds=0,1,2.')
  if not options.configs and not options.only_table:
    parser.error('--configs names no config; --only_table needs none.')
  return options, rest


def main(
    argv: Sequence[str] | None = None,
    script: pathlib.Path = runner.MAIN) -> int:
  """Runs and prints.

  Args:
    argv: of the command.
    script: what runs one config.

  Returns:
    The exit code: 1 if a listed run failed.
  """
  options, overrides = _parse(argv)
  workdir = options.workdir.expanduser()
  try:
    listed = [
        jobs.Job(config, seed)
        for seed in jobs.parse_seeds(options.seeds)
        for config in jobs.parse_configs(options.configs)
    ] if options.configs else []
    if options.only_table and not listed and not runner.find_runs(workdir):
      raise UserError(f'{str(workdir)!r} holds no runs of a table.')
    names = [job.name for job in listed]
    stopped = None
    if not options.only_table:
      # The files are up to date while the next run is under way.
      stopped = runner.run_jobs(
          listed, workdir, overrides, script,
          after_each=lambda: write(workdir, names))
    workdir.mkdir(parents=True, exist_ok=True)
    print(f'\n{write(workdir, names)}')
  except (UserError, OSError) as error:
    console.complain(error)
    return 2
  print(f'\nthe same as table.md and table.json, and curves: {workdir}')
  if stopped:
    print(f'{stopped}: the same command goes on from there.')
  return int(any(
      runner.state_of(workdir, name).kind == 'failed' for name in names))


if __name__ == '__main__':
  sys.exit(main())
