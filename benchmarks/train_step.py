"""Times a training step of this library and of the released PyTorch code.

  python benchmarks/train_step.py --batch_size=32
  python benchmarks/train_step.py --batch_size=32 --reference=PATH \
    --reference_python=PYTHON

PATH is a checkout of csdongxian/AWP and PYTHON an interpreter with PyTorch. The
two run in turn, each in its own process, so that drift of the machine's speed
affects both alike. The first step compiles and is not timed.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def timed(step: Callable[[], Any], repeats: int) -> list[float]:
  """Seconds of each of `repeats` calls, after one untimed call."""
  step()
  seconds = []
  for _ in range(repeats):
    started = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - started)
  return seconds


def ours(options: argparse.Namespace) -> dict[str, Any]:
  """Times `train_step` in the paper's CIFAR-10 setting."""
  import jax
  import jax.numpy as jnp
  import optax

  import awp_jax
  from awp_jax.models import PreActResNet

  size = (options.batch_size, options.image_size, options.image_size, 3)
  model = PreActResNet(10, width=options.width)
  x = jax.random.uniform(jax.random.key(0), size)
  y = jax.random.randint(jax.random.key(1), size[:1], 0, 10)
  variables = jax.jit(model.init)(jax.random.key(2), x)
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=variables['params'],
      batch_stats=variables['batch_stats'], tx=optax.chain(
          optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9)))

  def step(state: Any) -> Any:
    return awp_jax.train_step(
        state, (x, y), jax.random.key(3), objective=awp_jax.adversarial(),
        threat=awp_jax.ThreatModel('Linf', 8 / 255),
        attack=awp_jax.Attack(2 / 255, 10),
        perturbation=awp_jax.methods.awp(options.gamma),
        statistics='reference')[0]

  started = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
  compile_seconds = time.perf_counter() - started
  # The step donates its argument, so it needs its own buffers.
  holder = [jax.tree.map(jnp.copy, state)]

  def call() -> None:
    holder[0] = jax.block_until_ready(compiled(holder[0]))

  return {
      'name': f'awp_jax, jax {jax.__version__}',
      'seconds': timed(call, options.repeats), 'compile': compile_seconds}


def reference(options: argparse.Namespace) -> dict[str, Any]:
  """Times the same step with the released network and weight adversary."""
  sys.path.insert(0, str(pathlib.Path(options.reference) / 'AT_AWP'))
  import preactresnet
  import torch
  from torch.nn import functional
  import utils_awp

  torch.manual_seed(0)
  network, proxy = (preactresnet.PreActResNet18() for _ in range(2))
  optimizer = torch.optim.SGD(
      network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
  adversary = utils_awp.AdvWeightPerturb(
      network, proxy, torch.optim.SGD(proxy.parameters(), lr=0.01),
      options.gamma)
  side = options.image_size
  x = torch.rand(options.batch_size, 3, side, side)
  y = torch.randint(0, 10, (options.batch_size,))
  epsilon, eta = 8 / 255, 2 / 255

  def attack() -> Any:
    delta = torch.empty_like(x).uniform_(-epsilon, epsilon)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(10):
      delta.requires_grad_()
      # Like the released code, backward to the weights as well.
      functional.cross_entropy(network(x + delta), y).backward()
      moved = (delta + eta * delta.grad.sign()).detach()
      delta = (x + moved.clamp(-epsilon, epsilon)).clamp(0, 1) - x
    network(x + delta)  # the pass that compares restarts, with its graph
    return x + delta

  def step() -> None:
    network.train()
    x_adv = attack()
    perturbation = None
    if options.gamma > 0:
      perturbation = adversary.calc_awp(inputs_adv=x_adv, targets=y)
      adversary.perturb(perturbation)
    optimizer.zero_grad()
    functional.cross_entropy(network(x_adv), y).backward()
    optimizer.step()
    if perturbation is not None:
      adversary.restore(perturbation)
    network(x)  # the released code measures natural accuracy this way

  return {
      'name': f'released code, PyTorch {torch.__version__}, '
              f'{torch.get_num_threads()} threads',
      'seconds': timed(step, options.repeats)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--image_size', type=int, default=32)
  parser.add_argument('--width', type=int, default=64, help='of our network')
  parser.add_argument('--gamma', type=float, default=0.01, help='0: AT')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--reference', help='a checkout of csdongxian/AWP')
  parser.add_argument('--reference_python', default=sys.executable)
  parser.add_argument(
      '--only', choices=('ours', 'reference'), help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the implementations in turn and prints their medians."""
  options = parse(argv)
  if options.only:
    result = ours(options) if options.only == 'ours' else reference(options)
    print(json.dumps(result))
    return
  arguments = [a for a in (argv or sys.argv[1:])]
  turns = ['ours'] + (['reference'] if options.reference else [])
  results: dict[str, list[dict[str, Any]]] = {name: [] for name in turns}
  for _ in range(options.rounds):
    for name in turns:
      python = sys.executable if name == 'ours' else options.reference_python
      output = subprocess.run(
          [python, __file__, *arguments, f'--only={name}'], check=True,
          capture_output=True, text=True).stdout
      results[name].append(json.loads(output.splitlines()[-1]))
  print(f'PreActResNet-18, batch {options.batch_size}, gamma {options.gamma}, '
        f'{platform.machine()}, Python {platform.python_version()}')
  for runs in results.values():
    seconds = [s for run in runs for s in run['seconds']]
    compiling = ''.join(
        f', compiled in {run["compile"]:.1f} s' for run in runs[:1]
        if 'compile' in run)
    print(f'{runs[0]["name"]}: median {statistics.median(seconds):.2f} s, '
          f'min {min(seconds):.2f}, max {max(seconds):.2f}, '
          f'n {len(seconds)}{compiling}')


if __name__ == '__main__':
  main()
