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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from awp_jax import checks
from awp_jax.types import (
  Array,
  AWPOutput,
  LeafPredicate,
  LossFn,
  Params,
  Scalar,
)

#: Which leaves are perturbed: a predicate, or a pytree of bools like the
#: parameters.
Mask = LeafPredicate | Params

DecayAt = Literal['perturbed', 'natural']
DECAY_AT: tuple[DecayAt, ...] = ('perturbed', 'natural')


def is_weight(path: str, leaf: Array) -> bool:
  """Whether a leaf has two axes or more, as kernels do and biases do not."""
  del path
  return jnp.ndim(leaf) > 1


def weight_mask(params: Params, mask: Mask = is_weight) -> Params:
  """True at each leaf that is to be perturbed.

  Args:
    params: any pytree of arrays.
    mask: a predicate of (path, leaf), the path being like 'conv1/kernel', or
      the finished pytree of bools, which is checked and returned.

  Returns:
    A pytree of Python bools with the structure of `params`.

  Raises:
    ValueError: if `mask` is a pytree of another structure.
  """
  if callable(mask):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: bool(mask(
            jax.tree_util.keystr(path, simple=True, separator='/'), leaf)),
        params)
  wanted: Any = jax.tree.structure(params)
  got: Any = jax.tree.structure(mask)
  if got != wanted:
    raise ValueError(
        'mask must be a predicate of (path, leaf) or a pytree of bools like '
        f'the parameters, {wanted}, got {got}.')
  return mask


def _wide(leaf: Array) -> Array:
  """Half precision is widened: its range is too short for squares."""
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _unit_and_norm(leaf: Array) -> tuple[Array, Array]:
  """leaf / |leaf| and |leaf|; both 0 for a leaf of zeros.

  Scaled by the largest entry first, so that tiny gradients do not vanish (nor
  huge ones overflow) when squared; what is left has a norm of at least 1.
  """
  wide = _wide(leaf)
  largest = jnp.max(jnp.abs(wide), initial=0)
  scaled = wide / jnp.where(largest > 0, largest, 1)
  norm = jnp.sqrt(jnp.sum(jnp.square(scaled)))
  return scaled / jnp.maximum(norm, 1), largest * norm


def _ascend_leaf(
    perturbation: Array | None, gradient: Array, weight: Array, gamma: Scalar,
    step: Scalar) -> Array:
  """One projected step of a leaf; `perturbation` None stands for zero."""
  direction, _ = _unit_and_norm(gradient)
  _, weight_norm = _unit_and_norm(weight)
  moved = step * weight_norm * direction
  if perturbation is None:
    return moved.astype(weight.dtype)
  direction, norm = _unit_and_norm(_wide(perturbation) + moved)
  radius = gamma * weight_norm
  return (jnp.minimum(norm, radius) * direction).astype(weight.dtype)


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
  if perturbation is None:
    return jax.tree.map(
        lambda m, g, w: _ascend_leaf(None, g, w, gamma, step) if m
        else jnp.zeros_like(w), chosen, gradients, params)
  return jax.tree.map(
      lambda m, v, g, w: _ascend_leaf(v, g, w, gamma, step) if m
      else jnp.zeros_like(w), chosen, perturbation, gradients, params)


def perturb(params: Params, perturbation: Params | None) -> Params:
  """w + v; `params` itself where v is None."""
  if perturbation is None:
    return params
  return jax.tree.map(jnp.add, params, perturbation)


