"""Runs configs and seeds one after another, each in a process of its own.

Beside a run's folder `cifar10_awp+L2-seed0` lies `cifar10_awp+L2-seed0.stderr`:
what the process had to complain of, and its exit code if it failed. The process
keeps that file locked while it lives, so that two sweeps never work on the same
run.
"""

import ast
from collections.abc import Callable, Sequence
import fcntl
import json
import pathlib
import re
import signal
import subprocess
import sys
from typing import IO, Any, NamedTuple

from experiments.runs import metrics, workdirs
from experiments.sweeps.jobs import Job, parse_name
from experiments.util.errors import UserError

MAIN = pathlib.Path(__file__).resolve().parents[1] / 'main.py'

_EXIT = re.compile(r'exit code (-?[0-9]+)')


class State(NamedTuple):
  """How far a run is.

  Attributes:
    kind: 'finished', 'running', 'failed', 'stopped' or 'not started'.
    epochs: that are behind it.
    error: what it failed of, in one line; else empty.
  """

  kind: str
  epochs: int
  error: str = ''


def check_overrides(
    jobs: Sequence[Job], workdir: pathlib.Path, overrides: Sequence[str]
) -> None:
  """Raises UserError for a run that is there already with other values.

  A run that is not finished refuses them itself; a finished one would stand for
  what it is not.
  """
  for job in jobs:
    stored = read_config(workdir / job.name)
    for override in overrides:
      name, _, value = override.removeprefix('--config.').partition('=')
      if name in workdirs.FREE_FIELDS or name.startswith(workdirs.FREE_GROUPS):
        continue
      if name in stored and not _is_same(stored[name], value):
        raise UserError(
            f'{override}: {str(workdir / job.name)!r} holds a run with '
            f'{name}={stored[name]!r}; choose another --workdir.')


def _is_same(stored: Any, text: str) -> bool:
  """Whether a flag's text stands for a value as JSON has it."""
  if str(stored).lower() == text.lower():
    return True
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return False
  return stored == (list(value) if isinstance(value, tuple) else value)


class _Stop:
  """Hands every signal to end on to the run under way, as a SIGTERM.

  The run is in a session of its own, so that a Ctrl-C reaches it once, through
  here: at the first it saves and leaves, at the second it just leaves.
  """

  def __init__(self) -> None:
    self.name: str | None = None
    self.process: subprocess.Popen | None = None
    self._old: dict[Any, Any] = {}

  def __enter__(self) -> '_Stop':
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
        self._old[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self.name = signal.Signals(number).name
    if self.process is not None:
      self.process.terminate()

  def wait(self, process: subprocess.Popen) -> int:
    """The exit code of a process that was just started."""
    self.process = process
    if self.name:  # the signal came before there was anyone to tell
      process.terminate()
    code = process.wait()
    self.process = None
    return code

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


def _locked(file: IO[str], kind: int) -> bool:
  """Locks a file; False if another process holds it."""
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    pass
  return True


def _run_one(
    job: Job, workdir: pathlib.Path, overrides: Sequence[str],
    main: pathlib.Path, stop: _Stop) -> None:
  """Runs a job to its end unless it is there already, or someone else's."""
  folder = workdir / job.name
  with (workdir / f'{job.name}.stderr').open('a') as stderr:
    if not _locked(stderr, fcntl.LOCK_EX):
      print(f'{job.name}: another process is at it', flush=True)
      return
    if (folder / 'summary.json').exists():
      print(f'{job.name}: finished before', flush=True)
      return
    print(f'{job.name}: starting', flush=True)
    stderr.truncate(0)
    # With its stderr the child inherits the lock, and keeps it should this
    # process be killed.
    code = stop.wait(subprocess.Popen(
        [sys.executable, str(main), f'--config={job.config}',
         f'--workdir={folder}', f'--config.seed={job.seed}', *overrides],
        stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True))
    if code and not stop.name:
      stderr.write(f'\nexit code {code}\n')
  if not stop.name:
    state = state_of(workdir, job.name)
    print(f'{job.name}: {state.error or state.kind}', flush=True)


def run_jobs(
    jobs: Sequence[Job], workdir: pathlib.Path, overrides: Sequence[str] = (),
    main: pathlib.Path = MAIN, after_each: Callable[[], object] | None = None
) -> str | None:
  """Runs what is not finished; one that fails does not keep the others.

  Args:
    jobs: in their order.
    workdir: where their folders are; made if it is not there.
    overrides: more arguments of every run, such as '--config.epochs=2'.
    main: the script to run.
    after_each: called when a run has ended.

  Returns:
    The name of the signal that ended this early, or None. The same call goes on
    from there.

  Raises:
    UserError: if a run is there already with other values than `overrides`.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  check_overrides(jobs, workdir, overrides)
  with _Stop() as stop:
    for job in jobs:
      if stop.name is None:
        _run_one(job, workdir, overrides, main, stop)
        if after_each:
          after_each()
  return stop.name


def state_of(workdir: pathlib.Path, name: str) -> State:
  """How far the run of that name is."""
  folder, path = workdir / name, workdir / f'{name}.stderr'
  lines = metrics.read_metrics(folder)
  epochs = lines[-1]['epoch'] if lines else 0
  if (folder / 'summary.json').exists():
    return State('finished', epochs)
  if not path.exists():
    return State('stopped' if folder.exists() else 'not started', epochs)
  with path.open(errors='replace') as file:
    if not _locked(file, fcntl.LOCK_SH):
      return State('running', epochs)
    said = [line.strip() for line in file if line.strip()]
  match = _EXIT.fullmatch(said[-1]) if said else None
  if match is None:
    return State('stopped', epochs)
  return State('failed', epochs, f'failed: {_reason(said[:-1], int(match[1]))}')


def _reason(said: list[str], code: int) -> str:
  """The last error of a process, else its last line, else its exit code."""
  errors = [line for line in said if line.startswith('error:')]
  if errors or (said and code > 0):
    return (errors or said)[-1]
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return f'exit code {code}, without a word'


def find_runs(workdir: pathlib.Path) -> list[str]:
  """Names of all runs that a folder holds or has held, in order."""
  if not workdir.is_dir():
    return []
  names = {
      path.name.removesuffix('.stderr') for path in workdir.iterdir()
      if path.is_dir() or path.suffix == '.stderr'}
  return sorted(name for name in names if parse_name(name))


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The fields of a run's config by their dotted names; none if it has none."""
  path = folder / 'config.json'
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise UserError(f'{path} is not the config of a run: {error}.') from error
