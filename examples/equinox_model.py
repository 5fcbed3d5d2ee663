"""AWP for an Equinox module.

  python examples/equinox_model.py

A perceptron with dropout classifies handwritten digits (scikit-learn's, no
download) after training on a few hundred images. The arrays of the module are
the parameters; the loss function adds the static rest. The dropout key is an
argument of the loss, so both passes of a step draw the same masks.
"""

from collections.abc import Iterator, Sequence
import pathlib
import sys
from typing import Any

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from awp_jax import awp_step
from examples import report

NUM_TRAIN = 300
BATCH = 50


class Perceptron(eqx.Module):
  """64 pixels -> 128 -> 10, with dropout."""

  hidden: eqx.nn.Linear
  dropout: eqx.nn.Dropout
  out: eqx.nn.Linear

  def __init__(self, key: jax.Array):
    hidden_key, out_key = jax.random.split(key)
    self.hidden = eqx.nn.Linear(64, 128, key=hidden_key)
    self.dropout = eqx.nn.Dropout(0.5)
    self.out = eqx.nn.Linear(128, 10, key=out_key)

  def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Pixels [64] -> logits [10]; without a key, no dropout."""
    x = jax.nn.relu(self.hidden(x))
    x = self.dropout(x, key=key, inference=key is None)
    return self.out(x)


def make_step(gamma: float, tx: optax.GradientTransformation) -> Any:
  """Makes a training step, compiled once for all seeds."""
  # Everything except arrays; does not depend on the seed.
  _, static = eqx.partition(Perceptron(jax.random.key(0)), eqx.is_inexact_array)

  def loss_fn(
      params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
    model = eqx.combine(params, static)
    logits = jax.vmap(model)(x, jax.random.split(key, len(x)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  @jax.jit
  def step(
      params: Any, opt_state: Any, x: jax.Array, y: jax.Array, key: jax.Array
  ) -> Any:
    batch_key, dropout_key = jax.random.split(key)
    rows = jax.random.randint(batch_key, (BATCH,), 0, len(y))
    params, opt_state, *_ = awp_step(
        loss_fn, tx, params, opt_state, x[rows], y[rows], dropout_key,
        gamma=gamma)
    return params, opt_state

  return step


def accuracy(
    step: Any, tx: optax.GradientTransformation, seed: int, steps: int
) -> float:
  """Trains on 300 digits; returns the accuracy on the others."""
  images, labels = load_digits(return_X_y=True)
  x, x_test, y, y_test = map(jnp.asarray, train_test_split(
      images.astype('float32') / 16, labels, train_size=NUM_TRAIN,
      stratify=labels, random_state=seed))
  init_key, loop_key = jax.random.split(jax.random.key(seed))
  params, static = eqx.partition(Perceptron(init_key), eqx.is_inexact_array)
  opt_state = tx.init(params)
  for number in range(steps):
    params, opt_state = step(
        params, opt_state, x, y, jax.random.fold_in(loop_key, number))
  logits = jax.vmap(eqx.combine(params, static))(x_test)
  return float((logits.argmax(-1) == y_test).mean())


def compare(arguments: Any) -> Iterator[report.Row]:
  """Rows without and with AWP."""
  tx = optax.adam(3e-3)
  # gamma 0 is the plain step, bit for bit.
  variants = {'plain': make_step(0.0, tx),
              'AWP': make_step(arguments.gamma, tx)}
  yield from report.rows(
      'digits', variants, arguments.seeds,
      lambda step, seed: accuracy(step, tx, seed, arguments.steps))


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints test accuracies without and with AWP."""
  parser = report.Parser(__doc__, seeds=5, steps=500)
  parser.add_argument(
      '--gamma', type=report.size, default=0.05,
      help='|v| / |w| (default: 0.05)')
  return report.run(parser, compare, argv)


if __name__ == '__main__':
  main()
