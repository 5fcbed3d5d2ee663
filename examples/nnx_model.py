"""AWP for a flax.nnx module with batch statistics and dropout.

  python examples/nnx_model.py

A small convolutional network classifies handwritten digits (scikit-learn's, no
download) after training on a few hundred images. `nnx.split` splits the module
into parameters, which are perturbed, and running statistics, which the loss
function returns as aux. A step keeps the statistics of the pass at w + v.
"""

from collections.abc import Iterator, Sequence
import pathlib
import sys
from typing import Any

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from flax import nnx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from awp_jax import awp_step
from examples import report

NUM_TRAIN = 200
BATCH = 50


class Network(nnx.Module):
  """Two convolutions with batch normalization, dropout, a linear layer."""

  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
    self.first_norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
    self.second_norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.3)
    self.out = nnx.Linear(128, 10, rngs=rngs)

  def __call__(
      self, x: jax.Array, train: bool, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Images [B, 8, 8, 1] -> logits [B, 10]."""
    x = nnx.relu(self.first_norm(self.first(x), use_running_average=not train))
    x = nnx.relu(
        self.second_norm(self.second(x), use_running_average=not train))
    x = self.dropout(
        x.reshape(len(x), -1), deterministic=not train, rngs=rngs)
    return self.out(x)


def parts(seed: int) -> Any:
  """Splits a network: graph (no arrays), parameters, statistics."""
  return nnx.split(Network(nnx.Rngs(seed)), nnx.Param, nnx.BatchStat)


def make_step(gamma: float, tx: optax.GradientTransformation) -> Any:
  """Makes a training step, compiled once for all seeds."""
  graph, *_ = parts(seed=0)

  def loss_fn(
      params: Any, batch_stats: Any, x: jax.Array, y: jax.Array,
      key: jax.Array) -> tuple[jax.Array, Any]:
    # Copy: nnx forbids writes to variables from outside the gradient.
    model = nnx.merge(graph, params, batch_stats, copy=True)
    logits = model(x, train=True, rngs=nnx.Rngs(dropout=key))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), nnx.state(model, nnx.BatchStat)

  @jax.jit
  def step(
      params: Any, opt_state: Any, batch_stats: Any, x: jax.Array,
      y: jax.Array, key: jax.Array) -> Any:
    batch_key, dropout_key = jax.random.split(key)
    rows = jax.random.randint(batch_key, (BATCH,), 0, len(y))
    params, opt_state, _, batch_stats, _ = awp_step(
        loss_fn, tx, params, opt_state, batch_stats, x[rows], y[rows],
        dropout_key, gamma=gamma, has_aux=True)
    return params, opt_state, batch_stats

  return step


def accuracy(
    step: Any, tx: optax.GradientTransformation, seed: int, steps: int
) -> float:
  """Trains on 200 digits; returns the accuracy on the others."""
  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype('float32') / 16
  x, x_test, y, y_test = map(jnp.asarray, train_test_split(
      images, labels, train_size=NUM_TRAIN, stratify=labels,
      random_state=seed))
  graph, params, batch_stats = parts(seed)
  opt_state, loop_key = tx.init(params), jax.random.key(seed)
  for number in range(steps):
    params, opt_state, batch_stats = step(
        params, opt_state, batch_stats, x, y,
        jax.random.fold_in(loop_key, number))
  logits = nnx.merge(graph, params, batch_stats)(x_test, train=False)
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
  parser = report.Parser(__doc__, seeds=3, steps=300)
  parser.add_argument(
      '--gamma', type=report.size, default=0.05,
      help='|v| / |w| (default: 0.05)')
  return report.run(parser, compare, argv)


if __name__ == '__main__':
  main()
