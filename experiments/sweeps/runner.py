"""Runs the jobs of a sweep one after another, each in a separate process.

The stderr of the run in `cifar10_awp+L2-seed0/`, and its exit code if it
failed, go to `cifar10_awp+L2-seed0.stderr` next to that folder. The process
holds a lock on this file while it runs, so two sweeps never run the same job.
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

from absl import flags
from ml_collections.config_flags import tuple_parser

from experiments.config import schema
from experiments.configs import base
from experiments.runs import metrics, workdirs
from experiments.sweeps.jobs import Job, Varied, parse_name
from experiments.util import paths
from experiments.util.errors import UserError

MAIN = pathlib.Path(__file__).resolve().parents[1] / 'main.py'

#: How main.py reads a field, by the type of its default; text is kept.
_PARSERS: dict[type, Any] = {
    bool: flags.BooleanParser(), int: flags.IntegerParser(),
    float: flags.FloatParser(), tuple: tuple_parser.TupleParser()}

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


def check_overrides(
    jobs: Sequence[Job], workdir: paths.Path, overrides: Sequence[str]
) -> None:
  """Raises UserError if a run already exists with other values or fields.

  An unfinished run would reject them itself. A finished one is not started, so
  the table would show it as if it had the new values.
  """
  overrides = [o for o in overrides if o.startswith('--config.')]
  parse_flags(overrides)
  _check_varied(jobs, overrides)
  for job in jobs:
    if not (workdir / job.name / 'config.json').exists():
      continue
    given = parse_flags([*overrides, *flags_of(job.varied)])
    stored = workdirs.stored_fields(workdir / job.name)
    for name, value in given.items():
      if name in workdirs.FREE_FIELDS or name.startswith(workdirs.FREE_GROUPS):
        continue
      if not is_same(name, value, stored.get(name)):
        raise UserError(
            f'{str(workdir / job.name)!r} holds a run with '
            f'{name}={stored.get(name)!r}, not {value!r}; choose another '
            '--workdir.')


def _check_varied(jobs: Sequence[Job], overrides: Sequence[str]) -> None:
  """Raises UserError unless varied fields distinguish the jobs."""
  names: dict[str, str] = {}
  for job in jobs:
    for (field, value), flag in zip(
        job.varied, flags_of(job.varied), strict=True):
      parsed = parse_flags([flag])
      if field == 'seed':
        raise UserError('--vary=seed: set seeds with --seeds=0,1,2.')
      if field in workdirs.FREE_FIELDS or field.startswith(
          workdirs.FREE_GROUPS):
        raise UserError(
            f'--vary={field}: this field does not change the training.')
      if any(o.startswith(f'--config.{field}=') for o in overrides):
        raise UserError(f'{field} is set by --vary and by --config.{field}.')
      key = f'{field}={_plain(parsed[field])}'
      if names.setdefault(key, value) != value:
        raise UserError(
            f'--vary={field} has one value twice, {names[key]!r} and '
            f'{value!r}.')


def flags_of(varied: Varied) -> list[str]:
  """The flags of `main.py` for varied fields."""
  return [f'--config.{field}={value}' for field, value in varied]


def parse_flags(overrides: Sequence[str]) -> dict[str, Any]:
  """The fields that flags of `main.py` set, as JSON and read as it does.

  Args:
    overrides: such as '--config.epochs=2'; of two for one field the last
      counts.

  Returns:
    The values by dotted name; in the groups `schema.USER_GROUPS` as text, since
    only the config file has their types.

  Raises:
    UserError: for an unknown field or a value of another type.
  """
  known, found = schema.flatten(base.get_config()), {}
  for override in overrides:
    name, mark, text = override.removeprefix('--config.').partition('=')
    if schema.is_free(name):  # its type is known to the config file only
      found[name] = text
      continue
    if name not in known:
      raise UserError(schema.unknown(name, known))
    kind = type(known[name])
    if not mark and kind is bool:
      text = 'true'
    try:
      value = _PARSERS[kind].parse(text) if kind in _PARSERS else text
    except (TypeError, ValueError) as error:
      raise UserError(f'{override}: {error}') from error
    found[name] = json.loads(json.dumps(value))
  return found


def _plain(value: Any) -> str:
  """The same text for values that a config may read as equal: 1 and 1.0."""
  if isinstance(value, str):
    try:
      value = ast.literal_eval(value.capitalize() if value.lower() in (
          'true', 'false') else value)
    except (SyntaxError, ValueError):
      return value
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return repr(float(value) if is_number else value)


def is_same(field: str, value: Any, stored: Any) -> bool:
  """Whether a value from `parse_flags` is that of a run's stored config."""
  if not schema.is_free(field) or value == stored:
    return bool(value == stored)
  if isinstance(stored, bool):
    return value.lower() in (('true', '1') if stored else ('false', '0'))
  try:
    if isinstance(stored, int | float):
      return float(value) == stored
    return bool(json.loads(json.dumps(ast.literal_eval(value))) == stored)
  except (SyntaxError, TypeError, ValueError):
    return False


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
         *flags_of(job.varied)],
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
  check_overrides(jobs, workdir, overrides)
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


def read_config(folder: paths.Path) -> dict[str, Any]:
  """The fields of a run's config by dotted name; empty if there is none."""
  path = folder / 'config.json'
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise UserError(f'{path} is not the config of a run: {error}.') from error
