"""AWP for Equinox modules: replaces `eqx.filter_value_and_grad` in a loop.

  loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)

becomes

  loss, grads = awp_value_and_grad(loss_fn, gamma=0.01)(model, batch)

with the gradient at w + v.

  >>> import equinox as eqx, jax, jax.numpy as jnp
  >>> model = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
  >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.ones((1, 2)))
  >>> loss_fn = lambda model, x: jnp.mean(jax.vmap(model)(x))
  >>> x = jnp.array([[1.0, 0.0]])
  >>> loss, grads = awp_value_and_grad(loss_fn, gamma=0.5)(model, x)
  >>> plain, _ = eqx.filter_value_and_grad(loss_fn)(model, x)
  >>> print(plain, f'{loss:.4f}', grads.weight)
  1.0 1.7071 [[1. 0.]]
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import equinox as eqx
import jax

from awp_jax.frameworks.functions import ModelFunctions
from awp_jax.perturbation import perturbed_step
from awp_jax.perturbation.base import Method, MethodState
from awp_jax.perturbation.leaves import Mask, is_weight
from awp_jax.perturbation.methods.catalog import constant_awp
from awp_jax.types import Array, Params, Scalar

#: The axis over which stateful Equinox layers such as `eqx.nn.BatchNorm` see a
#: batch.
AXIS = 'batch'


def perturbed_value_and_grad(
    method: Method, loss_fn: Callable[..., Any], *, has_aux: bool = False,
    axis_name: str | None = None) -> Callable[..., Any]:
  """`eqx.filter_value_and_grad` of the loss that a method descends.

  `awp_jax.perturbed_value_and_grad` for a function of a module.

  Args:
    method: the method.
    loss_fn: `loss_fn(model, *args, **kwargs)` -> mean loss or losses [B], or a
      pair of that and aux.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: as in `awp_jax.perturbed_value_and_grad`.

  Returns:
    A function `(model, method_state, *args, natural_args=None, noise_key=None,
    **kwargs)` -> ((value, gradients), next method state), with the gradients
    of `eqx.filter_value_and_grad`: None for what is not an inexact array. The
    first method state is `method.init(eqx.filter(model,
    eqx.is_inexact_array))`.
  """

  def value_and_grad(
      model: Any, method_state: MethodState, *args: Any,
      natural_args: tuple[Any, ...] | None = None,
      noise_key: Array | None = None, **kwargs: Any) -> Any:
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def pure_fn(params: Params, *args: Any) -> Any:
      return loss_fn(eqx.combine(params, static), *args, **kwargs)

    return perturbed_step.perturbed_value_and_grad(
        method, pure_fn, has_aux=has_aux, axis_name=axis_name)(
            params, method_state, *args, natural_args=natural_args,
            noise_key=noise_key)

  return value_and_grad


def awp_value_and_grad(
    loss_fn: Callable[..., Any], *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None) -> Callable[..., Any]:
  """`eqx.filter_value_and_grad` at the perturbed weights w + v.

  A drop-in replacement for `eqx.filter_value_and_grad(loss_fn,
  has_aux=has_aux)`, also inside `eqx.filter_jit`.

  Args:
    loss_fn: `loss_fn(model, *args, **kwargs)` -> scalar, or (scalar, aux).
      Every pass gets the same arguments, so a dropout key among them gives the
      same masks in all passes.
    gamma: |v_l| / |w_l|, >= 0, as in `awp_jax.awp_value_and_grad`. The number 0
      gives the plain gradient at no extra cost.
    num_steps: K2 >= 1, the number of ascent steps.
    mask: which parameters are perturbed, as in `awp_jax.awp_value_and_grad`;
      paths are those of the module's fields, as 'layers/0/weight'.
    has_aux: whether `loss_fn` returns a pair. aux comes from the pass at w + v.
    axis_name: as in `awp_jax.awp_value_and_grad`.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients).

  Raises:
    ValueError: as `awp_jax.awp_value_and_grad`.
  """
  method = constant_awp(gamma, num_steps, mask)

  def value_and_grad(model: Any, *args: Any, **kwargs: Any) -> Any:
    # Bound, so that no keyword of the loss collides with one of ours.
    gradient_fn = perturbed_value_and_grad(
        method, functools.partial(loss_fn, **kwargs), has_aux=has_aux,
        axis_name=axis_name)
    params = eqx.filter(model, eqx.is_inexact_array)
    return gradient_fn(model, method.init(params), *args)[0]

  return value_and_grad


def as_functions(
    model: Any, state: eqx.nn.State | None = None) -> ModelFunctions:
  """A module as parameters, running statistics and a forward function.

  For `TrainState.create`, whose `train_step` attacks inputs and perturbs
  weights:

    state = TrainState.create(**as_functions(model)._asdict(), tx=tx)

  Args:
    model: called on one example as `model(x)`, or with a state as
      `model(x, state)`, and with `key=` if its `__call__` has this argument.
      In eval mode it is `eqx.nn.inference_mode(model)`.
    state: the state from `eqx.nn.make_with_state`, for modules with running
      statistics. Their `axis_name` must be 'batch', and on several devices
      `eqx.nn.BatchNorm` needs mode='batch'; its mode 'ema' fails under `pmap`.
      Statistics are those of each device.

  Returns:
    The functions. `eqx.combine(state.params, model)` returns trained arrays to
    the module.
  """
  params, static = eqx.partition(model, eqx.is_inexact_array)
  takes_key = 'key' in inspect.signature(type(model).__call__).parameters
  statistics, rest = (
      ({}, None) if state is None else eqx.partition(state, eqx.is_array))

  def forward_fn(
      params: Params, batch_stats: Any, x: Array, train: bool,
      key: Array | None) -> tuple[Array, Any]:
    network = eqx.combine(params, static)
    if not train:
      network = eqx.nn.inference_mode(network)
    keys = None if key is None else jax.random.split(key, len(x))

    def one(x: Array, moved: Any, key: Array | None) -> tuple[Array, Any]:
      options = {'key': key} if takes_key else {}
      if state is None:
        return network(x, **options), moved
      return network(x, moved, **options)

    moved = batch_stats if state is None else eqx.combine(batch_stats, rest)
    logits, moved = jax.vmap(
        one, axis_name=AXIS, in_axes=(0, None, 0), out_axes=(0, None))(
            x, moved, keys)
    return logits, (
        moved if state is None else eqx.filter(moved, eqx.is_array))

  return ModelFunctions(forward_fn, params, statistics)
