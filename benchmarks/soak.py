"""Kills, stops and damages real runs at random moments, and counts outcomes.

  python benchmarks/soak.py                # all of it, about an hour
  python benchmarks/soak.py --parts=damage --count=20

Every command is `experiments/main.py` or `table.py` in a process of its own, on
a small setting of the embedded digits. An interrupted command is started again
until it ends. What it then leaves is compared with what an uninterrupted one
left: arrays and metrics bit by bit, without times. The counts go to
docs/results/reliability.json, a part at a time.

  kill      SIGKILL, during training, evaluation, landscape and tables
  stop      SIGTERM and SIGINT, during training and evaluation
  damage    a file of a stopped run is cut off, emptied, removed or changed
"""

import argparse
import collections
from collections.abc import Callable, Sequence
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple, TypeAlias

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from experiments.runs import metrics, reading
from experiments.util import atomic, environment

RESULTS = ROOT / 'docs' / 'results' / 'reliability.json'
CONFIG = f'--config={ROOT}/experiments/configs/digits_awp.py'

#: Four steps per epoch, 24 in all; saved at every third.
TINY = tuple(f'--config.{field}' for field in (
    'model.depth=10', 'model.width=1',
    'num_train=64', 'num_test=32', 'batch_size=16', 'epochs=6',
    'attack.num_steps=2', 'eval.num_steps=2', 'eval.batch_size=32',
    'eval.num_train=32', 'eval.every_epochs=1', 'log_every_steps=2',
    'checkpoint_every_steps=3', 'awp.warmup_epochs=1'))
EVALUATION = (
    '--mode=evaluate', '--config.evaluation.batch_size=8',
    "--config.evaluation.attacks=('pgd-10', 'apgd-ce', 'apgd-t')")
LANDSCAPE = (
    '--mode=landscape', '--config.landscape.points=5',
    '--config.landscape.plane_points=3', '--config.landscape.num_steps=2',
    '--config.landscape.num_train=32', '--config.landscape.num_test=32')
MODES = {'train': TINY, 'evaluate': EVALUATION, 'landscape': LANDSCAPE}

#: A stop may take this long: a step, a write and the end of the process.
SECONDS_TO_STOP = 10

#: How often a command is started again before it counts as stuck.
_MOST_STARTS = 200


class Outcome(Exception):
  """A command did not end as it must."""


