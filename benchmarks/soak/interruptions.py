"""SIGKILL, SIGTERM and SIGINT at random moments."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time
from typing import Any

from benchmarks.soak import commands
from benchmarks.soak.commands import Counts, Outcome, end_of
from benchmarks.soak.reference import Reference, Task


def kill(reference: Reference, count: int, mode: str) -> Counts:
  """SIGKILL at random moments of a mode."""
  return reference.interrupted(
      'kills', count, mode, lambda: reference.task(mode),
      lambda process, counts: process.kill())


def table(reference: Reference, count: int) -> Counts:
  """SIGKILL at random moments of a sweep over two seeds."""
  folder = reference.commands.folder / 'table'
  arguments = [
      f'--workdir={folder}', '--seeds=0,1', *commands.TINY,
      f'--configs={commands.ROOT}/experiments/configs/digits_awp.py']

  def end() -> dict[str, Any]:
    runs = sorted(path.parent for path in folder.glob('*/config.json'))
    return {run.name: end_of(run) for run in runs} | {
        'table': commands.without_times(json.loads(
            (folder / 'table.json').read_text()))}

  def prepare() -> Task:
    shutil.rmtree(folder)
    return Task('table.py', arguments, end, wanted)

  def act(process: subprocess.Popen[str], counts: Counts) -> None:
    # Like the out-of-memory killer: the sweep's process alone, or its run.
    victims = [process.pid, *_children(process.pid)]
    victim = reference.random.choice(victims)
    os.kill(victim, signal.SIGKILL)
    if victim != process.pid:
      process.wait(600)  # it lists the run as failed and goes on
    else:
      for child in victims[1:]:  # and nobody is left behind
        _wait_for_end(child)

  started = time.monotonic()
  reference.commands.must('table.py', *arguments)
  reference.seconds['table'] = time.monotonic() - started
  wanted = end()
  return reference.interrupted('kills', count, 'table', prepare, act)


def stop(reference: Reference, count: int, mode: str) -> Counts:
  """SIGTERM and SIGINT at random moments; a second SIGINT every fourth."""
  slowest = [0.0]

  def act(process: subprocess.Popen[str], counts: Counts) -> None:
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
    counts['within ten seconds'] += seconds < commands.SECONDS_TO_STOP
    counts['said how to go on'] += 'run the same command' in out
    counts['ended before'] += 'results' in out and 'command' not in out
    counts['tracebacks'] += 'Traceback' in err

  # A stop writes the line of the steps since the last one.
  counts = reference.interrupted(
      'signals', count, mode,
      lambda: reference.task(mode, without=['steps.jsonl']), act)
  counts['slowest, ms'] = round(1000 * slowest[0])
  return counts


def _children(parent: int) -> list[int]:
  """The processes that a process started."""
  found = []
  for task in pathlib.Path(f'/proc/{parent}/task').glob('*/children'):
    found += [int(word) for word in task.read_text().split()]
  return found


def _wait_for_end(process: int) -> None:
  """Kills a process that its parent left, and waits for its end."""
  try:
    os.kill(process, signal.SIGKILL)
    while pathlib.Path(f'/proc/{process}/stat').read_text().split()[2] != 'Z':
      time.sleep(0.01)
  except (FileNotFoundError, ProcessLookupError):
    pass
