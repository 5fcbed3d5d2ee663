"""Adversarial weight perturbation of any pytree of parameters.

AWP trains weights w that stay good in the worst direction near by:

  min_w max_{v in V} L(w + v),   V = { v : |v_l| <= gamma |w_l|, all leaves l }.

The inner maximum is approached from v = 0 by K2 projected steps,

  v_l <- project( v_l + (gamma / K2) |w_l| g_l / |g_l| ),   g = grad L at w + v,

and the outer step uses the gradient at w + v. With K2 = 1 that is
v_l = gamma |w_l| g_l / |g_l|: one more forward and backward pass. Norms are
Frobenius norms of whole leaves; leaves that are no weights (of fewer than two
axes, or named bias or scale) are left alone.

Adapting an existing loop takes three lines:

  >>> import jax, jax.numpy as jnp, optax
  >>> loss_fn = lambda params, x, y: jnp.mean((x @ params['w'] - y) ** 2)
  >>> params, tx = {'w': jnp.ones((2, 1))}, optax.sgd(0.1)
  >>> x, y = jnp.eye(2), jnp.zeros((2, 1))
  >>> step = awp_step(loss_fn, tx, params, tx.init(params), x, y, gamma=0.01)
  >>> print(step.perturbation['w'].T)
  [[0.01 0.01]]
  >>> print(step.params['w'].T)
  [[0.899 0.899]]

References:
  Wu, Xia, Wang, Adversarial Weight Perturbation Helps Robust Generalization,
  NeurIPS 2020.
"""

from collections.abc import Callable
import functools
from typing import Any

import optax

from awp_jax.perturbation import methods, perturbed_step
from awp_jax.perturbation.base import Method, UpdateAt
from awp_jax.perturbation.leaves import Mask, is_weight
from awp_jax.types import AWPOutput, LossFn, Params, Scalar


def _method(
    gamma: Scalar, num_steps: int, mask: Mask,
    update_at: UpdateAt = 'perturbed') -> Method:
  """AWP of one size; these functions count no steps, so it cannot change."""
  if callable(gamma):
    raise ValueError(
        'gamma must be a number, got a function: these functions count no '
        'steps, so a schedule would stay at its first value. Use '
        'perturbed_step(methods.awp(schedule), ...), whose state counts them.')
  return methods.awp(
      gamma, num_steps=num_steps, mask=mask, update_at=update_at)


def awp_perturbation(
    loss_fn: LossFn, *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Params]:
  """The weight adversary alone: a function that returns v.

  Args:
    loss_fn: as in `awp_value_and_grad`, like every other argument.
    gamma: the relative size of the perturbation.
    num_steps: K2, the adversary's steps.
    mask: which leaves are perturbed.
    has_aux: whether `loss_fn` returns a pair; its second part is dropped.
    axis_name: the axis of the devices, or None.

  Returns:
    A function of `loss_fn`'s arguments that returns v, a pytree like the
    parameters; zeros, without a pass, where `gamma` is the number 0.

  Raises:
    ValueError: as `awp_value_and_grad`.
  """
  method = _method(gamma, num_steps, mask)

  def perturbation_fn(params: Params, *args: Any, **kwargs: Any) -> Params:
    find = perturbed_step.find_perturbation(
        method, functools.partial(loss_fn, **kwargs), has_aux=has_aux,
        axis_name=axis_name)
    return find(params, method.init(params), *args)

  return perturbation_fn


