"""AWP for flax.nnx modules: replaces `nnx.value_and_grad` in a loop.

  loss, grads = nnx.value_and_grad(loss_fn)(model, batch)

becomes

  loss, grads = awp_value_and_grad(loss_fn, gamma=0.01)(model, batch)

with the gradient at w + v. The model keeps its parameters w. Other variables
that the loss updates in place (batch statistics, dropout streams, metrics), in
the model or in other arguments, and other arrays of the model hold what the
pass at w + v left: every pass starts from the state before the call, so all
passes use the same dropout masks and nothing is counted twice. Modules that the
loss takes from its closure cannot be updated, and changes of other attributes,
as by `model.train()`, are not kept: set the mode before the call.

  >>> import jax, jax.numpy as jnp
  >>> from flax import nnx
  >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
  >>> model.kernel[...] = jnp.ones((2, 1))
  >>> loss_fn = lambda model, x: jnp.mean(model(x))
  >>> x = jnp.array([[1.0, 0.0]])
  >>> loss, grads = awp_value_and_grad(loss_fn, gamma=0.5)(model, x)
  >>> plain, _ = nnx.value_and_grad(loss_fn)(model, x)
  >>> print(plain, f'{loss:.4f}', model.kernel[...].T)
  1.0 1.7071 [[1. 1.]]
"""

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

from flax import nnx
import jax

from awp_jax.frameworks.functions import ModelFunctions
from awp_jax.perturbation import perturbed_step
from awp_jax.perturbation.base import Method, MethodState
from awp_jax.perturbation.leaves import Mask, is_weight
from awp_jax.perturbation.methods.catalog import constant_awp
from awp_jax.types import Array, Params, Scalar

#: `nnx.split`, whose types do not cover a variable number of filters.
_split_by: Any = nnx.split


class _Call(NamedTuple):
  """A call of the loss, split into parameters and the rest.

  Attributes:
    graph: the structure of model and arguments, without arrays.
    rest: all arrays but the parameters.
  """

  graph: Any
  rest: Any


def _is_parameter(wrt: Any) -> Callable[..., bool]:
  """Selects variables of the model, the first of a call's arguments."""
  chosen = nnx.filterlib.to_predicate(wrt)

  def select(path: tuple[Any, ...], value: Any) -> bool:
    return path[:1] == (0,) and chosen(path[1:], value)

  return select


def _no_module(model: Any) -> TypeError:
  return TypeError(
      'the first argument of the loss must be an nnx.Module, got '
      f'{type(model).__name__}.')


def _split(
    wrt: Any, model: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Params, _Call]:
  if not isinstance(model, nnx.Module):
    raise _no_module(model)
  graph, params, rest = _split_by(
      (model, args, kwargs), _is_parameter(wrt), ...)
  # Without the position of the model, so that paths are those of its state.
  return params.get(0, {}), _Call(graph, rest)


def perturbed_value_and_grad(
    method: Method, loss_fn: Callable[..., Any], *, has_aux: bool = False,
    axis_name: str | None = None, wrt: Any = nnx.Param) -> Callable[..., Any]:
  """`nnx.value_and_grad` of the loss that a weight perturbation descends.

  `awp_jax.perturbed_value_and_grad` for a function of a module.

  Args:
    method: the method.
    loss_fn: `loss_fn(model, *args, **kwargs)` -> mean loss or losses [B], or a
      pair of that and aux, a pytree of arrays. It may update the module and
      other nnx objects among its arguments in place.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: under `pmap` or `shard_map`, the axis that shards the examples;
      as in `awp_jax.perturbed_value_and_grad`. Batch statistics are not
      averaged over it.
    wrt: a filter of the variables that are parameters: perturbed and
      differentiated.

  Returns:
    A function `(model, method_state, *args, natural_args=None, noise_key=None,
    **kwargs)` -> ((value, gradients), next method state). The first method
    state is `method.init(nnx.state(model, wrt))`. Gradients are an `nnx.State`,
    as from `nnx.value_and_grad`; value is (loss, aux) with `has_aux`.

  Raises:
    TypeError: by the returned function, if its first argument is no module.
  """
  run = _make(method, loss_fn, has_aux, axis_name, wrt)

  def value_and_grad(
      model: nnx.Module, method_state: MethodState, *args: Any,
      natural_args: tuple[Any, ...] | None = None,
      noise_key: Array | None = None, **kwargs: Any) -> Any:
    return run(model, method_state, args, kwargs, natural_args, noise_key)

  return value_and_grad


def _make(
    method: Method, loss_fn: Callable[..., Any], has_aux: bool,
    axis_name: str | None, wrt: Any) -> Callable[..., Any]:
  """The function of `perturbed_value_and_grad`, with keywords in a dict.

  No keyword of the loss can then collide with one of ours.
  """

  def pure_fn(params: Params, call: _Call) -> Any:
    # A copy: the passes must not see what the others updated.
    model, args, kwargs = nnx.merge(
        call.graph, {0: params}, call.rest, copy=True)
    out = loss_fn(model, *args, **kwargs)
    loss, aux = out if has_aux else (out, None)
    # Together, so that parameters shared with an argument are left out.
    _, _, variables, arrays = _split_by(
        (model, args, kwargs), _is_parameter(wrt), nnx.Variable, ...)
    return loss, (variables, arrays.get(0, {}), aux)

  gradient_fn = perturbed_step.perturbed_value_and_grad(
      method, pure_fn, has_aux=True, axis_name=axis_name)

  def run(
      model: nnx.Module, method_state: MethodState, args: tuple[Any, ...],
      kwargs: dict[str, Any], natural_args: tuple[Any, ...] | None = None,
      noise_key: Array | None = None) -> Any:
    params, call = _split(wrt, model, args, kwargs)
    natural = None
    if natural_args is not None:
      natural = (_split(wrt, model, natural_args, kwargs)[1],)
    ((loss, (variables, own, aux)), gradients), method_state = gradient_fn(
        params, method_state, call, natural_args=natural, noise_key=noise_key)
    nnx.update((model, args, kwargs), variables)
    nnx.update(model, own)
    value = (loss, aux) if has_aux else loss
    return (value, gradients), method_state

  return run


