"""Steps with perturbed weights for a loop of one's own.

In place of `jax.value_and_grad`, or of the whole step:

  >>> import jax, jax.numpy as jnp, optax
  >>> from awp_jax.perturbation import methods
  >>> loss_fn = lambda params, x: jnp.mean((x @ params['w']) ** 2)
  >>> params, tx = {'w': jnp.eye(2)}, optax.sgd(0.5)
  >>> method, x = methods.sam(rho=1.0), jnp.array([[1.0, 0.0]])
  >>> state = method.init(params)
  >>> (loss, g), state = perturbed_value_and_grad(method, loss_fn)(
  ...     params, state, x)
  >>> print(loss, g['w'][0])
  2.0 [2. 0.]
  >>> out = perturbed_step(
  ...     method, loss_fn, tx, params, tx.init(params), state, x)
  >>> print(out.params['w'][0], out.perturbation['w'][0])
  [0. 0.] [1. 0.]
"""

from collections.abc import Callable
from typing import Any

import optax

from awp_jax import checks
from awp_jax.perturbation import engine, leaves
from awp_jax.perturbation.gradients import gradient_fns
from awp_jax.perturbation.leaves import Chosen
from awp_jax.perturbation.method import UPDATE_AT, Method, MethodState, UpdateAt
from awp_jax.types import Array, LossFn, Params, PerturbedOutput


def find_perturbation(
    method: Method, loss_fn: LossFn, *, has_aux: bool = False,
    axis_name: str | None = None) -> Callable[..., Params]:
  """The perturbation alone.

  Args:
    method: the choices.
    loss_fn: as in `perturbed_value_and_grad`.
    has_aux: whether `loss_fn` returns a pair; its second part is dropped.
    axis_name: the axis of the devices, or None.

  Returns:
    A function `(params, method_state, *args, noise_key=None, **kwargs)` -> v, a
    pytree like the parameters; zeros, without a pass, where the method's size
    is the number 0.
  """
  ascent_fn, _ = gradient_fns(
      method, loss_fn, has_aux=has_aux, axis_name=axis_name)

  def perturbation_fn(
      params: Params, method_state: MethodState, *args: Any,
      noise_key: Array | None = None, **kwargs: Any) -> Params:
    ascent = engine.ascend(
        method, method_state, engine.begin(method, method_state, noise_key),
        params, lambda shifted: ascent_fn(shifted, *args, **kwargs))
    return leaves.restore(ascent.perturbation, params)

  return perturbation_fn


def _descent(
    method: Method, loss_fn: LossFn, has_aux: bool, axis_name: str | None
) -> Callable[..., engine.Descent]:
  """The three calls of a step, with the loss's arguments filled in."""
  ascent_fn, descent_fn = gradient_fns(
      method, loss_fn, has_aux=has_aux, axis_name=axis_name)

  def descent(
      params: Params, method_state: MethodState, args: tuple[Any, ...],
      kwargs: dict[str, Any], natural_args: tuple[Any, ...] | None,
      noise_key: Array | None) -> engine.Descent:

    def perturbed_fn(shifted: Params) -> Any:
      return descent_fn(shifted, *args, **kwargs)

    def natural_fn(shifted: Params) -> Any:
      return descent_fn(shifted, *(natural_args or ()), **kwargs)

    ascent = engine.ascend(
        method, method_state, engine.begin(method, method_state, noise_key),
        params, lambda shifted: ascent_fn(shifted, *args, **kwargs))
    return engine.descend(
        method, method_state, ascent, params, perturbed_fn,
        None if natural_args is None else natural_fn)

  return descent


def perturbed_value_and_grad(
    method: Method, loss_fn: LossFn, *, has_aux: bool = False,
    axis_name: str | None = None) -> Callable[..., Any]:
  """`jax.value_and_grad` of the loss that a method descends.

    a L(w; natural_args) + b L(w + v; args)

  Every pass calls `loss_fn` with the same arguments, so a dropout key among
  them gives the same masks in all of them.

  Args:
    method: the choices.
    loss_fn: `loss_fn(params, *args, **kwargs)` -> mean loss or losses [B], or
      a pair of that and aux.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: under `pmap`, `shard_map` or `vmap(axis_name=...)`, the axis that
      the examples are spread over and the parameters replicated over. Losses
      and gradients are averaged over it, the adversary's too: there is one v
      for the whole batch. Sharded parameters need `jax.jit` and no `axis_name`.

  Returns:
    A function `(params, method_state, *args, natural_args=None, noise_key=None,
    **kwargs)` -> ((value, gradients), next method state), the value being
    (loss, aux) with `has_aux`. `natural_args` are the arguments of the pass at
    w, by default `args`; `noise_key`, for methods that draw noise, is a PRNG
    key that may be the same in every step and must be on all devices. These
    two names never reach the loss; bind arguments of the loss that are called
    like them, by `functools.partial`.
  """
  descent = _descent(method, loss_fn, has_aux, axis_name)

  def value_and_grad(
      params: Params, method_state: MethodState, *args: Any,
      natural_args: tuple[Any, ...] | None = None,
      noise_key: Array | None = None, **kwargs: Any) -> Any:
    out = descent(params, method_state, args, kwargs, natural_args, noise_key)
    value = (out.loss, out.aux) if has_aux else out.loss
    return (value, out.gradients), out.state

  return value_and_grad