def awp_value_and_grad(
    loss_fn: LossFn, *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, Params]]:
  """`jax.value_and_grad` at the adversarially perturbed weights w + v.

  A drop-in for `jax.value_and_grad(loss_fn, has_aux=has_aux)`: the returned
  function takes the same arguments, whatever their names, and returns the same
  shapes, but value and gradient are those at w + v. Every pass calls `loss_fn`
  with the same arguments, so a dropout key among them gives the same masks in
  both.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar, or (scalar, aux).
    gamma: |v_l| / |w_l|, >= 0; 0.005 to 0.01 in the paper. The number 0 is the
      plain `jax.value_and_grad`, and costs no more than it. A traced gamma is
      allowed and always pays for the adversary's passes.
    num_steps: K2 >= 1, the adversary's steps, each of gamma / K2.
    mask: which leaves are perturbed: a predicate of (path, leaf), patterns of
      paths, or a pytree of bools. By default those with two axes or more whose
      name is neither bias nor scale.
    has_aux: whether `loss_fn` returns a pair. aux comes from the pass at w + v.
    axis_name: under `pmap`, `shard_map` or `vmap(axis_name=...)`, the axis that
      the examples are spread over and the parameters replicated over. Losses
      and gradients are averaged over it, the adversary's too: there is one v
      for the whole batch. Sharded parameters need `jax.jit` and no `axis_name`.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients).

  Raises:
    ValueError: for a gamma that is negative or a function of the step, or fewer
      than one step.

  .. note::
    Weight decay that the optimizer adds sees whichever parameters it is given;
    the paper's code decays w + v. `awp_step` does that.
  """
  method = _method(gamma, num_steps, mask)

  def value_and_grad(
      params: Params, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
    gradient_fn = perturbed_step.perturbed_value_and_grad(
        method, functools.partial(loss_fn, **kwargs), has_aux=has_aux,
        axis_name=axis_name)
    return gradient_fn(params, method.init(params), *args)[0]

  return value_and_grad


def awp_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, params: Params,
    opt_state: Any, *args: Any, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    update_at: UpdateAt = 'perturbed', axis_name: str | None = None,
    return_perturbation: bool = True, **unknown: Any) -> AWPOutput:
  """One step of training with adversarial weight perturbation.

    v = the adversary's perturbation,     G = grad L(w + v),
    w <- optimizer(w + v, G) - v.

  Pure: jit it, with `loss_fn`, `tx` and the keywords closed over.

  Args:
    loss_fn: `loss_fn(params, *args)` -> scalar, or (scalar, aux).
    tx: any optax optimizer.
    params: w, any pytree of float arrays.
    opt_state: the state of `tx`.
    *args: handed to `loss_fn` behind the parameters: the batch, keys, ... By
      position only, so no name of the loss's can collide with one of these
      keywords. Bind the others: `functools.partial(loss_fn, train=True)`.
    gamma: as in `awp_value_and_grad`.
    num_steps: as in `awp_value_and_grad`.
    mask: as in `awp_value_and_grad`.
    has_aux: as in `awp_value_and_grad`.
    update_at: the parameters that `tx` is shown, hence those that its weight
      decay acts on: 'perturbed' (w + v, as in the paper's code) or 'natural'
      (w). Some optimizers need 'natural'; see `steps.apply_at_perturbed`.
    axis_name: as in `awp_value_and_grad`.
    return_perturbation: whether v is part of the output. Without it a jitted
      step needs one buffer of the size of the parameters less.
    **unknown: none is allowed.

  Returns:
    An `AWPOutput`. Its perturbation is zeros where gamma is the number 0, and
    None without `return_perturbation`.

  Raises:
    TypeError: for an unknown keyword.
    ValueError: as `awp_value_and_grad`, or for an unknown `update_at`.
  """
  if unknown:
    raise TypeError(
        f'awp_step got an unknown keyword, {", ".join(map(repr, unknown))}. '
        'Arguments of the loss go by position, behind opt_state; bind the '
        'others with functools.partial.')
  method = _method(gamma, num_steps, mask, update_at)
  out = perturbed_step.perturbed_step(
      method, loss_fn, tx, params, opt_state, method.init(params), *args,
      has_aux=has_aux, axis_name=axis_name,
      return_perturbation=return_perturbation)
  return AWPOutput(
      out.params, out.opt_state, out.loss, out.aux, out.perturbation)