def averaged_value_and_grad(
    loss_fn: LossFn, *, has_aux: bool = False, axis_name: str | None = None
) -> Callable[..., tuple[Any, Params]]:
  """`jax.value_and_grad` of the loss averaged over the devices of an axis.

  The loss is averaged inside the differentiated function and the gradient
  outside of it. That is right under `pmap`, `vmap` and `shard_map`, whether or
  not the latter tracks which values vary (`check_vma`): where it does, the
  gradient with respect to replicated parameters is already a sum over devices,
  and averaging the gradient alone would leave it too large by their number.

  Args:
    loss_fn: as in `awp_value_and_grad`.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: the axis of the devices, or None.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients), the
    value being (loss, aux) with `has_aux`. aux is this device's own.
  """

  def averaged(params: Params, *args: Any, **kwargs: Any) -> Any:
    out = loss_fn(params, *args, **kwargs)
    loss, aux = out if has_aux else (out, None)
    if axis_name is not None:
      loss = jax.lax.pmean(loss, axis_name)
    return loss, aux

  def value_and_grad(params: Params, *args: Any, **kwargs: Any) -> Any:
    (loss, aux), gradients = jax.value_and_grad(averaged, has_aux=True)(
        params, *args, **kwargs)
    if axis_name is not None:
      gradients = jax.lax.pmean(gradients, axis_name)
    return ((loss, aux) if has_aux else loss), gradients

  return value_and_grad


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
  _check(gamma, num_steps)
  gradient_fn = averaged_value_and_grad(
      loss_fn, has_aux=has_aux, axis_name=axis_name)

  def perturbation_fn(
      params: Params, *args: Any, **kwargs: Any) -> Params | None:
    if is_off(gamma):
      return None
    perturbation = None
    for _ in range(num_steps):
      _, gradients = gradient_fn(
          perturb(params, perturbation), *args, **kwargs)
      perturbation = ascend(
          perturbation, gradients, params, gamma=gamma, step=gamma / num_steps,
          mask=mask)
    return perturbation

  return perturbation_fn


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
  perturbation_fn = awp_perturbation(
      loss_fn, gamma=gamma, num_steps=num_steps, mask=mask, has_aux=has_aux,
      axis_name=axis_name)
  gradient_fn = averaged_value_and_grad(
      loss_fn, has_aux=has_aux, axis_name=axis_name)

  def value_and_grad(params: Params, *args: Any, **kwargs: Any) -> Any:
    perturbation = perturbation_fn(params, *args, **kwargs)
    return gradient_fn(perturb(params, perturbation), *args, **kwargs)

  return value_and_grad


def apply_at_perturbed(
    tx: optax.GradientTransformation, params: Params, opt_state: Any,
    perturbation: Params | None, gradients: Params, *,
    decay_at: DecayAt = 'perturbed') -> tuple[Params, Any]:
  """The optimizer's step from w, with gradients taken at w + v.

  Args:
    tx: the optimizer.
    params: w.
    opt_state: its state.
    perturbation: v, or None for zero.
    gradients: the gradient at w + v.
    decay_at: the parameters that `tx` is shown, hence those that weight decay
      acts on: 'perturbed' (w + v, as in the paper's code) or 'natural' (w).

  Returns:
    The next w and the next optimizer state.
  """
  checks.one_of('decay_at', decay_at, DECAY_AT)
  shown = perturb(params, perturbation) if decay_at == 'perturbed' else params
  updates, opt_state = tx.update(gradients, opt_state, shown)
  return optax.apply_updates(params, updates), opt_state


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
  perturbation_fn = awp_perturbation(
      loss_fn, gamma=gamma, num_steps=num_steps, mask=mask, has_aux=has_aux,
      axis_name=axis_name)
  gradient_fn = averaged_value_and_grad(
      loss_fn, has_aux=has_aux, axis_name=axis_name)

  perturbation = perturbation_fn(params, *args, **kwargs)
  value, gradients = gradient_fn(
      perturb(params, perturbation), *args, **kwargs)
  loss, aux = value if has_aux else (value, None)
  new_params, opt_state = apply_at_perturbed(
      tx, params, opt_state, perturbation, gradients, decay_at=decay_at)
  if perturbation is None:
    perturbation = jax.tree.map(jnp.zeros_like, params)
  return AWPOutput(new_params, opt_state, loss, aux, perturbation)


def is_off(gamma: Scalar) -> bool:
  """Whether `gamma` is the number 0; a traced or device value never counts."""
  return not isinstance(gamma, jax.Array) and gamma == 0


def global_norm(tree: Params) -> Array:
  """sqrt of the sum of squares over all leaves, in float32 or wider."""
  squares = [jnp.sum(jnp.square(_wide(leaf))) for leaf in jax.tree.leaves(tree)]
  return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.float32(0)


def relative_norm(
    perturbation: Params | None, params: Params, mask: Mask = is_weight
) -> Array:
  """|v| / |w| over the chosen leaves; 0 for no perturbation or w = 0."""
  if perturbation is None:
    return jnp.float32(0)
  chosen = jax.tree.map(
      lambda m, w: w if m else jnp.zeros_like(w), weight_mask(params, mask),
      params)
  norm = global_norm(chosen)
  return global_norm(perturbation) / jnp.where(norm > 0, norm, 1)


def _check(gamma: Scalar, num_steps: int) -> None:
  checks.not_negative('gamma', gamma)
  checks.count('num_steps', num_steps)
