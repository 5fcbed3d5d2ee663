"""Measures what each objective and weight perturbation costs in a step.

  python benchmarks/overhead.py --width=64 --depth=18 --batch_size=32
  python benchmarks/overhead.py --methods 'awp(gamma=0.01)' 'sam' 'awp(every=2)'

The step of every objective is compiled without and with AWP. The steps then run
in turn in one process, so that drift of the machine's speed affects all alike.
Processor time is reported next to wall-clock time, for machines that do other
work, and the overhead by arithmetic next to the measured one: a forward pass
counts 1, the gradient of inputs or of weights 1 each. With --methods the
objective is AT with each of these weight perturbations, and consecutive steps
are averaged, because some methods skip steps.

For AT-AWP against AT in wall-clock time, in both precisions, there is the task
`awp-overhead` of `python -m benchmarks.compare`.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import statistics
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Forward passes with a gradient of the weights in one descent pass.
DESCENT_PASSES = {'AT': 1, 'TRADES': 2, 'MART': 2}


def arithmetic(objective: str, num_steps: int) -> float:
  """Overhead of AWP by counting passes, as a fraction of the step.

  Args:
    objective: 'AT', 'TRADES' or 'MART'.
    num_steps: steps of the attack.

  Returns:
    (3 p) / (2 K + c + 3 p), with p passes with weight gradients, K attack steps
    with input gradients, and c = 1 natural pass for the attack of TRADES.
  """
  weights = 3 * DESCENT_PASSES[objective]
  return weights / (2 * num_steps + (objective == 'TRADES') + weights)


def compiled_steps(options: argparse.Namespace) -> dict[str, Any]:
  """Compiles the steps; returns `run(number)` by name, which blocks."""
  import jax
  import jax.numpy as jnp
  import optax

  import awp_jax
  from awp_jax.models import PreActResNet
  from experiments.util import named

  size = (options.batch_size, 32, 32, 3)
  model = PreActResNet(10, depth=options.depth, width=options.width)
  x = jax.random.uniform(jax.random.key(0), size)
  y = jax.random.randint(jax.random.key(1), size[:1], 0, 10)
  variables = jax.jit(model.init)(jax.random.key(2), x)
  model_state: dict[str, Any] = {
      'apply_fn': model.apply, 'params': variables['params'],
      'batch_stats': variables['batch_stats'], 'tx': optax.chain(
          optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9))}
  made = {
      'AT': awp_jax.adversarial(), 'TRADES': awp_jax.trades(),
      'MART': awp_jax.mart()}

  def call(objective: Any, perturbation: awp_jax.Method | None) -> Any:
    first = awp_jax.TrainState.create(
        method=perturbation, **model_state).replace(step=jnp.int32(0))
    # The policy without passes that only update statistics.
    step = jax.jit(lambda state: awp_jax.train_step(
        state, (x, y), jax.random.key(3), objective=objective,
        threat=awp_jax.ThreatModel('Linf', 8 / 255),
        attack=awp_jax.Attack(
            2 / 255, options.num_steps, mode=options.mode or None),
        perturbation=perturbation,
        statistics='perturbed')).lower(first).compile()
    return lambda number: jax.block_until_ready(
        step(first.replace(step=jnp.int32(number))))

  if options.methods:
    perturbed = {
        text: awp_jax.methods.make(name, **keywords)
        for text in options.methods
        for name, keywords in (named.parse_call(text),)}
    return {
        name: call(made['AT'], perturbation) for name, perturbation in {
            'AT': None, **perturbed}.items()}
  return {
      name + suffix: call(objective, awp_jax.methods.awp(gamma))
      for name, objective in made.items()
      for suffix, gamma in (('', 0.0), ('-AWP', 0.01))}


def main(argv: Sequence[str]) -> None:
  """Measures and prints JSON."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--depth', type=int, default=18)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--num_steps', type=int, default=10)
  parser.add_argument('--mode', choices=('train', 'eval'), default='')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--methods', nargs='+', default=())
  options = parser.parse_args(argv)
  steps = compiled_steps(options)
  taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
  for number in range(options.rounds + 1):
    for name, step in steps.items():
      started = time.perf_counter(), time.process_time()
      step(number)
      if number:  # the first round warms up
        taken[name].append((
            time.perf_counter() - started[0], time.process_time() - started[1]))
  middle = statistics.fmean if options.methods else statistics.median
  pairs = {name: 'AT' for name in steps if name != 'AT'} if (
      options.methods) else {f'{name}-AWP': name for name in DESCENT_PASSES}
  report: dict[str, Any] = {'options': vars(options)}
  for index, clock in enumerate(('seconds', 'processor_seconds')):
    typical = {
        name: middle([times[index] for times in values])
        for name, values in taken.items()}
    report[clock] = {name: round(value, 4) for name, value in typical.items()}
    report[f'overhead_in_{clock}'] = {
        name: round(typical[name] / typical[plain] - 1, 4)
        for name, plain in pairs.items()}
  if not options.methods:
    report['overhead_by_arithmetic'] = {
        name: round(arithmetic(plain, options.num_steps), 4)
        for name, plain in pairs.items()}
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  main(sys.argv[1:])
