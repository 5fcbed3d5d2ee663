"""A model of any framework as parameters, statistics and a function."""

from typing import Any, NamedTuple

from awp_jax.types import ForwardFn, Params


class ModelFunctions(NamedTuple):
  """The arguments of `TrainState.create` that describe a model.

  Attributes:
    forward_fn: the model; see `awp_jax.ForwardFn`.
    params: its parameters, a pytree of arrays.
    batch_stats: its running statistics, a pytree of arrays.
  """

  forward_fn: ForwardFn
  params: Params
  batch_stats: Any
