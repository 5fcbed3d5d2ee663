"""Measures an accelerator: its ceilings, and training steps against them.

  python benchmarks/accelerator.py ceiling
  python benchmarks/accelerator.py ours --budget=120
  python benchmarks/accelerator.py ours wide_resnet:AT:128:bfloat16:perturbed
  python benchmarks/accelerator.py torch preact_resnet:AT-AWP:128:tf32:eager
  python benchmarks/accelerator.py profile --output=trace

Every measurement prints one JSON line. A case is NETWORK:METHOD:BATCH:PRECISION
with, for `ours`, the policy of batch statistics, and for `torch` a variant of
`torch_train_step`. Precisions: float32 (exact products), tf32 (float32 with the
device's fast products), bfloat16. The setting is the paper's for CIFAR-10:
L_inf 8/255, PGD-10 in steps of 2/255, gamma 0.01.

A step's time is the median of five groups of consecutive steps; the host waits
only at the end of a group. All cases of `ours` compile first, in threads, so
the seconds of compilation include waiting for one another. No case starts after
`--budget` seconds.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import accelerator_cases as cases_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Groups of steps; the host waits between them.
GROUPS = 5


def timed(
    step: Callable[[], Any], wait: Callable[[Any], Any],
    seconds: float) -> dict[str, Any]:
  """Times steps in groups.

  Args:
    step: dispatches one step and returns something to wait for.
    wait: waits for it.
    seconds: duration to aim for; every group has at least one step, at most 40.

  Returns:
    Median, minimum and maximum seconds per step, and the number of steps.
  """
  for _ in range(2):
    wait(step())
  started = time.perf_counter()
  wait(step())
  once = time.perf_counter() - started
  count = max(1, min(40, round(seconds / GROUPS / once)))
  times = []
  for _ in range(GROUPS):
    started = time.perf_counter()
    for _ in range(count):
      out = step()
    wait(out)
    times.append((time.perf_counter() - started) / count)
  return {'seconds': statistics.median(times), 'min': min(times),
          'max': max(times), 'steps': count * GROUPS}


def build(case: cases_lib.Case, options: argparse.Namespace) -> tuple[Any, ...]:
  """A case of `ours`: the step function, its state and its batch."""
  import jax
  import jax.numpy as jnp
  import optax

  import awp_jax
  from awp_jax.models import PreActResNet, WideResNet

  kind = {'preact_resnet': PreActResNet, 'wide_resnet': WideResNet}
  depth, width = cases_lib.NETWORKS[case.network]
  model = kind[case.network](
      10, depth=options.depth or depth, width=options.width or width,
      dtype='bfloat16' if case.precision == 'bfloat16' else None)
  size = (case.batch_size,) + (options.image_size,) * 2
  x = jax.random.uniform(jax.random.key(0), (*size, 3))
  y = jax.random.randint(jax.random.key(1), size[:1], 0, 10)
  variables = jax.jit(model.init)(jax.random.key(2), x[:1])
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=variables['params'],
      batch_stats=variables['batch_stats'], tx=optax.chain(
          optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9)))
  state = state.replace(step=jnp.int32(0))

  def step(state: Any, x: Any, y: Any) -> Any:
    exact = 'float32' if case.precision == 'float32' else None
    with jax.default_matmul_precision(exact):
      return awp_jax.train_step(
          state, (x, y), jax.random.key(3), objective=awp_jax.adversarial(),
          threat=awp_jax.ThreatModel('Linf', 8 / 255),
          attack=awp_jax.Attack(2 / 255, options.num_steps),
          perturbation=awp_jax.methods.awp(cases_lib.METHODS[case.method]),
          statistics=case.kind)

  return step, state, x, y


def _operations(jaxpr: Any) -> float:
  """Floating-point operations of a program, of all precisions."""
  from experiments.ahead import flops

  return sum(flops.count(jaxpr, padding=True).values())


def compile_case(
    case: cases_lib.Case, options: argparse.Namespace
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
  """Compiles a case of `ours`; also its arguments and counts."""
  import jax

  fn, state, x, y = build(case, options)
  started = time.perf_counter()
  traced = jax.jit(fn, donate_argnums=0).trace(state, x, y)
  lowered = traced.lower()
  compiling = time.perf_counter()
  compiled = lowered.compile()
  ended = time.perf_counter()
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  forward = _operations(jax.make_jaxpr(
      lambda v: state.apply_fn(v, x, train=False))(variables).jaxpr)
  memory = compiled.memory_analysis()
  total = _operations(traced.jaxpr.jaxpr)
  return compiled, (state, x, y), {
      'trace_seconds': compiling - started,
      'compile_seconds': ended - compiling,
      'flops': total, 'forward_passes': total / forward,
      'program_bytes': (
          memory.argument_size_in_bytes + memory.temp_size_in_bytes
          + memory.output_size_in_bytes - memory.alias_size_in_bytes)}


def ours(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Times `train_step`; yields a measurement for every case."""
  import jax

  cases = [cases_lib.parse_case(text, options.batch_size)
           for text in options.cases or cases_lib.OURS]
  device = jax.devices()[0]
  ends = time.perf_counter() + options.budget
  pool = concurrent.futures.ThreadPoolExecutor(options.threads)
  pending = [pool.submit(compile_case, case, options) for case in cases]
  # Nothing runs on the device before the last compilation has ended: it would
  # disturb the timing of candidate kernels.
  concurrent.futures.wait(
      pending, timeout=max(0, ends - time.perf_counter() - options.reserve))
  pool.shutdown(wait=False, cancel_futures=True)
  for case, future in zip(cases, pending, strict=True):
    record: dict[str, Any] = {'measures': 'ours', **case._asdict()}
    if not future.done() or future.cancelled() or time.perf_counter() > ends:
      yield record | {'skipped': 'budget'}
      continue
    try:
      compiled, (state, x, y), facts = future.result()
      holder = [state]

      def step(compiled: Any = compiled, holder: Any = holder, x: Any = x,
               y: Any = y) -> Any:
        holder[0], metrics = compiled(holder[0], x, y)
        return metrics

      record |= facts | timed(step, jax.block_until_ready, options.seconds)
      record |= rates(record, len(y), options)
    except Exception as error:  # the other cases go on
      record['error'] = f'{type(error).__name__}: {error}'[:500]
    stats = device.memory_stats() or {}
    yield record | {
        'peak_bytes_of_process': stats.get('peak_bytes_in_use'),
        'device': device.device_kind, 'jax': jax.__version__}