def apply_at_perturbed(
    tx: optax.GradientTransformation, params: Params, opt_state: Any,
    perturbation: Chosen | None, gradients: Params, *,
    update_at: UpdateAt = 'perturbed', value: Array | None = None
) -> tuple[Params, Any]:
  """The optimizer's step from w, with gradients taken at w + v.

  Args:
    tx: the optimizer.
    params: w.
    opt_state: its state.
    perturbation: v by path, as in `engine.Descent`; None for zero.
    gradients: the gradient at w + v.
    update_at: the parameters that `tx` is shown, hence those that its weight
      decay acts on: 'perturbed' (w + v, as in the code of AWP) or 'natural'
      (w).
    value: the loss that the method descends, for optimizers that take it as an
      extra argument, such as `optax.contrib.reduce_on_plateau`. Those that
      evaluate the loss themselves, by `value_fn`, are not supported.

  Returns:
    The next w and the next optimizer state.

  Raises:
    ValueError: for an unknown `update_at`.

  .. note::
    'perturbed' is meant for weight decay. It is wrong for optimizers that keep,
    bound or measure the parameters they are shown, since these then see w + v:
    `optax.contrib.schedule_free` (drifts, even at a learning rate of 0),
    `optax.keep_params_nonnegative` (w may become negative), `optax.lamb` and
    `optax.lars` (their ratios are those of w + v), Lookahead, and projections
    in general. Give them update_at='natural'.
  """
  checks.one_of('update_at', update_at, UPDATE_AT)
  shown = (leaves.perturb(params, perturbation) if update_at == 'perturbed'
           else params)
  extra = {} if value is None else {'value': value, 'grad': gradients}
  updates, opt_state = optax.with_extra_args_support(tx).update(
      gradients, opt_state, shown, **extra)
  return optax.apply_updates(params, updates), opt_state


def perturbed_step(
    method: Method, loss_fn: LossFn, tx: optax.GradientTransformation,
    params: Params, opt_state: Any, method_state: MethodState, *args: Any,
    natural_args: tuple[Any, ...] | None = None,
    noise_key: Array | None = None, has_aux: bool = False,
    axis_name: str | None = None, return_perturbation: bool = True,
    **kwargs: Any) -> PerturbedOutput:
  """One step of training with perturbed weights.

  Pure: jit it, with `method`, `loss_fn`, `tx` and the keywords closed over.

  Args:
    method: the choices; `methods` has those of the literature.
    loss_fn: as in `perturbed_value_and_grad`.
    tx: any optax optimizer.
    params: w, any pytree of float arrays.
    opt_state: the state of `tx`.
    method_state: the state of `method`, from `method.init(params)`.
    *args: handed to `loss_fn` behind the parameters: the batch, keys, ...
    natural_args: as in `perturbed_value_and_grad`.
    noise_key: as in `perturbed_value_and_grad`.
    has_aux: as in `perturbed_value_and_grad`.
    axis_name: as in `perturbed_value_and_grad`.
    return_perturbation: whether v is part of the output. Without it a jitted
      step needs one buffer of the size of the parameters less.
    **kwargs: handed to `loss_fn`, in every pass. The keywords above never reach
      it; bind arguments of the loss that are called like them, by
      `functools.partial`.

  Returns:
    A `PerturbedOutput`. Its perturbation is zeros where there is none, and
    None without `return_perturbation`.

  Raises:
    ValueError: if the method draws noise and there is no key, or needs another
      batch and there is none.
  """
  out = _descent(method, loss_fn, has_aux, axis_name)(
      params, method_state, args, kwargs, natural_args, noise_key)
  new_params, opt_state = apply_at_perturbed(
      tx, params, opt_state, out.perturbation, out.gradients,
      update_at=method.update_at, value=out.loss)
  v = None
  if return_perturbation:
    v = leaves.restore(out.perturbation, params)
  return PerturbedOutput(
      new_params, opt_state, out.state, out.loss, out.aux, v,
      out.unperturbed_loss)
