"""Adversarial weight perturbation of any pytree of parameters.

AWP trains weights w that stay good in the worst direction near by:

  min_w max_{v in V} L(w + v),   V = { v : |v_l| <= gamma |w_l|, all leaves l }.

The inner maximum is approached from v = 0 by K2 projected steps,

  v_l <- project( v_l + (gamma / K2) |w_l| g_l / |g_l| ),   g = grad L at w + v,

and the outer step uses the gradient at w + v. With K2 = 1 that is
v_l = gamma |w_l| g_l / |g_l|: one more forward and backward pass. Norms are
Frobenius norms of whole leaves; leaves that are no weights (biases, scales:
fewer than two axes) are left alone.

A loop of one's own needs three lines of change:

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
from typing import Any

import optax

from awp_jax.perturbation import balls, methods, steps
from awp_jax.perturbation.gradients import (
  averaged_value_and_grad as averaged_value_and_grad,
)
from awp_jax.perturbation.leaves import Mask as Mask
from awp_jax.perturbation.leaves import global_norm as global_norm
from awp_jax.perturbation.leaves import is_off as is_off
from awp_jax.perturbation.leaves import is_weight as is_weight
from awp_jax.perturbation.leaves import perturb as perturb
from awp_jax.perturbation.leaves import pick, put
from awp_jax.perturbation.leaves import relative_norm as relative_norm
from awp_jax.perturbation.leaves import weight_mask as weight_mask
from awp_jax.perturbation.method import DECAY_AT as DECAY_AT
from awp_jax.perturbation.method import DecayAt as DecayAt
from awp_jax.perturbation.steps import apply_at_perturbed as apply_at_perturbed
from awp_jax.types import AWPOutput, LossFn, Params, Scalar

_BALL = balls.Ball(1.0)


def ascend(
    perturbation: Params | None, gradients: Params, params: Params, *,
    gamma: Scalar, step: Scalar, mask: Mask = is_weight) -> Params:
  """The weight adversary's step: v <- project(v + step |w| g / |g|) per leaf.

  Args:
    perturbation: v, a pytree like `params`, or None for v = 0.
    gradients: g, a pytree like `params`: the gradient of the loss at w + v.
    params: w.
    gamma: the radius of the projection relative to |w_l|, >= 0.
    step: the step's length relative to |w_l|; at most gamma if `perturbation`
      is None.
    mask: which leaves move; the others get zeros.

  Returns:
    The next v, a pytree like `params`. A leaf whose gradient or weight is zero
    keeps its v (zero, from None), never NaN; a gradient that is not finite
    gives NaN.
  """
  chosen = weight_mask(params, mask)
  w = pick(params, chosen)
  v = balls.farthest(_BALL, pick(gradients, chosen), w, step)
  if perturbation is not None:
    moved = [x + y for x, y in zip(
        pick(perturbation, chosen), v, strict=True)]
    v = balls.project(_BALL, moved, w, gamma)
  return put(v, params, chosen)


def awp_perturbation(
    loss_fn: LossFn, *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., Params | None]:
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
    parameters; None, without a pass, where `gamma` is the number 0.
  """
  method = methods.awp(gamma, num_steps=num_steps, mask=mask)
  perturbation_fn = steps.weight_perturbation(
      method, loss_fn, has_aux=has_aux, axis_name=axis_name)
  return lambda params, *args, **kwargs: perturbation_fn(
      params, method.init(params), *args, **kwargs)


def awp_value_and_grad(
    loss_fn: LossFn, *, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, Params]]:
  """`jax.value_and_grad` at the adversarially perturbed weights w + v.

  A drop-in for `jax.value_and_grad(loss_fn, has_aux=has_aux)`: the returned
  function takes the same arguments and returns the same shapes, but value and
  gradient are those at w + v. Every pass calls `loss_fn` with the same
  arguments, so a dropout key among them gives the same masks in both.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar, or (scalar, aux).
    gamma: |v_l| / |w_l|, >= 0; 0.005 to 0.01 in the paper. The number 0 is the
      plain `jax.value_and_grad`, and costs no more than it. A traced gamma is
      allowed and always pays for the adversary's passes.
    num_steps: K2 >= 1, the adversary's steps, each of gamma / K2.
    mask: which leaves are perturbed: a predicate of (path, leaf), or a pytree
      of bools. By default those with two axes or more.
    has_aux: whether `loss_fn` returns a pair. aux comes from the pass at w + v.
    axis_name: under `pmap`, `shard_map` or `vmap(axis_name=...)`, the axis that
      the examples are spread over. Losses and gradients are averaged over it,
      the adversary's too: there is one v for the whole batch.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients).

  Raises:
    ValueError: for a negative gamma or fewer than one step.

  .. note::
    Weight decay that the optimizer adds sees whichever parameters it is given;
    the paper's code decays w + v. `awp_step` does that.
  """
  method = methods.awp(gamma, num_steps=num_steps, mask=mask)
  gradient_fn = steps.perturbed_value_and_grad(
      method, loss_fn, has_aux=has_aux, axis_name=axis_name)
  return lambda params, *args, **kwargs: gradient_fn(
      params, method.init(params), *args, **kwargs)[0]


def awp_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, params: Params,
    opt_state: Any, *args: Any, gamma: Scalar, num_steps: int = 1,
    mask: Mask = is_weight, has_aux: bool = False,
    decay_at: DecayAt = 'perturbed', axis_name: str | None = None,
    **kwargs: Any) -> AWPOutput:
  """One step of training with adversarial weight perturbation.

    v = the adversary's perturbation,     G = grad L(w + v),
    w <- optimizer(w + v, G) - v.

  Pure: jit it, with `loss_fn`, `tx` and the keywords closed over.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar, or (scalar, aux).
    tx: any optax optimizer.
    params: w, any pytree of float arrays.
    opt_state: the state of `tx`.
    *args: handed to `loss_fn` behind the parameters: the batch, keys, ...
    gamma: as in `awp_value_and_grad`.
    num_steps: as in `awp_value_and_grad`.
    mask: as in `awp_value_and_grad`.
    has_aux: as in `awp_value_and_grad`.
    decay_at: where weight decay inside `tx` acts: 'perturbed' (w + v, as in the
      paper's code) or 'natural' (w).
    axis_name: as in `awp_value_and_grad`.
    **kwargs: handed to `loss_fn`.

  Returns:
    An `AWPOutput`. Its perturbation is zeros where gamma is the number 0.

  Raises:
    ValueError: for a negative gamma, fewer than one step, or an unknown
      `decay_at`.
  """
  method = methods.awp(
      gamma, num_steps=num_steps, mask=mask, decay_at=decay_at)
  out = steps.perturbed_step(
      method, loss_fn, tx, params, opt_state, method.init(params), *args,
      has_aux=has_aux, axis_name=axis_name, **kwargs)
  return AWPOutput(
      out.params, out.opt_state, out.loss, out.aux, out.perturbation)