def rates(
    record: dict[str, Any], images: int,
    options: argparse.Namespace) -> dict[str, Any]:
  """Images per second, TFLOP/s, and the share of the ceiling, if given."""
  tera = record['flops'] / record['seconds'] / 1e12
  ceilings = dict(zip(cases_lib.PRECISIONS, options.ceilings, strict=False))
  ceiling = ceilings.get(record['precision'])
  return {'images_per_second': images / record['seconds'], 'tflops': tera,
          'share_of_ceiling': tera / ceiling if ceiling else None}


def ceiling(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Times matrix products and a copy, on random data."""
  import jax
  import jax.numpy as jnp

  n = options.matrix
  for precision in cases_lib.PRECISIONS:
    kind = jnp.bfloat16 if precision == 'bfloat16' else jnp.float32
    a, b = (
        jax.random.normal(jax.random.key(i), (n, n), kind) for i in (0, 1))
    exact = 'float32' if precision == 'float32' else None
    with jax.default_matmul_precision(exact):
      product = jax.jit(jnp.dot).lower(a, b).compile()
    found = timed(
        lambda p=product, a=a, b=b: p(a, b), jax.block_until_ready,
        options.seconds)
    yield {'measures': 'ceiling', 'precision': precision, 'matrix': n,
           'tflops': 2 * n ** 3 / found['seconds'] / 1e12, **found,
           'device': jax.devices()[0].device_kind}
  values = jax.random.normal(jax.random.key(2), (16 * n * n,), jnp.float32)
  copy = jax.jit(lambda v: v + 1).lower(values).compile()
  found = timed(
      lambda: copy(values), jax.block_until_ready, options.seconds)
  yield {'measures': 'copy', 'bytes': 2 * values.nbytes,
         'gigabytes_per_second': 2 * values.nbytes / found['seconds'] / 1e9,
         **found}


def pytorch(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Times the same step in PyTorch; yields a measurement for every case."""
  import torch
  import torch_train_step

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cudnn.benchmark = True
  ends = time.perf_counter() + options.budget
  for case in [
      cases_lib.parse_case(text, options.batch_size)
      for text in options.cases or cases_lib.TORCH]:
    record: dict[str, Any] = {'measures': 'torch', **case._asdict()}
    if time.perf_counter() > ends:
      yield record | {'skipped': 'budget'}
      continue
    fast = case.precision != 'float32'
    torch.backends.cuda.matmul.allow_tf32 = fast
    torch.backends.cudnn.allow_tf32 = fast
    torch.manual_seed(0)
    size = (case.batch_size, 3)
    x = torch.rand(*size, *(options.image_size,) * 2, device=device)
    y = torch.randint(0, 10, size[:1], device=device)
    started = time.perf_counter()
    try:
      model = torch_train_step.network(
          case.network, options.width, options.depth).to(device)
      step = torch_train_step.make_step(
          case.kind, model, x, y,
          torch_train_step.Method(cases_lib.METHODS[case.method]),
          case.precision)
      float(step())  # fetching a value waits for the device
      record['first_step_seconds'] = time.perf_counter() - started
      record |= timed(step, float, options.seconds)
      record['images_per_second'] = len(y) / record['seconds']
    except Exception as error:  # the other cases go on
      record['error'] = f'{type(error).__name__}: {error}'[:500]
    if device == 'cuda':
      record['peak_bytes'] = torch.cuda.max_memory_allocated()
      torch.cuda.reset_peak_memory_stats()
    yield record | {'torch': torch.__version__, 'device': device}


def profile(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Traces three steps; yields the most costly kernels."""
  import jax
  import trace_summary

  case = cases_lib.parse_case(
      (options.cases or cases_lib.OURS)[0], options.batch_size)
  compiled, (state, x, y), _ = compile_case(case, options)
  state, _ = jax.block_until_ready(compiled(state, x, y))
  with jax.profiler.trace(options.output):
    for _ in range(3):
      state, metrics = compiled(state, x, y)
    jax.block_until_ready(metrics)
  yield {'measures': 'profile', **case._asdict(), 'steps': 3,
         **trace_summary.summarize(pathlib.Path(options.output), 25)}


COMMANDS = {
    'ceiling': ceiling, 'ours': ours, 'torch': pytorch, 'profile': profile}


def main(argv: Sequence[str]) -> None:
  """Runs one command and prints a JSON line for every measurement."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('command', choices=COMMANDS)
  parser.add_argument('cases', nargs='*')
  parser.add_argument('--width', type=int, default=0, help='0: as published')
  parser.add_argument('--depth', type=int, default=0)
  parser.add_argument('--batch_size', type=int, default=0, help='of all cases')
  parser.add_argument('--image_size', type=int, default=32)
  parser.add_argument('--num_steps', type=int, default=10, help='of PGD, ours')
  parser.add_argument('--matrix', type=int, default=8192)
  parser.add_argument('--seconds', type=float, default=4.0, help='per case')
  parser.add_argument('--budget', type=float, default=1e9, help='seconds')
  parser.add_argument(
      '--reserve', type=float, default=0.0,
      help='seconds of the budget in which nothing new compiles')
  parser.add_argument('--threads', type=int, default=1, help='that compile')
  parser.add_argument(
      '--ceilings', type=float, nargs='+', default=(),
      help='TFLOP/s of float32, tf32 and bfloat16')
  parser.add_argument('--output', default='trace', help='folder of the trace')
  options = parser.parse_args(argv)
  for record in COMMANDS[options.command](options):
    print(json.dumps(record), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
