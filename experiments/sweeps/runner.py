"""Runs the jobs of a sweep one after another, each in a separate process.

The stderr of the run in `cifar10_awp+L2-seed0/`, and its exit code if it
failed, go to `cifar10_awp+L2-seed0.stderr` next to that folder. The process
holds a lock on this file while it runs, so two sweeps never run the same job.
"""

from collections.abc import Callable, Sequence
import fcntl
import pathlib
import re
import signal
import subprocess
import sys
from typing import IO, Any, NamedTuple

from experiments.runs import metrics
from experiments.sweeps import flags as sweep_flags
from experiments.sweeps.jobs import Job, parse_name
from experiments.util import paths
from experiments.util.errors import UserError

MAIN = pathlib.Path(__file__).resolve().parents[1] / 'main.py'

_EXIT = re.compile(r'exit code (-?[0-9]+)')


class State(NamedTuple):
  """The state of a run.

  Attributes:
    kind: 'finished', 'running', 'failed', 'stopped' or 'not started'.
    epochs: number of finished epochs.
    error: why it failed, in one line; else empty.
  """

  kind: str
  epochs: int
  error: str = ''


class _Stop:
  """Forwards SIGTERM, SIGINT and SIGHUP to the current run, as SIGTERM.

  The run has its own session, so a Ctrl-C reaches it only once, through this
  class. At the first signal it saves and exits, at the second it exits.
  """

  def __init__(self) -> None:
    self.name: str | None = None
    self.process: subprocess.Popen | None = None
    self._old: dict[Any, Any] = {}

  def __enter__(self) -> '_Stop':
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:  # respects nohup
        self._old[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self.name = signal.Signals(number).name
    if self.process is not None:
      self.process.terminate()

  def wait(self, process: subprocess.Popen) -> int:
    """Waits for a new process and returns its exit code."""
    self.process = process
    if self.name:  # the signal came before the process started
      process.terminate()
    code = process.wait()
    self.process = None
    return code

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)


def _locked(file: IO[Any], kind: int) -> bool:
  """Locks a file; returns False if another process holds the lock."""
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # the file system has no locks
    pass
  return True


def _run_one(
    job: Job, workdir: paths.Path, overrides: Sequence[str],
    main: pathlib.Path, stop: _Stop) -> None:
  """Runs a job unless it is finished or another process runs it."""
  folder = workdir / job.name
  with (workdir / f'{job.name}.stderr').open('a') as stderr:
    if not _locked(stderr, fcntl.LOCK_EX):
      print(f'{job.name}: running in another process', flush=True)
      return
    if (folder / 'summary.json').exists():
      print(f'{job.name}: already finished', flush=True)
      return
    print(f'{job.name}: starting', flush=True)
    stderr.truncate(0)
    # The child inherits the lock with its stderr, and keeps it if this process
    # is killed.
    code = stop.wait(subprocess.Popen(
        [sys.executable, str(main), f'--config={job.config}',
         f'--workdir={folder}', f'--config.seed={job.seed}', *overrides,
         *sweep_flags.flags_of(job.varied)],
        stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True))
    if code and not stop.name:
      stderr.write(f'\nexit code {code}\n')
  if not stop.name:
    state = state_of(workdir, job.name)
    print(f'{job.name}: {state.error or state.kind}', flush=True)


def run_jobs(
    jobs: Sequence[Job], workdir: paths.Path, overrides: Sequence[str] = (),
    main: pathlib.Path = MAIN, after_each: Callable[[], object] | None = None
) -> str | None:
  """Runs all unfinished jobs; continues after failures.

  Args:
    jobs: to run, in this order.
    workdir: parent of their folders; created if missing.
    overrides: further arguments of every run, such as '--config.epochs=2'.
    main: the script to run.
    after_each: called after each job.

  Returns:
    The name of the signal that stopped the sweep, or None. The same call
    resumes it.

  Raises:
    UserError: if a run already exists with other values than `overrides`, or
      if the folder is in a bucket.
  """
  if paths.is_bucket(workdir):
    raise UserError(
        f'{workdir} is in a bucket, which has no locks for the runs of a '
        'table: start each with main.py, in a folder there called '
        f'{jobs[0].name} and so on, and make the table with --only_table.')
  workdir.mkdir(parents=True, exist_ok=True)
  sweep_flags.check_overrides(jobs, workdir, overrides)
  with _Stop() as stop:
    for job in jobs:
      if stop.name is None:
        _run_one(job, workdir, overrides, main, stop)
        if after_each:
          after_each()
  return stop.name


def state_of(workdir: paths.Path, name: str) -> State:
  """The state of the run of that name."""
  folder, path = workdir / name, workdir / f'{name}.stderr'
  lines = metrics.read_metrics(folder)
  epochs = lines[-1]['epoch'] if lines else 0
  if (folder / 'summary.json').exists():
    return State('finished', epochs)
  if not path.exists():
    return State('stopped' if folder.exists() else 'not started', epochs)
  with path.open('rb') as file:
    if not paths.is_bucket(path) and not _locked(file, fcntl.LOCK_SH):
      return State('running', epochs)
    text = file.read().decode(errors='replace')
  output = [line.strip() for line in text.splitlines() if line.strip()]
  match = _EXIT.fullmatch(output[-1]) if output else None
  if match is None:
    return State('stopped', epochs)
  reason = _reason(output[:-1], int(match[1]))
  return State('failed', epochs, f'failed: {reason}')


def _reason(output: list[str], code: int) -> str:
  """The last error in a stderr, else its last line, else the exit code."""
  errors = [line for line in output if line.startswith('error:')]
  if errors or (output and code > 0):
    return (errors or output)[-1]
  if code < 0:
    return f'killed by {signal.Signals(-code).name}'
  return f'exit code {code}, no output'


def find_runs(workdir: paths.Path) -> list[str]:
  """Names of all runs that were started in a folder, sorted."""
  if not workdir.is_dir():
    return []
  names = {
      path.name.removesuffix('.stderr') for path in workdir.iterdir()
      if path.is_dir() or path.suffix == '.stderr'}
  return sorted(name for name in names if parse_name(name))
