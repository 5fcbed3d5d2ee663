"""Adversarial weight perturbation of any pytree of parameters.

AWP trains weights w whose loss stays small under worst-case perturbations:

  min_w max_{v in V} L(w + v),   V = { v : |v_l| <= gamma |w_l|, all leaves l }.

The inner maximum is approximated from v = 0 by K2 projected steps,

  v_l <- project( v_l + (gamma / K2) |w_l| g_l / |g_l| ),   g = grad L at w + v,

and the outer step uses the gradient at w + v. For K2 = 1 this is
v_l = gamma |w_l| g_l / |g_l|, which costs one more forward and backward pass.
Norms are Frobenius norms of whole leaves. Leaves with fewer than two axes, or
named bias or scale, are not perturbed.

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

from awp_jax.perturbation import perturbed_step
from awp_jax.perturbation.base import UpdateAt
from awp_jax.perturbation.leaves import Mask, is_weight
from awp_jax.perturbation.methods.catalog import constant_awp
from awp_jax.types import AWPOutput, LossFn, Params, Scalar


def awp_perturbation(
    loss_fn: LossFn, *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Params]:
  """Returns a function that computes the adversarial perturbation v.

  Args:
    loss_fn: as in `awp_value_and_grad`.
    gamma: as in `awp_value_and_grad`.
    num_steps: as in `awp_value_and_grad`.
    mask: as in `awp_value_and_grad`.
    has_aux: whether `loss_fn` returns a pair; aux is dropped.
    axis_name: as in `awp_value_and_grad`.

  Returns:
    A function of `loss_fn`'s arguments that returns v, a pytree like the
    parameters. If `gamma` is the number 0, v is zero and costs no pass.

  Raises:
    ValueError: as in `awp_value_and_grad`.
  """
  method = constant_awp(gamma, num_steps, mask)

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

  A drop-in replacement for `jax.value_and_grad(loss_fn, has_aux=has_aux)`: the
  returned function takes the same arguments and returns the same structure, but
  value and gradient are those at w + v. Every pass calls `loss_fn` with the
  same arguments, so a dropout key among them gives the same masks in all
  passes.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar, or (scalar, aux).
    gamma: |v_l| / |w_l|, >= 0; 0.005 to 0.01 in the paper. The number 0 gives
      the plain `jax.value_and_grad` at no extra cost. A traced gamma always
      costs the passes of the ascent.
    num_steps: K2 >= 1, the number of ascent steps, each of gamma / K2.
    mask: which leaves are perturbed: a predicate of (path, leaf), patterns of
      paths, or a pytree of bools. By default, leaves with two or more axes that
      are not named bias or scale.
    has_aux: whether `loss_fn` returns a pair. aux comes from the pass at w + v.
    axis_name: under `pmap`, `shard_map` or `vmap(axis_name=...)`, the axis that
      shards the examples and replicates the parameters. Losses and gradients
      are averaged over it, including those of the ascent, so there is one v for
      the whole batch. For sharded parameters use `jax.jit` without `axis_name`.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients).

  Raises:
    ValueError: if gamma is negative, not finite or a function of the step, or
      `num_steps` is less than 1. The returned function raises it if `mask`
      matches no leaf or is a pytree unlike the parameters. The value of a
      traced gamma is not checked.

  .. note::
    Weight decay in the optimizer acts on the parameters passed to it. The
    paper's code decays w + v, as `awp_step` does by default.
  """
  method = constant_awp(gamma, num_steps, mask)

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

    v = the adversarial perturbation,     G = grad L(w + v),
    w <- optimizer(w + v, G) - v.

  A pure function: jit it with `loss_fn`, `tx` and the keywords closed over.

  Args:
    loss_fn: `loss_fn(params, *args)` -> scalar, or (scalar, aux).
    tx: any optax optimizer.
    params: w, any pytree of float arrays.
    opt_state: the state of `tx`.
    *args: passed to `loss_fn` after the parameters: the batch, keys, ... They
      are positional only, so that no argument of `loss_fn` collides with these
      keywords. Bind others by `functools.partial(loss_fn, train=True)`.
    gamma: as in `awp_value_and_grad`.
    num_steps: as in `awp_value_and_grad`.
    mask: as in `awp_value_and_grad`.
    has_aux: as in `awp_value_and_grad`.
    update_at: the parameters passed to `tx`, on which its weight decay acts:
      'perturbed' (w + v, as in the paper's code) or 'natural' (w). Some
      optimizers need 'natural'; see `perturbed_step.apply_at_perturbed`.
    axis_name: as in `awp_value_and_grad`.
    return_perturbation: whether the output includes v. Without it, a jitted
      step needs one parameter-sized buffer less.
    **unknown: not allowed; raises a TypeError.

  Returns:
    An `AWPOutput`. Its perturbation is zero if gamma is the number 0, and None
    without `return_perturbation`.

  Raises:
    TypeError: if there are unknown keywords.
    ValueError: as in `awp_value_and_grad`, or if `update_at` is unknown.
  """
  if unknown:
    raise TypeError(
        f'awp_step got an unknown keyword, {", ".join(map(repr, unknown))}. '
        'Pass arguments of the loss by position, after opt_state; bind the '
        'others with functools.partial.')
  method = constant_awp(gamma, num_steps, mask, update_at)
  out = perturbed_step.perturbed_step(
      method, loss_fn, tx, params, opt_state, method.init(params), *args,
      has_aux=has_aux, axis_name=axis_name,
      return_perturbation=return_perturbation)
  return AWPOutput(
      out.params, out.opt_state, out.loss, out.aux, out.perturbation)
