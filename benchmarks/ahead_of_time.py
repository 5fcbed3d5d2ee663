"""Compiles every config for TPUs and GPUs that are not there; writes a table.

  python benchmarks/ahead_of_time.py --targets h100:8 v5e:2x2
  python benchmarks/ahead_of_time.py --only_table

Each config is compiled by `main.py --mode=compile` in its own process. The
record of each goes to docs/results/ahead_of_time.jsonl, one a line, and
configs that have one are not compiled again: the command can be stopped and
restarted. It needs the extra `awp_jax[aot]`.
"""

import argparse
import datetime
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Any
import zipfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONFIGS = ROOT / 'experiments' / 'configs'
RESULTS = ROOT / 'docs' / 'results'

#: Not configs by themselves.
_PARTS = ('__init__', 'base', 'parts')
#: Number of extra images in the papers, by the start of the config's name.
_EXTRA = {'cifar10_rst': 500_000, 'cifar10_strong_extra': 1_000_000}
#: The batches of digits do not divide among eight devices.
_DIGITS = ('--config.batch_size=48', '--config.eval.batch_size=96')

HEAD = '''# Compiled ahead of time

{date}, {machine}, no accelerator; {versions}.

    python benchmarks/ahead_of_time.py --targets {targets}

compiles the training step and the evaluation of each config for chips that are
not there, by the production compilers ([scaling](../scaling.md)). Memory,
all-reduces, operations and bytes are those of a training step on each device.
"reused": donated arrays whose memory the step takes over. The times of a step,
an epoch of training and a whole run with its evaluations are roofline estimates
with the assumptions that `--mode=compile` prints. They were not measured.
'''

COLUMNS = (
    'config', 'images per device', 'fits', 'arguments', 'temporaries',
    'all-reduces', 'in loops', 'MB', 'reused', 'G operations', 'GB moved',
    'step, ms', 'epoch, s', 'run, h', 'compiling, s')


def names() -> list[str]:
  """The configs that are made for accelerators, and two variants of one."""
  found = sorted(path.stem for path in CONFIGS.glob('*.py')
                 if path.stem not in _PARTS and 'small' not in path.stem)
  return [*found, 'cifar10_awp:L2', 'cifar10_awp:WRN-34-10']


def flags(name: str, folder: pathlib.Path) -> list[str]:
  """Flags of a config besides its name.

  Args:
    name: the config.
    folder: where files that state the number of extra images are written.

  Returns:
    Flags of `main.py`.
  """
  if name.startswith('digits'):
    return list(_DIGITS)
  numbers = [number for start, number in _EXTRA.items()
             if name.partition(':')[0].startswith(start)]
  if not numbers:
    return []
  path = folder / f'extra_{max(numbers)}.npz'
  if not path.exists():
    write_header(path, max(numbers))
  return [f'--config.extra.path={path}']


def write_header(path: pathlib.Path, number: int) -> None:
  """Writes an .npz without data: only its headers are read."""
  with zipfile.ZipFile(path, 'w') as archive:
    with archive.open('image.npy', 'w') as member:
      np.lib.format.write_array_header_1_0(member, {
          'descr': '|u1', 'fortran_order': False,
          'shape': (number, 32, 32, 3)})


