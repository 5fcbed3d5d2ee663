"""One implementation of a case, in its own process.

`python -m benchmarks.compare.worker JOB`, with a job in JSON, measures once for
every line of standard input and answers in a line of `MARK` and JSON. The first
answer includes the compilation. Without a job it prints the versions that this
interpreter has.
"""

from collections.abc import Callable, Iterator
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

from benchmarks.compare import cases, machine
from benchmarks.compare.cases import Case
from experiments.util import xla

#: Opens the lines that answer, among others that libraries print.
MARK = 'measured: '


def flags(
    case: Case, implementation: str, versions: dict[str, str]
) -> dict[str, str]:
  """Environment variables of a measurement.

  XLA of jax 0.12 runs bfloat16 convolutions on the CPU by oneDNN, if its flags
  ask for it; `experiments/main.py` sets them too.
  """
  if case.precision != 'bfloat16' or not implementation.startswith('awp_jax'):
    return {}
  given = os.environ.get('XLA_FLAGS', '')
  wanted = xla.with_onednn(given, versions.get('jaxlib', ''))
  return {} if wanted == given else {'XLA_FLAGS': wanted}


def timed(
    calls: dict[str, Callable[[], Any]], repeats: int,
    seconds: float) -> dict[str, list[float]]:
  """Times calls in turns.

  Args:
    calls: by name. A call blocks.
    repeats: the largest number of calls of each.
    seconds: no turn starts after this time; the first always does.

  Returns:
    The seconds of the calls by name.
  """
  begin = time.perf_counter()
  taken: dict[str, list[float]] = {name: [] for name in calls}
  for number in range(repeats):
    if number and time.perf_counter() - begin > seconds:
      break
    for name, call in calls.items():
      called = time.perf_counter()
      call()
      taken[name].append(time.perf_counter() - called)
  return taken


def auto_attack(case: Case, job: dict[str, Any]) -> dict[str, Any]:
  """Times AutoAttack `fast` on the network and images of a file."""
  import numpy as np

  from benchmarks import autoattack

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
        'attack_dtype': case.precision,
        'epsilon': cases.EPSILON, 'version': 'fast',
        'reference': job['auto_attack'],
        'batch_size': min(case.batch_size, 128 if ours else 500)})
  # Ours compiles in its first evaluation; the reference has nothing to compile.
  *first, last = found['seconds']
  return {'seconds': {case.task: [last]}, 'robust': found['robust'],
          'first_call': first[0] if first else last}


def prepared(
    case: Case, implementation: str, released: str
) -> dict[str, Callable[[], Any]]:
  """The calls to time, by name."""
  if implementation.startswith('awp_jax'):
    from benchmarks.compare import ours

    return ours.prepare(case, implementation)
  from benchmarks.compare import rivals

  return rivals.prepare(case, implementation, released)


def outcomes(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """One measurement after another.

  Args:
    job: `case` and `implementation`; `repeats` and `seconds` of `timed`; paths.

  Yields:
    `seconds`: the times of the calls by name.
    `first_call`: the seconds of the imports, the compilation and the first
    call, which is not counted elsewhere; only in the first measurement.
  """
  case = Case(**job['case'])
  if case.task == cases.AUTOATTACK:
    while True:
      yield auto_attack(case, job)
  started = time.perf_counter()
  calls = prepared(case, job['implementation'], job['released'])
  for call in calls.values():
    call()
  first = {'first_call': time.perf_counter() - started}
  while True:
    yield first | {'seconds': timed(calls, job['repeats'], job['seconds'])}
    first = {}


if __name__ == '__main__':
  # The networks in PyTorch are scripts beside this folder.
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  if len(sys.argv) == 1:
    print(json.dumps(machine.versions()))
    sys.exit()
  measurements = outcomes(json.loads(sys.argv[1]))
  for _ in sys.stdin:
    # On a line of its own, whatever a library printed before.
    print(f'\n{MARK}{json.dumps(next(measurements))}', flush=True)