def awp_value_and_grad(
    loss_fn: Callable[..., Any], *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None, wrt: Any = nnx.Param) -> Callable[..., Any]:
  """`nnx.value_and_grad` at the adversarially perturbed weights w + v.

  A drop-in replacement for `nnx.value_and_grad(loss_fn, has_aux=has_aux)` of a
  loss whose first argument is a module, also inside `nnx.jit`: the returned
  function takes the same arguments and returns the same structure.

  Args:
    loss_fn: `loss_fn(model, *args, **kwargs)` -> scalar, or (scalar, aux); see
      `perturbed_value_and_grad`.
    gamma: |v_l| / |w_l|, >= 0, as in `awp_jax.awp_value_and_grad`. The number 0
      gives the plain gradient at no extra cost.
    num_steps: K2 >= 1, the number of ascent steps.
    mask: which parameters are perturbed, as in `awp_jax.awp_value_and_grad`;
      paths are those of the module's attributes, as 'layers/0/kernel'.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: as in `perturbed_value_and_grad`.
    wrt: as in `perturbed_value_and_grad`.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients).

  Raises:
    ValueError: as `awp_jax.awp_value_and_grad`.
    TypeError: by the returned function, if its first argument is no module.
  """
  method = constant_awp(gamma, num_steps, mask)
  run = _make(method, loss_fn, has_aux, axis_name, wrt)

  def value_and_grad(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(model, nnx.Module):
      raise _no_module(model)
    return run(model, method.init(nnx.state(model, wrt)), args, kwargs)[0]

  return value_and_grad


#: Variables that neither are parameters nor carry over to the next pass.
_TEMPORARY = nnx.Any(nnx.RngState, nnx.Intermediate)


#: Arguments of `__call__` that set its mode -> their value in train mode.
_MODES = {'train': True, 'training': True, 'is_training': True,
          'deterministic': False, 'use_running_average': False}


def as_functions(model: nnx.Module) -> ModelFunctions:
  """A module as parameters, running statistics and a forward function.

  For `TrainState.create`, whose `train_step` attacks inputs and perturbs
  weights:

    state = TrainState.create(**as_functions(model)._asdict(), tx=tx)

  Args:
    model: called as `model(x)` on a batch, with `rngs=` and one of `train=`,
      `training=`, `is_training=`, `deterministic=` and `use_running_average=`
      if its `__call__` has these arguments. Without the latter, its modes are
      set by `model.train()` and `model.eval()`. It is not modified.

  Returns:
    The functions. `nnx.update(model, state.params, state.batch_stats)` returns
    trained arrays to the module. Statistics are all variables but parameters,
    random streams and intermediates. In every pass all streams are seeded anew
    from the key of the step.

  Raises:
    ValueError: by the forward function, if the module draws random numbers in
      evaluation mode.
  """
  graph, params, keys, counts, rest = _split_by(
      model, nnx.Param, nnx.RngKey, nnx.RngCount, ...)
  temporary, batch_stats = nnx.filter_state(rest, _TEMPORARY, ...)
  takes = inspect.signature(type(model).__call__).parameters

  def forward_fn(
      params: Params, batch_stats: Any, x: Array, train: bool,
      key: Array | None) -> tuple[Array, Any]:
    seeds = keys if key is None else _seeded(keys, key)
    network = nnx.merge(
        graph, params, seeds, counts, temporary, batch_stats, copy=True)
    before = jax.tree.leaves(nnx.state(network, nnx.RngCount))
    # Both, since layers may follow either.
    (network.train if train else network.eval)()
    options: dict[str, Any] = {
        name: train == is_on for name, is_on in _MODES.items() if name in takes}
    if 'rngs' in takes:
      options['rngs'] = None if key is None else nnx.Rngs(key)
    logits = network(x, **options)
    if not train and any(
        new is not old for new, old in zip(
            jax.tree.leaves(nnx.state(network, nnx.RngCount)), before,
            strict=True)):
      raise ValueError(
          f'{type(model).__name__} draws random numbers in evaluation mode, '
          'where it must be deterministic.')
    return logits, nnx.state(
        network, nnx.Not(nnx.Any(nnx.Param, _TEMPORARY)))

  return ModelFunctions(forward_fn, params, batch_stats)


def _seeded(keys: Any, key: Array) -> Any:
  """Random streams with different keys derived from one."""
  leaves, structure = jax.tree.flatten(keys)
  return jax.tree.unflatten(structure, [
      jax.random.fold_in(key, number) for number in range(len(leaves))])
