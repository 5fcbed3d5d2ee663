"""Runs the chosen parts: `python -m benchmarks.soak`."""

import argparse
from collections.abc import Callable, Sequence
import functools
import json
import pathlib
import platform
import tempfile
import time
from typing import Any

import benchmarks.soak
from benchmarks.soak import commands, damage, interruptions, long_run, storage
from benchmarks.soak.reference import Reference
from experiments.util import atomic, environment

RESULTS = commands.ROOT / 'docs' / 'results' / 'reliability.json'

#: Name -> how often, what, and the last mode of `main.py` that it needs.
PARTS: dict[str, tuple[int, Callable[[Reference, int], Any], str]] = {
    **{f'kill {name}': (
        count, functools.partial(interruptions.kill, mode=mode), mode)
       for name, count, mode in (
           ('training', 50, 'train'), ('evaluation', 20, 'evaluate'),
           ('landscape', 20, 'landscape'))},
    'kill table': (20, interruptions.table, 'train'),
    **{f'stop {name}': (
        20, functools.partial(interruptions.stop, mode=mode), mode)
       for name, mode in (('training', 'train'), ('evaluation', 'evaluate'))},
    'damage': (200, damage.damage, 'train'),
    'storage': (60, storage.storage, 'train'),
    'long run': (5000, long_run.long_run, 'train')}


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the chosen parts and stores their counts."""
  parser = argparse.ArgumentParser(
      description=(benchmarks.soak.__doc__ or '').split('\n')[0])
  parser.add_argument(
      '--parts', default='', help='only parts whose name contains this')
  parser.add_argument('--count', type=int, help='of each; default: its own')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  options = parser.parse_args(argv)
  chosen = {name: part for name, part in PARTS.items() if options.parts in name}
  if not chosen:
    parser.error(f'--parts={options.parts}: none of {", ".join(PARTS)}')
  with tempfile.TemporaryDirectory(prefix='awp_jax_soak_') as folder:
    last = max((mode for _, _, mode in chosen.values()),
               key=list(commands.MODES).index)
    reference = Reference(pathlib.Path(folder), options.seed, last)
    print('seconds without interruption:', reference.seconds, flush=True)
    for name, (count, run, _) in chosen.items():
      started = time.monotonic()
      counts = dict(run(reference, options.count or count))
      print(f'{name}: {counts}', flush=True)
      stored = json.loads(options.results.read_text()) if (
          options.results.exists()) else {}
      stored[name] = counts | {
          'minutes': round((time.monotonic() - started) / 60, 1),
          'date': time.strftime('%Y-%m-%d'),
          'python': platform.python_version(),
          'versions': environment.versions(), 'seed': options.seed}
      atomic.write_json(options.results, stored)


if __name__ == '__main__':
  main()
