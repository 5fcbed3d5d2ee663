"""Runs the implementations in turns and appends every outcome to a file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import datetime
import json
import os
import pathlib
import subprocess
import time
from typing import Any

from benchmarks.compare import cases, machine, worker
from benchmarks.compare.cases import Case

ROOT = pathlib.Path(__file__).resolve().parents[2]

Record = dict[str, Any]
#: (python, arguments, environment variables) -> output
Process = Callable[[str, Sequence[str], dict[str, str]], str]


def process(
    python: str, arguments: Sequence[str], variables: dict[str, str]) -> str:
  """Runs a worker and returns its output.

  Args:
    python: the interpreter.
    arguments: of the worker.
    variables: environment variables to set.

  Returns:
    The standard output.

  Raises:
    RuntimeError: with the end of the error output, if the worker fails.
  """
  done = subprocess.run(
      [python, '-m', 'benchmarks.compare.worker', *arguments], cwd=ROOT,
      env={**os.environ, **variables}, capture_output=True, text=True,
      check=False)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise RuntimeError('\n'.join(lines[-3:])[-600:] or (
        f'ended by signal {-done.returncode}'))
  return done.stdout


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
  """Measures cases round after round.

  Attributes:
    options: the keyword arguments of every job, and `repeats` and `seconds`.
    pythons: the interpreter of every implementation.
    cache: the folder of compiled programs, so that only the first round
      compiles.
    run: starts a worker.
  """

  def __init__(
      self, options: dict[str, Any], pythons: dict[str, str],
      cache: pathlib.Path, run: Process = process) -> None:
    self.options, self.pythons, self.run = options, pythons, run
    self.cache = {
        'JAX_COMPILATION_CACHE_DIR': str(cache / 'jax'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'TORCHINDUCTOR_CACHE_DIR': str(cache / 'torch')}
    self.versions = {
        python: json.loads(run(python, (), {}).splitlines()[-1])
        for python in sorted(set(pythons.values()))}

  def record(self, case: Case, implementation: str, number: int) -> Record:
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

  def measure(self, record: Record) -> Record:
    """Adds the times, or the error, and the date."""
    started = time.perf_counter()
    job = {**self.options, 'case': record['case'],
           'implementation': record['implementation']}
    try:
      output = self.run(
          self.pythons[record['implementation']], (json.dumps(job),),
          {**self.cache, **record['variables']})
      outcome = json.loads(output.splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error:
      outcome = {'error': str(error)}
    return record | outcome | {
        'process_seconds': time.perf_counter() - started,
        'date': datetime.datetime.now().isoformat(timespec='seconds'),
        'revision': revision()}

  def measurements(
      self, compared: Iterable[tuple[Case, Sequence[str]]], rounds: int,
      output: pathlib.Path) -> Iterator[tuple[Record, bool]]:
    """Measures what the file lacks.

    Args:
      compared: cases with their implementations.
      rounds: the number of rounds; in each, all implementations run once.
      output: the file; every record is appended at once.

    Yields:
      Every record, and whether it is new. An implementation that failed is not
      measured again in later rounds, only by a later run.
    """
    known = {identity(r): r for r in read(output) if 'error' not in r}
    failed: set[tuple[Case, str]] = set()
    compared = list(compared)
    for number in range(rounds):
      for case, names in compared:
        for name in names:
          if (case, name) in failed:
            continue
          record = self.record(case, name, number)
          found = known.get(identity(record))
          if found is not None:
            yield found, False
            continue
          record = self.measure(record)
          if 'error' in record:
            failed.add((case, name))
          append(output, record)
          yield record, True


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
