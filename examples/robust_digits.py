"""Adversarial training on digits, shared by the examples of `train_step`.

They differ only in the model, that is in how they make a `TrainState`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from awp_jax import (
  Attack,
  Method,
  ThreatModel,
  TrainState,
  adversarial,
  eval_step,
  methods,
  train_step,
)
from examples import report

NUM_TRAIN = 400
BATCH = 50
THREAT = ThreatModel('Linf', epsilon=0.1)
TX = optax.adam(3e-3)


def make_step(method: Method) -> Any:
  """Makes an adversarial training step, compiled once for all seeds."""

  @jax.jit
  def step(
      state: TrainState, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
    batch_key, step_key = jax.random.split(key)
    rows = jax.random.randint(
        jax.random.fold_in(batch_key, state.step), (BATCH,), 0, len(y))
    return train_step(
        state, (x[rows], y[rows]), step_key, objective=adversarial(),
        threat=THREAT, attack=Attack(step_size=0.03, num_steps=5),
        perturbation=method)

  return step


def robust_accuracy(
    step: Any, state: TrainState, seed: int, num_steps: int) -> float:
  """Trains on 400 digits; returns the PGD-10 accuracy on the others."""
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype('float32') / 16
  x, x_test, y, y_test = map(jnp.asarray, train_test_split(
      images, labels, train_size=NUM_TRAIN, stratify=labels,
      random_state=seed))
  key = jax.random.key(seed)
  for _ in range(num_steps):
    state, _ = step(state, x, y, key)
  sums = jax.jit(lambda state: eval_step(
      state, (x_test, y_test, jnp.ones(len(y_test), bool)), key,
      threat=THREAT, attack=Attack(step_size=0.02, num_steps=10)))(state)
  return float(sums.robust_correct / sums.examples)


def main(
    description: str | None, make_state: Callable[[int], TrainState],
    argv: Sequence[str] | None) -> list[report.Row]:
  """Prints robust test accuracies of AT without and with AWP.

  Args:
    description: the script's docstring.
    make_state: seed -> the state before the first step. Its functions must be
      the same for all seeds, or the step compiles again for each seed.
    argv: the arguments; None for `sys.argv`.

  Returns:
    The rows.
  """

  def compare(arguments: Any) -> Iterator[report.Row]:
    variants = {
        'AT': make_step(methods.awp(0)),
        'AT-AWP': make_step(methods.awp(arguments.gamma))}
    yield from report.rows(
        'digits', variants, arguments.seeds,
        lambda step, seed: robust_accuracy(
            step, make_state(seed), seed, arguments.steps))

  parser = report.Parser(description, seeds=2, steps=300)
  parser.add_argument(
      '--gamma', type=report.size, default=0.01,
      help='|v| / |w| (default: 0.01)')
  return report.run(parser, compare, argv)
