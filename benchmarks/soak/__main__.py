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

#: Name -> how often, and what.
PARTS: dict[str, tuple[int, Callable[[Reference, int], Any]]] = {
    'kill training': (50, functools.partial(interruptions.kill, mode='train')),
    'kill evaluation': (
        20, functools.partial(interruptions.kill, mode='evaluate')),
    'kill landscape': (
        20, functools.partial(interruptions.kill, mode='landscape')),
    'kill table': (20, interruptions.table),
    'stop training': (20, functools.partial(interruptions.stop, mode='train')),
    'stop evaluation': (
        20, functools.partial(interruptions.stop, mode='evaluate')),
    'damage': (200, damage.damage),
    'storage': (60, storage.storage),
    'long run': (5000, long_run.long_run)}


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
    reference = Reference(pathlib.Path(folder), options.seed)
    print('seconds without interruption:', reference.seconds, flush=True)
    for name, (count, run) in chosen.items():
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
