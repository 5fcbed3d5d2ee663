"""Adversarial training of a flax.nnx module with `train_step`.

  python examples/train_step_nnx.py

`train_step` takes any model as a forward function, `(params, batch_stats, x,
train, key) -> (logits, batch_stats)`. The model is the network of
`nnx_model.py`, with batch normalization and dropout. The table shows robust
accuracies.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

# The command above must find the library and the folder of examples.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from flax import nnx
import jax

from awp_jax import TrainState
from examples import nnx_model, report, robust_digits

#: The network without its arrays; does not depend on the seed.
GRAPH = nnx_model.parts(seed=0)[0]


def forward_fn(
    params: Any, batch_stats: Any, x: jax.Array, train: bool,
    key: jax.Array | None) -> tuple[jax.Array, Any]:
  """Returns logits and the running statistics after this pass."""
  # Copy: nnx forbids writes to variables from outside the gradient.
  model = nnx.merge(GRAPH, params, batch_stats, copy=True)
  rngs = None if key is None else nnx.Rngs(dropout=key)
  logits = model(x, train=train, rngs=rngs)
  return logits, nnx.state(model, nnx.BatchStat)


def make_state(seed: int) -> TrainState:
  """Makes the state before the first step."""
  _, params, batch_stats = nnx_model.parts(seed)
  return TrainState.create(
      forward_fn=forward_fn, params=params, batch_stats=batch_stats,
      tx=robust_digits.TX)


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
  """Prints robust test accuracies of AT without and with AWP."""
  return robust_digits.main(__doc__, make_state, argv)


if __name__ == '__main__':
  main()