def measure(
    name: str, target: str, options: list[str], folder: pathlib.Path
) -> dict[str, Any]:
  """Compiles one config for one target.

  Args:
    name: the config.
    target: as for `--target`.
    options: further flags.
    folder: for temporary files.

  Returns:
    The record; with 'error' if the command failed.
  """
  path, _, argument = name.partition(':')
  config = f'{CONFIGS / path}.py' + (f':{argument}' if argument else '')
  done = subprocess.run(
      [sys.executable, str(ROOT / 'experiments' / 'main.py'), '--mode=compile',
       f'--target={target}', f'--config={config}', '--json', *options,
       *flags(name, folder)],
      capture_output=True, text=True, check=False)
  record = {'config': name, 'target': target, 'options': options,
            'date': str(datetime.date.today())}
  lines = [line for line in done.stdout.splitlines() if line.startswith('{')]
  if done.returncode or not lines:
    return record | {'error': done.stderr.strip().splitlines()[-1:] or [
        f'exit status {done.returncode}']}
  return json.loads(lines[-1]) | record


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records so far."""
  if not path.exists():
    return []
  records = map(json.loads, path.read_text().splitlines())
  return list({  # the last of each
      (record['config'], record['target'], *record['options']): record
      for record in records}.values())


def row(record: dict[str, Any]) -> list[str]:
  """The cells of a record under `COLUMNS`."""
  name = ' '.join([record['config'], *(
      option.removeprefix('--config.') for option in record['options'])])
  step = record['programs']['training step']
  memory = step['memory']
  cells = [
      name, str(step['images_per_device']),
      'yes' if all(part['fits'] for part in record['programs'].values())
      else '**no**',
      f'{memory["arguments"] / 1e6:.0f} MB',
      f'{memory["temporaries"] / 1e6:.0f} MB']
  if 'seconds' not in step:
    return [*cells, *('-',) * 9, f'{step["compile_seconds"]:.0f}']
  found = step['collectives']
  times = [step['seconds'], record.get('epoch_seconds'),
           record.get('run_seconds')]
  scales = ((1e3, 2), (1, 1), (1 / 3600, 2))
  return [
      *cells, str(sum(part['times'] for part in found)),
      str(sum(part['times'] for part in found if part['in_loop'])),
      f'{sum(part["bytes"] * part["times"] for part in found) / 1e6:.1f}',
      f'{step["reused"]}/{step["donated"]}',
      f'{sum(step["flops"].values()) / 1e9:.1f}',
      f'{step["bytes_moved"] / 1e9:.2f}',
      *('-' if time is None else ' - '.join(
          f'{scale * bound:.{digits}f}' for bound in time)
        for time, (scale, digits) in zip(times, scales, strict=True)),
      f'{step["compile_seconds"]:.0f}']


def table(records: list[dict[str, Any]], machine: str) -> str:
  """The page.

  Args:
    records: at least one.
    machine: what compiled.

  Returns:
    Markdown.
  """
  targets = list(dict.fromkeys(record['target'] for record in records))
  dates = sorted({record['date'] for record in records})
  versions: dict[str, str] = {}
  for record in records:
    versions |= record.get('versions', {})
  lines = [HEAD.format(
      date=' and '.join(dates), machine=machine, targets=' '.join(targets),
      versions=', '.join(f'{k} {v}' for k, v in versions.items()))]
  for target in targets:
    of_target = [record for record in records if record['target'] == target]
    lines += [f'## {target}', '', f'| {" | ".join(COLUMNS)} |',
              f'|{"---|" * len(COLUMNS)}']
    lines += [f'| {" | ".join(row(record))} |' for record in of_target
              if 'error' not in record]
    lines.append('')
    for record in of_target:
      lines += [f'`{record["config"]}`: {record["error"][0]}', ''] if (
          record.get('error')) else []
      for name, part in record.get('programs', {}).items():
        if not part['fits']:
          lines += [f'The {name} of `{record["config"]}` fits with any of:', '',
                    *(f'* {remedy}' for remedy in part['remedies']), '']
  return '\n'.join(lines).rstrip() + '\n'


def main() -> None:
  """Compiles what has no record yet, then writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--targets', nargs='+', default=['h100:8', 'v5e:2x2'])
  parser.add_argument('--configs', nargs='+', default=names())
  parser.add_argument(
      '--options', default='', help='further flags of main.py, in one string')
  parser.add_argument('--only_table', action='store_true')
  parser.add_argument('--machine', default='two Intel Xeon cores, 24 GiB')
  parser.add_argument(
      '--records', type=pathlib.Path, default=RESULTS / 'ahead_of_time.jsonl')
  parser.add_argument(
      '--page', type=pathlib.Path, default=RESULTS / 'ahead_of_time.md')
  options = parser.parse_args()
  extra = shlex.split(options.options)
  done = {(record['config'], record['target'], *record['options'])
          for record in read(options.records) if 'error' not in record}
  with tempfile.TemporaryDirectory() as folder:
    for target in options.targets:
      for name in options.configs:
        if options.only_table or (name, target, *extra) in done:
          continue
        record = measure(name, target, extra, pathlib.Path(folder))
        print(name, target, *record.get('error', ['done']), flush=True)
        with options.records.open('a') as file:
          file.write(json.dumps(record) + '\n')
  if records := read(options.records):
    options.page.write_text(table(records, options.machine))


if __name__ == '__main__':
  main()
