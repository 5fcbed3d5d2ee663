"""One measurement, in its own process: `python -m benchmarks.compare.worker`.

The argument is a job in JSON; the last line of the output is the outcome in
JSON. Without an argument it prints the versions that this interpreter has.
"""

from collections.abc import Callable
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

from benchmarks.compare import cases, machine
from benchmarks.compare.cases import Case

ONEDNN = (
    '--xla_cpu_use_onednn=true '
    '--xla_cpu_experimental_onednn_custom_call=true')


def flags(
    case: Case, implementation: str, versions: dict[str, str]
) -> dict[str, str]:
  """Environment variables of a measurement.

  XLA runs bfloat16 convolutions on the CPU by oneDNN from jax 0.12 on, if its
  flags ask for it.
  """
  if case.precision != 'bfloat16' or not implementation.startswith('awp_jax'):
    return {}
  jax = tuple(map(int, re.findall(r'\d+', versions.get('jax', ''))[:2]))
  if jax < (0, 12):
    return {}
  return {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {ONEDNN}'.strip()}


def timed(
    prepare: Callable[[], dict[str, Callable[[], Any]]], repeats: int,
    seconds: float) -> dict[str, Any]:
  """Times calls in turns.

  Args:
    prepare: compiles; returns the calls by name. A call blocks.
    repeats: the largest number of rounds.
    seconds: no round starts after this time; the first always runs.

  Returns:
    `first_call`: seconds to prepare and call all once, not counted elsewhere.
    `seconds`: by name, the times of the rounds.
  """
  started = time.perf_counter()
  calls = prepare()
  for call in calls.values():
    call()
  begin = time.perf_counter()
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for number in range(repeats):
    if number and time.perf_counter() - begin > seconds:
      break
    for name, call in calls.items():
      called = time.perf_counter()
      call()
      taken[name].append(time.perf_counter() - called)
  return {'first_call': begin - started, 'seconds': taken}


def auto_attack(case: Case, job: dict[str, Any]) -> dict[str, Any]:
  """Times AutoAttack `fast` on the network and images of a file."""
  import autoattack
  import numpy as np

  ours = job['implementation'] == cases.OURS
  file = np.load(job['network'])
  data = np.load(job['images'] or job['network'])
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'images.npz'
    np.savez(
        path, images=data['x'][:case.batch_size].astype(
            np.float32).transpose(0, 2, 3, 1) / 255,
        labels=data['y'][:case.batch_size].astype(np.int32))
    fixture = any(name.startswith('param/') for name in file)
    found = (autoattack.run_ours if ours else autoattack.run_reference)({
        'model': 'fixture' if fixture else 'resnet', 'data': str(path),
        'fixture': job['network'], 'weights': job['network'],
        'own_labels': False, 'repeats': 2, 'norm': 'Linf',
        'epsilon': cases.EPSILON, 'version': 'fast',
        'reference': job['auto_attack'],
        'batch_size': min(case.batch_size, 128 if ours else 500)})
  # Ours compiles in its first evaluation; the reference has nothing to compile.
  *first, last = found['seconds']
  return {'seconds': {case.task: [last]}, 'robust': found['robust'],
          'first_call': first[0] if first else last}


def measure(job: dict[str, Any]) -> dict[str, Any]:
  """The outcome of a job: the times, and what computes them."""
  case, implementation = Case(**job['case']), job['implementation']
  if case.task == cases.AUTOATTACK:
    return auto_attack(case, job)
  prepare: Callable[[], dict[str, Callable[[], Any]]]
  if implementation.startswith('awp_jax'):
    from benchmarks.compare import ours

    def prepare() -> dict[str, Callable[[], Any]]:
      return ours.prepare(case, implementation)
  else:
    from benchmarks.compare import rivals

    def prepare() -> dict[str, Callable[[], Any]]:
      return rivals.prepare(case, implementation, job['released'])
  return timed(prepare, job['repeats'], job['seconds'])


if __name__ == '__main__':
  # The networks in PyTorch are scripts beside this folder.
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  print(json.dumps(
      measure(json.loads(sys.argv[1])) if len(sys.argv) > 1 else
      machine.versions()))
