"""The uninterrupted run, and how its commands are interrupted and compared."""

import collections
from collections.abc import Callable, Sequence
import pathlib
import random
import shutil
import subprocess
import time
from typing import Any, NamedTuple

from benchmarks.soak import commands as commands_lib
from benchmarks.soak.commands import Counts, Outcome


class Task(NamedTuple):
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


class Reference:
  """An uninterrupted run, and copies of it to interrupt.

  Attributes:
    commands: starts processes.
    random: chooses moments, files and damages.
    seconds: script or mode -> time of an uninterrupted command.
    ends: mode -> what an uninterrupted command leaves.
    whole: workdir of the uninterrupted run.
  """

  def __init__(self, folder: pathlib.Path, seed: int, last: str) -> None:
    """Makes the run that others are compared with.

    Args:
      folder: of all workdirs.
      seed: of the random choices.
      last: the last of the modes that are needed; each needs those before it.
    """
    self.commands = commands_lib.Commands(folder)
    self.random = random.Random(seed)
    self.seconds: dict[str, float] = {}
    self.ends: dict[str, dict[str, Any]] = {}
    self.whole = folder / 'whole'
    for mode in commands_lib.MODES:
      for _ in range(2):  # the second time without compiling
        if mode == 'train':
          shutil.rmtree(self.whole, ignore_errors=True)
        else:
          self._forget(self.whole, mode)
        started = time.monotonic()
        self.commands.must('main.py', *self.commands.mode(mode, self.whole))
        self.seconds[mode] = time.monotonic() - started
      self.ends[mode] = commands_lib.end_of(self.whole)
      shutil.copytree(self.whole, folder / f'after-{mode}')
      if mode == last:
        break

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

  def wait(self, process: subprocess.Popen[str], mode: str) -> bool:
    """Waits for a random moment; whether the process still runs then."""
    try:
      process.wait(self.random.uniform(0.5, 1.05 * self.seconds[mode]))
    except subprocess.TimeoutExpired:
      return True
    return False

  def interrupted(
      self, what: str, count: int, mode: str, prepare: Callable[[], Task],
      act: Callable[[subprocess.Popen[str], Counts], None]) -> Counts:
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
      if counts[what] >= count or not self.wait(process, mode):
        return False
      counts[what] += 1
      act(process, counts)
      return True

    counts: Counts = collections.Counter({what: 0})
    while counts[what] < count:
      task = prepare()
      try:
        commands_lib.until_it_ends(
            self.commands, task.script, task.arguments, interrupt)
        other = ', '.join(commands_lib.differences(task.end(), task.wanted))
      except Outcome as error:
        other = str(error)
      counts['ends'] += 1
      counts['identical ends'] += not other
      if other:
        print(f'{mode}: {other}', flush=True)
    return counts

  def task(self, mode: str, without: Sequence[str] = ()) -> Task:
    """A mode on a fresh workdir, compared without some of its files."""

    def end() -> dict[str, Any]:
      return commands_lib.end_of(folder) | {
          name: wanted[name] for name in without}

    folder, wanted = self._prepare(mode), self.ends[mode]
    return Task('main.py', self.commands.mode(mode, folder), end, wanted)
