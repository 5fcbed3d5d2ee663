"""AWP for a perceptron on tables, with a plain dict of parameters.

  python examples/tabular.py                # natural inputs
  python examples/tabular.py --eps=0.05     # trained and tested under attack

The data are scikit-learn's breast cancer and wine tables (no download), half of
the rows for training, columns scaled to [0, 1]. With `--eps`, PGD attacks the
training and test inputs in the L_inf ball of that radius: adversarial training,
the setting for which AWP was proposed.
"""

from collections.abc import Iterator, Sequence
import functools
import pathlib
import sys
from typing import Any

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler

from awp_jax import ThreatModel, awp_step, pgd
from examples import report

TABLES = {'cancer': load_breast_cancer, 'wine': load_wine}
HIDDEN = 64
BATCH = 32
ATTACK_STEPS = 5

Params = dict[str, jax.Array]


def init(key: jax.Array, columns: int, classes: int) -> Params:
  """Initializes two layers."""
  keys = jax.random.split(key)
  scale = jax.nn.initializers.he_normal()
  return {'hidden': scale(keys[0], (columns, HIDDEN)),
          'hidden_bias': jnp.zeros(HIDDEN),
          'out': scale(keys[1], (HIDDEN, classes)),
          'out_bias': jnp.zeros(classes)}


def logits_of(params: Params, x: jax.Array) -> jax.Array:
  """Inputs [B, columns] -> logits [B, classes]."""
  hidden = jax.nn.relu(x @ params['hidden'] + params['hidden_bias'])
  return hidden @ params['out'] + params['out_bias']


def losses(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
  """Cross-entropies [B]."""
  return optax.softmax_cross_entropy_with_integer_labels(
      logits_of(params, x), y)


def attacked(
    key: jax.Array, params: Params, x: jax.Array, y: jax.Array, eps: float
) -> jax.Array:
  """Attacks the inputs by PGD if eps > 0."""
  if eps == 0:
    return x
  return pgd(key, lambda x: losses(params, x, y), x, ThreatModel('Linf', eps),
             step_size=eps / 4, num_steps=ATTACK_STEPS)


def mean_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
  """Training loss of the weights."""
  return losses(params, x, y).mean()


@functools.partial(jax.jit, static_argnames=('gamma', 'eps', 'tx'))
def step(
    params: Params, opt_state: Any, x: jax.Array, y: jax.Array, key: jax.Array,
    gamma: float, eps: float, tx: optax.GradientTransformation) -> Any:
  """One step on a batch drawn from the rows."""
  batch_key, attack_key = jax.random.split(key)
  rows = jax.random.randint(batch_key, (BATCH,), 0, len(y))
  x, y = attacked(attack_key, params, x[rows], y[rows], eps), y[rows]
  # These three lines replace value_and_grad, tx.update and apply_updates.
  params, opt_state, *_ = awp_step(
      mean_loss, tx, params, opt_state, x, y, gamma=gamma)
  return params, opt_state


@functools.partial(jax.jit, static_argnames='eps')
def evaluate(
    params: Params, x: jax.Array, y: jax.Array, key: jax.Array, eps: float
) -> jax.Array:
  """Accuracy on the inputs, attacked if eps > 0."""
  x = attacked(key, params, x, y, eps)
  return (logits_of(params, x).argmax(-1) == y).mean()


def accuracy(
    table: str, eps: float, steps: int, gamma: float, seed: int) -> float:
  """Trains on half of the rows; returns the accuracy on the others."""
  columns, labels = TABLES[table](return_X_y=True)
  x, x_test, y, y_test = train_test_split(
      columns.astype('float32'), labels, train_size=0.5, stratify=labels,
      random_state=seed)
  scaler = MinMaxScaler(clip=True).fit(x)
  x, x_test = jnp.asarray(scaler.transform(x)), scaler.transform(x_test)
  init_key, loop_key, test_key = jax.random.split(jax.random.key(seed), 3)
  params = init(init_key, x.shape[1], int(y.max()) + 1)
  tx = optimizer()
  opt_state, y = tx.init(params), jnp.asarray(y)
  for number in range(steps):
    params, opt_state = step(
        params, opt_state, x, y, jax.random.fold_in(loop_key, number), gamma,
        eps, tx)
  return float(evaluate(params, x_test, y_test, test_key, eps))


@functools.cache
def optimizer() -> optax.GradientTransformation:
  """One object for all seeds, so that they share compiled functions."""
  return optax.adam(3e-3)


def compare(arguments: Any) -> Iterator[report.Row]:
  """Rows for every table, without and with AWP."""
  if arguments.eps >= 1:
    raise ValueError(
        f'--eps must be < 1, as columns are scaled to [0, 1], got '
        f'{arguments.eps}.')
  for table in TABLES:
    # gamma 0 is the plain step, bit for bit.
    yield from report.rows(
        table, {'plain': 0.0, 'AWP': arguments.gamma}, arguments.seeds,
        functools.partial(
            accuracy, table, arguments.eps, arguments.steps))


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints test accuracies without and with AWP."""
  parser = report.Parser(__doc__, seeds=10, steps=300)
  parser.add_argument(
      '--gamma', type=report.size, default=0.01,
      help='|v| / |w| (default: 0.01)')
  parser.add_argument(
      '--eps', type=report.size, default=0.0,
      help='L_inf radius of the attack on the inputs (default: 0, none)')
  return report.run(parser, compare, argv)


if __name__ == '__main__':
  main()
