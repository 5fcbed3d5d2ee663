"""A run of thousands of steps must not grow in memory, files or threads."""

import json
import pathlib
import subprocess
import time
from typing import NamedTuple

from benchmarks.soak import commands
from benchmarks.soak.commands import Outcome
from benchmarks.soak.reference import Reference

#: Four steps an epoch, with an evaluation, a checkpoint and lines of metrics.
_SETTING = (*commands.TINY, '--config.early_stopping_epochs=0',
            '--config.checkpoint_every_steps=100')
#: Compiling and the first epochs are over after this share of the steps.
_SETTLED = 0.2


class Sample(NamedTuple):
  """A process at one moment.

  Attributes:
    step: its number of completed steps.
    megabytes: its resident memory.
    files: its open files.
    threads: its threads.
    programs: entries of its compilation cache.
  """

  step: int
  megabytes: float
  files: int
  threads: int
  programs: int


def long_run(reference: Reference, steps: int) -> dict[str, object]:
  """Trains for that many steps and watches the process.

  Args:
    reference: has the compiled programs.
    steps: of training.

  Returns:
    Smallest and largest of each quantity after the start, and the growth of
    memory from the first to the last quarter of it.

  Raises:
    Outcome: if the run fails.
  """
  folder = reference.commands.folder / 'long'
  process = reference.commands.start(
      'main.py', commands.CONFIG, *_SETTING, f'--workdir={folder}',
      f'--config.epochs={steps // 4}')
  samples: list[Sample] = []
  # The pipes hold little.
  with subprocess.Popen(['cat'], stdin=process.stdout,
                        stdout=subprocess.DEVNULL):
    while process.poll() is None:
      time.sleep(1)
      try:
        samples.append(_sample(
            process.pid, folder, reference.commands.folder / 'programs'))
      except (FileNotFoundError, ProcessLookupError, IndexError):
        pass  # it starts or ends
    assert process.stderr
    err = process.stderr.read()
  if process.returncode or err.strip():
    raise Outcome(f'ended with {process.returncode}: {err[-500:]}')
  settled = [sample for sample in samples if sample.step >= _SETTLED * steps]
  quarter = max(len(settled) // 4, 1)
  means = [sum(sample.megabytes for sample in part) / quarter
           for part in (settled[:quarter], settled[-quarter:])]
  found: dict[str, object] = {
      'steps': max(sample.step for sample in samples),
      'samples': len(settled),
      'megabytes at the start, at the end': [round(mean, 1) for mean in means]}
  for name in Sample._fields[1:]:
    values = [getattr(sample, name) for sample in settled]
    found[name] = [round(min(values), 1), round(max(values), 1)]
  return found


def _sample(
    pid: int, folder: pathlib.Path, programs: pathlib.Path) -> Sample:
  place = pathlib.Path(f'/proc/{pid}')
  status = dict(line.split(':', 1) for line in (
      place / 'status').read_text().splitlines())
  last = (folder / 'steps.jsonl').read_text().splitlines()[-1]
  return Sample(
      step=json.loads(last)['step'],
      megabytes=int(status['VmRSS'].split()[0]) / 1024,
      files=len(list((place / 'fd').iterdir())),
      threads=int(status['Threads']),
      programs=len(list(programs.iterdir())))