class Commands:
  """Starts the commands in a folder, with a compilation cache of its own."""

  def __init__(self, folder: pathlib.Path) -> None:
    """Sets the folder of all workdirs."""
    self.folder = folder
    self._environment = os.environ | {
        'PYTHONUNBUFFERED': '1', 'JAX_PLATFORMS': 'cpu',
        # Compiling takes most of the time of so small a run.
        'XLA_FLAGS': '--xla_backend_optimization_level=0',
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

  def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Starts a script of experiments/."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'experiments' / script), *arguments],
        cwd=self.folder, env=self._environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def mode(self, name: str, workdir: pathlib.Path) -> list[str]:
    """The arguments of `main.py` for a mode on a workdir."""
    config = [CONFIG] if name == 'train' else []
    return [*config, *MODES[name], f'--workdir={workdir}']

  def finish(self, script: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a script to its end: exit status and both outputs."""
    process = self.start(script, *arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err

  def must(self, script: str, *arguments: str) -> str:
    """Runs a script that must succeed; returns its output."""
    code, out, err = self.finish(script, *arguments)
    if code or err.strip():
      raise Outcome(f'{script} ended with {code}: {err.strip()[-500:]}')
    return out


def without_times(value: Any) -> Any:
  """Plain values without what may differ between identical runs."""
  names = {*metrics.TIMING_FIELDS, 'seconds', 'seconds_per_example'}
  if isinstance(value, dict):
    return {name: without_times(part) for name, part in value.items()
            if name not in names}
  if isinstance(value, list):
    return [without_times(part) for part in value]
  return value


def end_of(folder: pathlib.Path) -> dict[str, Any]:
  """Everything a finished run leaves that must not depend on interruptions."""
  found: dict[str, Any] = {}
  for kind in reading.KINDS:
    stored = reading.Reader(folder, kind).read()
    found[f'step of {kind}'] = stored.step
    for path, leaf in jax.tree_util.tree_flatten_with_path(stored.tree)[0]:
      found[f'{kind} {jax.tree_util.keystr(path)}'] = np.asarray(leaf).tobytes()
  for name, number in (('metrics.jsonl', 'epoch'), ('steps.jsonl', 'step')):
    found[name] = without_times(metrics.read_lines(folder / name, number))
  for name in ('summary.json', 'evaluation.json', 'landscape.json'):
    if (folder / name).exists():
      found[name] = without_times(json.loads((folder / name).read_text()))
  return found


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
  """The first part in which two ends differ, or ''."""
  for name in sorted(found.keys() | wanted.keys()):
    if found.get(name) != wanted.get(name):
      return name
  return ''


def until_it_ends(
    commands: Commands, script: str, arguments: Sequence[str],
    interrupt: Callable[[subprocess.Popen[str]], bool]) -> None:
  """Starts a command, interrupts it, and starts it again until it ends.

  Args:
    commands: where.
    script: of experiments/.
    arguments: its arguments.
    interrupt: given the process; whether it interrupted it.

  Raises:
    Outcome: if it ended with an error, or never.
  """
  for _ in range(_MOST_STARTS):
    process = commands.start(script, *arguments)
    was_interrupted = interrupt(process)
    _, err = process.communicate(timeout=600)
    if not was_interrupted:
      if process.returncode:
        raise Outcome(f'ended with {process.returncode}: {err.strip()[-500:]}')
      return
    if 'Traceback' in err:
      raise Outcome(f'traceback after an interruption: {err.strip()[-500:]}')
  raise Outcome(f'did not end after {_MOST_STARTS} starts')


_Counts: TypeAlias = collections.Counter[str]


class _Task(NamedTuple):
  """A command that is interrupted.

  Attributes:
    script: of experiments/.
    arguments: its arguments.
    end: what it leaves.
    wanted: what it leaves without interruption.
  """

  script: str
  arguments: Sequence[str]
  end: Callable[[], dict[str, Any]]
  wanted: dict[str, Any]


class Soak:
  """The parts, each of which returns counts.

  Attributes:
    commands: starts processes.
    random: chooses moments, files and damages.
    seconds: script or mode -> time of an uninterrupted command.
  """

  def __init__(self, folder: pathlib.Path, seed: int) -> None:
    """Trains, evaluates and measures the run that others are compared with."""
    self.commands, self.random = Commands(folder), random.Random(seed)
    self.seconds: dict[str, float] = {}
    self._ends: dict[str, dict[str, Any]] = {}
    self.whole = folder / 'whole'
    for mode in MODES:
      for _ in range(2):  # the second time without compiling
        if mode == 'train':
          shutil.rmtree(self.whole, ignore_errors=True)
        else:
          self._forget(self.whole, mode)
        started = time.monotonic()
        self.commands.must('main.py', *self.commands.mode(mode, self.whole))
        self.seconds[mode] = time.monotonic() - started
      self._ends[mode] = end_of(self.whole)
      shutil.copytree(self.whole, folder / f'after-{mode}')

  @staticmethod
  def _forget(folder: pathlib.Path, mode: str) -> None:
    """Removes what a mode after training left."""
    name = {'evaluate': 'evaluation', 'landscape': 'landscape'}[mode]
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / f'{name}.json').unlink(missing_ok=True)

  def _prepare(self, mode: str) -> pathlib.Path:
    """A workdir in the state before a mode."""
    folder = self.commands.folder / 'current'
    shutil.rmtree(folder, ignore_errors=True)
    before = {'evaluate': 'train', 'landscape': 'evaluate'}.get(mode)
    if before:
      shutil.copytree(self.commands.folder / f'after-{before}', folder)
    return folder

  def _wait(self, process: subprocess.Popen[str], mode: str) -> bool:
    """Waits for a random moment; whether the process still runs then."""
    try:
      process.wait(self.random.uniform(0.5, 1.05 * self.seconds[mode]))
    except subprocess.TimeoutExpired:
      return True
    return False

  def _interrupt(
      self, what: str, count: int, mode: str, prepare: Callable[[], _Task],
      act: Callable[[subprocess.Popen[str], _Counts], None]) -> _Counts:
    """Interrupts a command at random moments and compares what it leaves.

    Args:
      what: name of the interruptions among the counts.
      count: how many of them.
      mode: of the command, for its usual time.
      prepare: makes a fresh workdir; the command, and what it leaves there.
      act: interrupts a process, and may count more.

    Returns:
      The counts.
    """

    def interrupt(process: subprocess.Popen[str]) -> bool:
      if counts[what] >= count or not self._wait(process, mode):
        return False
      counts[what] += 1
      act(process, counts)
      return True

    counts: _Counts = collections.Counter({what: 0})
    while counts[what] < count:
      task = prepare()
      try:
        until_it_ends(self.commands, task.script, task.arguments, interrupt)
        other = difference(task.end(), task.wanted)
      except Outcome as error:
        other = str(error)
      counts['ends'] += 1
      counts['identical ends'] += not other
      if other:
        print(f'{mode}: {other}', flush=True)
    return counts

  def _task(self, mode: str, without: Sequence[str] = ()) -> _Task:
    """A mode on a fresh workdir, compared without some of its files."""

    def end() -> dict[str, Any]:
      return end_of(folder) | {name: wanted[name] for name in without}

    folder, wanted = self._prepare(mode), self._ends[mode]
    return _Task('main.py', self.commands.mode(mode, folder), end, wanted)

  def kill(self, count: int, mode: str) -> _Counts:
    """SIGKILL at random moments of a mode."""
    return self._interrupt(
        'kills', count, mode, lambda: self._task(mode),
        lambda process, counts: process.kill())

  def table(self, count: int) -> _Counts:
    """SIGKILL at random moments of a sweep over two seeds."""
    folder = self.commands.folder / 'table'
    arguments = [
        f'--workdir={folder}', '--seeds=0,1', *TINY,
        f'--configs={ROOT}/experiments/configs/digits_awp.py']

    def end() -> dict[str, Any]:
      runs = sorted(path.parent for path in folder.glob('*/config.json'))
      return {run.name: end_of(run) for run in runs} | {
          'table': without_times(json.loads(
              (folder / 'table.json').read_text()))}

    def prepare() -> _Task:
      shutil.rmtree(folder)
      return _Task('table.py', arguments, end, wanted)

    def act(process: subprocess.Popen[str], counts: _Counts) -> None:
      # Like the out-of-memory killer: the sweep's process alone, or its run.
      victims = [process.pid, *children(process.pid)]
      victim = self.random.choice(victims)
      os.kill(victim, signal.SIGKILL)
      if victim != process.pid:
        process.wait(600)  # it lists the run as failed and goes on
      else:
        for child in victims[1:]:  # and nobody is left behind
          wait_for_end(child)

    started = time.monotonic()
    self.commands.must('table.py', *arguments)
    self.seconds['table'] = time.monotonic() - started
    wanted = end()
    return self._interrupt('kills', count, 'table', prepare, act)

  def stop(self, count: int, mode: str) -> _Counts:
    """SIGTERM and SIGINT at random moments; a second SIGINT every fourth."""
    slowest = [0.0]

    def act(process: subprocess.Popen[str], counts: _Counts) -> None:
      number = counts['signals'] - 1
      sent = signal.SIGTERM if number % 2 else signal.SIGINT
      started = time.monotonic()
      process.send_signal(sent)
      if number % 4 == 2:
        time.sleep(0.05)
        if process.poll() is None:
          process.send_signal(signal.SIGINT)
          counts['second signals'] += 1
      try:
        out, err = process.communicate(timeout=60)
      except subprocess.TimeoutExpired:
        process.kill()
        raise Outcome(f'{sent.name} did not end it within 60 s') from None
      seconds = time.monotonic() - started
      slowest[0] = max(slowest[0], seconds)
      counts['within ten seconds'] += seconds < SECONDS_TO_STOP
      counts['said how to go on'] += 'run the same command' in out
      counts['ended before'] += 'results' in out and 'command' not in out
      counts['tracebacks'] += 'Traceback' in err

    # A stop writes the line of the steps since the last one.
    counts = self._interrupt(
        'signals', count, mode,
        lambda: self._task(mode, without=['steps.jsonl']), act)
    counts['slowest, ms'] = round(1000 * slowest[0])
    return counts

  def damage(self, count: int) -> _Counts:
    """Damages a random file of a stopped run, and trains on."""
    stopped = self.commands.folder / 'stopped'
    shutil.rmtree(stopped, ignore_errors=True)
    arguments = self.commands.mode('train', stopped)
    process = self.commands.start('main.py', *arguments)
    while len(steps := list((stopped / 'checkpoints/last').glob(
        '[0-9]*[0-9]'))) < 2 or max(int(path.name) for path in steps) < 14:
      time.sleep(0.01)
    process.terminate()
    process.communicate(timeout=60)
    files = sorted(
        path.relative_to(stopped) for path in stopped.rglob('*')
        if path.is_file() and path.name != '.lock')
    folder = self.commands.folder / 'current'
    counts: _Counts = collections.Counter()
    for _ in range(count):
      shutil.rmtree(folder, ignore_errors=True)
      shutil.copytree(stopped, folder)
      name = self.random.choice(files)
      kind = damaged(folder / name, self.random)
      counts['of checkpoints'] += 'checkpoints' in name.parts
      code, out, err = self.commands.finish(
          'main.py', *self.commands.mode('train', folder))
      outcome = self._judge(code, out, err, folder)
      counts[outcome] += 1
      if outcome not in _GOOD:
        print(f'{kind} {name}: {outcome}: {err[-300:]!r}', flush=True)
    return counts

  def _judge(
      self, code: int, out: str, err: str, folder: pathlib.Path) -> str:
    if 'Traceback' in err:
      return 'traceback'
    if code:
      return 'one error' if re.fullmatch(r'error: [^\n]+\n', err) else (
          'several lines')
    other = difference(end_of(folder), self._ends['train'])
    if other:
      said = 'best epoch is chosen' in out or 'jsonl was damaged' in out
      return 'said, other end' if said else f'another end, in {other}'
    return 'same end'


#: Outcomes of damages that keep the promise.
_GOOD = ('same end', 'one error', 'said, other end')


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


def children(parent: int) -> list[int]:
  """The processes that a process started."""
  found = []
  for task in pathlib.Path(f'/proc/{parent}/task').glob('*/children'):
    found += [int(word) for word in task.read_text().split()]
  return found


def wait_for_end(process: int) -> None:
  """Kills a process that its parent left, and waits for its end."""
  try:
    os.kill(process, signal.SIGKILL)
    while pathlib.Path(f'/proc/{process}/stat').read_text().split()[2] != 'Z':
      time.sleep(0.01)
  except (FileNotFoundError, ProcessLookupError):
    pass


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the chosen parts and stores their counts."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parts: dict[str, tuple[int, Callable[[Soak, int], Any]]] = {
      'kill training': (50, lambda soak, n: soak.kill(n, 'train')),
      'kill evaluation': (20, lambda soak, n: soak.kill(n, 'evaluate')),
      'kill landscape': (20, lambda soak, n: soak.kill(n, 'landscape')),
      'kill table': (20, lambda soak, n: soak.table(n)),
      'stop training': (20, lambda soak, n: soak.stop(n, 'train')),
      'stop evaluation': (20, lambda soak, n: soak.stop(n, 'evaluate')),
      'damage': (200, lambda soak, n: soak.damage(n))}
  parser.add_argument(
      '--parts', default='', help='only parts whose name contains this')
  parser.add_argument('--count', type=int, help='of each; default: its own')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  options = parser.parse_args(argv)
  chosen = {name: part for name, part in parts.items() if options.parts in name}
  if not chosen:
    parser.error(f'--parts={options.parts}: none of {", ".join(parts)}')
  with tempfile.TemporaryDirectory(prefix='awp_jax_soak_') as folder:
    soak = Soak(pathlib.Path(folder), options.seed)
    print('seconds without interruption:', soak.seconds, flush=True)
    for name, (count, run) in chosen.items():
      started = time.monotonic()
      counts = dict(run(soak, options.count or count))
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
