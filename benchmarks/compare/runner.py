"""Runs the implementations in turns and appends every outcome to a file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import datetime
import json
import os
import pathlib
import subprocess
import tempfile
from typing import Any

from benchmarks.compare import cases, machine, worker
from benchmarks.compare.cases import Case

ROOT = pathlib.Path(__file__).resolve().parents[2]

Record = dict[str, Any]


class Worker:
  """A process that measures one implementation of a case when asked to.

  Attributes:
    process: the process.
    errors: the file that its error output goes to.
  """

  def __init__(
      self, python: str, job: dict[str, Any],
      variables: dict[str, str]) -> None:
    self.errors = tempfile.TemporaryFile('w+')
    self.process = subprocess.Popen(
        [python, '-m', 'benchmarks.compare.worker', json.dumps(job)], cwd=ROOT,
        env={**os.environ, **variables}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self.errors, text=True)

  def measure(self) -> Record:
    """Waits for a measurement.

    Returns:
      The times.

    Raises:
      RuntimeError: with the end of the error output, if the process ends.
    """
    assert self.process.stdin is not None and self.process.stdout is not None
    try:
      self.process.stdin.write('\n')
      self.process.stdin.flush()
    except BrokenPipeError:
      pass  # it has ended; the reason follows
    for line in self.process.stdout:
      if line.startswith(worker.MARK):
        return json.loads(line.removeprefix(worker.MARK))
    code = self.process.wait()
    self.errors.seek(0)
    lines = [line for line in self.errors.read().splitlines() if line.strip()]
    raise RuntimeError(
        f'exit status {code}: ' + '\n'.join(lines[-3:])[-600:])

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):
      self.process.communicate()
    self.errors.close()


def versions(python: str) -> dict[str, str]:
  """The versions that an interpreter has."""
  done = subprocess.run(
      [python, '-m', 'benchmarks.compare.worker'], cwd=ROOT,
      capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


def revision() -> str:
  """The commit of this checkout; '' outside one."""
  done = subprocess.run(
      ['git', 'describe', '--always', '--dirty'], cwd=ROOT,
      capture_output=True, text=True, check=False)
  return done.stdout.strip()


def read(path: pathlib.Path) -> list[Record]:
  """The records of a file; a line that was cut off at its end is left out."""
  records = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return records


def identity(record: Record) -> str:
  """Equal for measurements of the same thing, which are not repeated."""
  return json.dumps([
      record[name] for name in (
          'case', 'implementation', 'round', 'versions', 'machine',
          'variables')])


class Turns:
  """Measures cases in rounds.

  Attributes:
    options: the fields that all jobs share; see `worker.outcomes`.
    pythons: the interpreter of every implementation.
    versions: of the interpreters.
    start: starts a worker.
    cache: variables that name the folders of compiled programs.
    notes: further fields of every new record.
  """

  def __init__(
      self, options: dict[str, Any], pythons: dict[str, str],
      versions: dict[str, dict[str, str]], cache: pathlib.Path,
      notes: Record, start: Callable[..., Any] = Worker) -> None:
    self.options, self.pythons, self.start = options, pythons, start
    self.versions, self.notes = versions, notes
    self.cache = {
        'JAX_COMPILATION_CACHE_DIR': str(cache / 'jax'),
        'TORCHINDUCTOR_CACHE_DIR': str(cache / 'torch')}

  def identify(self, case: Case, implementation: str, number: int) -> Record:
    """What identifies a measurement, before it is made."""
    ours = implementation in (cases.OURS, cases.OURS_REFERENCE)
    versions = {
        name: version for name, version in (
            self.versions[self.pythons[implementation]].items())
        if name == 'python' or (name == 'torch') != ours}
    return {
        'case': case._asdict(), 'implementation': implementation,
        'round': number, 'versions': versions, 'machine': machine.describe(),
        'variables': worker.flags(case, implementation, versions)}

  def worker(self, record: Record) -> Any:
    """Starts the worker of a measurement."""
    return self.start(
        self.pythons[record['implementation']],
        {**self.options, 'case': record['case'],
         'implementation': record['implementation']},
        {**self.cache, **record['variables']})

  def rounds_of(
      self, case: Case, names: Sequence[str], rounds: int,
      known: dict[str, Record]) -> Iterator[tuple[Record, bool]]:
    """Measures one case; an implementation that fails is left out then on."""
    running: dict[str, Any] = {}
    failed: set[str] = set()
    with contextlib.ExitStack() as stack:
      for number in range(rounds):
        for name in names:
          record = self.identify(case, name, number)
          found = known.get(identity(record))
          if found is not None or name in failed:
            if found is not None:
              yield found, False
            continue
          if name not in running:
            running[name] = self.worker(record)
            stack.callback(running[name].close)
          try:
            outcome = running[name].measure()
          except RuntimeError as error:
            outcome = {'error': str(error)}
            failed.add(name)
          yield record | outcome | self.notes | {
              'date': datetime.datetime.now().isoformat(timespec='seconds'),
              'revision': revision()}, True

  def measurements(
      self, compared: Iterable[tuple[Case, Sequence[str]]], rounds: int,
      output: pathlib.Path) -> Iterator[tuple[Record, bool]]:
    """Measures what the file lacks.

    Args:
      compared: cases with their implementations.
      rounds: the rounds of a case. In each, all implementations measure once,
        in turns; their processes wait while others measure.
      output: the file; every record is appended at once.

    Yields:
      Every record, and whether it is new. Failed measurements are repeated by
      the next run.
    """
    known = {identity(r): r for r in read(output) if 'error' not in r}
    for case, names in compared:
      for record, new in self.rounds_of(case, names, rounds, known):
        if new:
          append(output, record)
        yield record, new


def append(path: pathlib.Path, record: Record) -> None:
  """Appends a line and flushes it; completes one that was cut off."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'ab+') as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b'\n':
        file.write(b'\n')
    file.write(json.dumps(record).encode() + b'\n')
    file.flush()
    os.fsync(file.fileno())


def selected(
    tasks: Sequence[str], widths: Sequence[int], precisions: Sequence[str],
    batch_sizes: Callable[[int], int], sizes: dict[str, int], count: int
) -> list[Case]:
  """The cases of the command line.

  Args:
    tasks: of `cases.TASKS`.
    widths: of the network.
    precisions: of `cases.PRECISIONS`.
    batch_sizes: maps a width to the batch size.
    sizes: `image_size` and `num_steps` of the cases.
    count: images of AutoAttack.

  Returns:
    Every combination; AutoAttack once, in float32, since the file sets the
    network and verdicts are those of float32.
  """
  found = [
      Case(task, width, batch_sizes(width), precision, **sizes)
      for width in widths for precision in precisions for task in tasks
      if task != cases.AUTOATTACK]
  if cases.AUTOATTACK in tasks:
    found.append(Case(cases.AUTOATTACK, 0, count, 'float32', **sizes))
  return found
