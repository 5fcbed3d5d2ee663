"""A file of a stopped run is cut off, emptied, removed or changed."""

import collections
import pathlib
import random
import re
import shutil
import time

from benchmarks.soak.commands import Counts, differences, end_of
from benchmarks.soak.reference import Reference

#: Outcomes of damages that keep the promise.
GOOD = ('same end', 'one error', 'said, other end')

#: What a run says that it lost -> the parts of its end that may then differ.
_SAID = {
    'metrics.jsonl was damaged': ('metrics.jsonl', 'summary.json', 'best',
                                  'step of best'),
    'best epoch is chosen': ('metrics.jsonl', 'summary.json', 'best',
                             'step of best'),
    'steps.jsonl was damaged': ('steps.jsonl',)}


def damaged(path: pathlib.Path, chooser: random.Random) -> str:
  """Damages a file; returns how."""
  data = path.read_bytes()
  kind = chooser.choice(('cut off', 'emptied', 'removed', 'changed'))
  if kind == 'removed':
    path.unlink()
  elif kind == 'emptied' or not data:
    path.write_bytes(b'')
  elif kind == 'cut off':
    path.write_bytes(data[:chooser.randrange(len(data))])
  else:
    changed = bytearray(data)
    changed[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
    path.write_bytes(changed)
  return kind


def judged(
    reference: Reference, code: int, out: str, err: str, folder: pathlib.Path
) -> str:
  """The outcome of a training command, in a word or two."""
  if 'Traceback' in err:
    return 'traceback'
  if code:
    return 'one error' if re.fullmatch(r'error: [^\n]+\n', err) else (
        'several lines')
  try:
    other = differences(end_of(folder), reference.ends['train'])
  except (OSError, ValueError) as error:
    return f'ended with {error}'
  excused = tuple(part for words, parts in _SAID.items() if words in out
                  for part in parts)
  if unsaid := [name for name in other if not name.startswith(excused)]:
    return f'another end, in {", ".join(unsaid)[:200]}'
  return 'said, other end' if other else 'same end'


def damage(reference: Reference, count: int) -> Counts:
  """Damages a random file of a stopped run, and trains on."""
  stopped = reference.commands.folder / 'stopped'
  shutil.rmtree(stopped, ignore_errors=True)
  arguments = reference.commands.mode('train', stopped)
  process = reference.commands.start('main.py', *arguments)
  while len(steps := list((stopped / 'checkpoints/last').glob(
      '[0-9]*[0-9]'))) < 2 or max(int(path.name) for path in steps) < 14:
    time.sleep(0.01)
  process.terminate()
  process.communicate(timeout=60)
  files = sorted(
      path.relative_to(stopped) for path in stopped.rglob('*')
      if path.is_file() and path.name != '.lock')
  folder = reference.commands.folder / 'current'
  counts: Counts = collections.Counter()
  for _ in range(count):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stopped, folder)
    name = reference.random.choice(files)
    kind = damaged(folder / name, reference.random)
    counts['of checkpoints'] += 'checkpoints' in name.parts
    code, out, err = reference.commands.finish(
        'main.py', *reference.commands.mode('train', folder))
    outcome = judged(reference, code, out, err, folder)
    counts[outcome] += 1
    if outcome not in GOOD:
      print(f'{kind} {name}: {outcome}: {err[-300:]!r}', flush=True)
  return counts
