"""Adversarial training of an Equinox module with `train_step`.

  python examples/train_step_equinox.py

`train_step` takes any model as a forward function, `(params, batch_stats, x,
train, key) -> (logits, batch_stats)`. The model is the perceptron of
`equinox_model.py`, with dropout and without running statistics. The table shows
robust accuracies.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import equinox as eqx
import jax

from awp_jax import TrainState
from examples import equinox_model, report, robust_digits


def parts(seed: int) -> Any:
  """Splits a perceptron into its arrays and the static rest."""
  return eqx.partition(
      equinox_model.Perceptron(jax.random.key(seed)), eqx.is_inexact_array)


#: The perceptron without its arrays; does not depend on the seed.
STATIC = parts(seed=0)[1]


def forward_fn(
    params: Any, batch_stats: Any, x: jax.Array, train: bool,
    key: jax.Array | None) -> tuple[jax.Array, Any]:
  """Returns logits, and `batch_stats` unchanged: there are none."""
  model, x = eqx.combine(params, STATIC), x.reshape(len(x), -1)
  if not train:
    return jax.vmap(model)(x), batch_stats
  assert key is not None
  return jax.vmap(model)(x, jax.random.split(key, len(x))), batch_stats


def make_state(seed: int) -> TrainState:
  """Makes the state before the first step."""
  return TrainState.create(
      forward_fn=forward_fn, params=parts(seed)[0], tx=robust_digits.TX)


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints robust test accuracies of AT without and with AWP."""
  return robust_digits.main(__doc__, make_state, argv)


if __name__ == '__main__':
  main()
