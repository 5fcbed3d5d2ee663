"""Commands in processes of their own, and what a run leaves."""

import collections
from collections.abc import Callable, Sequence
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, TypeAlias

import jax
import numpy as np

from experiments.runs import metrics, reading

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
  # The checksums of lines are over their times, too.
  names = {*metrics.TIMING_FIELDS, 'seconds', 'seconds_per_example',
           'checksums'}
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


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
  """The parts in which two ends differ."""
  return [name for name in sorted(found.keys() | wanted.keys())
          if found.get(name) != wanted.get(name)]


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


#: Outcomes and how often they were seen.
Counts: TypeAlias = collections.Counter[str]
