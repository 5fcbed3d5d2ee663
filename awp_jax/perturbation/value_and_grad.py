"""Gradients of mean losses over devices and micro-batches.

Both equal the gradient of the whole batch on one device:

  >>> import jax, jax.numpy as jnp
  >>> loss_fn = lambda w, x: jnp.mean((w * x) ** 2)
  >>> x = jnp.arange(8.0)
  >>> whole = jax.grad(loss_fn)(2.0, x)
  >>> print(whole, jax.grad(accumulated(loss_fn, 4))(2.0, x))
  70.0 70.0
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awp_jax.core import checks, loops, numerics, sharding
from awp_jax.perturbation import leaves
from awp_jax.perturbation.base import Method
from awp_jax.types import Array, LossFn, Params, Scalar

Reduce = Callable[[Array], Array]


def mean_loss(losses: Array) -> Array:
  """The mean of losses [B]; scalars are returned unchanged."""
  return losses if jnp.ndim(losses) == 0 else jnp.mean(losses)


def mean_below(threshold: Scalar) -> Reduce:
  """(1 / B) sum of the losses [B] below `threshold`; B counts all examples."""

  def reduce(losses: Array) -> Array:
    if jnp.ndim(losses) == 0:
      raise ValueError(
          'a threshold on examples needs a loss function that returns '
          'per-example losses [B], got a scalar.')
    return jnp.mean(jnp.where(losses < threshold, losses, 0))

  return reduce


def _check_replicated(params: Params, axis_name: str | None) -> None:
  varying = [
      path for path, leaf in zip(
          leaves.leaf_paths(params), jax.tree.leaves(params), strict=True)
      if axis_name is not None and sharding.varying_axes(leaf)]
  if varying:
    raise ValueError(
        f'parameters must be replicated over axis {axis_name!r}, but these '
        f'vary over a mesh axis: {", ".join(varying[:5])}. Their norms '
        'would be those of a shard. For sharded parameters use jax.jit without '
        'axis_name. A noise_key must be the same on all devices.')


def _mean_over_parts(
    loss_fn: Callable[..., Any], num_parts: int, axis_name: str | None,
    params: Params, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
  """((loss, aux), gradients) averaged over parts [M, ...] and devices.

  Only a sum of gradients is kept. Devices communicate once, after it: the
  gradients of the parts are with respect to each device's own copy of w.
  """
  local = params if axis_name is None else sharding.as_local(params, axis_name)

  @jax.jit  # traced once; XLA inlines its calls
  def part_fn(part: tuple[Any, ...]) -> tuple[Any, Any]:
    (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        local, *part, **kwargs)
    return (loss, jax.tree.map(numerics.wide, gradients)), aux

  total, aux = loops.summed(num_parts, part_fn, args)
  loss, gradients = jax.tree.map(lambda leaf: leaf / num_parts, total)
  if axis_name is not None:
    loss = jax.lax.pmean(loss, axis_name)
  return (loss, aux), jax.tree.map(
      lambda gradient, w: gradient.astype(w.dtype), gradients, params)


def averaged_value_and_grad(
    loss_fn: LossFn, *, has_aux: bool = False, axis_name: str | None = None,
    reduce: Reduce = mean_loss, num_parts: int = 1
) -> Callable[..., tuple[Any, Params]]:
  """`jax.value_and_grad` of the loss averaged over the devices of an axis.

  The loss is averaged inside the differentiated function and the gradient
  outside. This is correct under `pmap`, `vmap` and `shard_map`, with or without
  `check_vma`. With `check_vma=True`, the gradient with respect to replicated
  parameters is already a sum over devices; averaging only the gradient would
  leave it too large by a factor of the number of devices.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or losses [B], or a
      pair of that and aux.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: the axis of the devices, or None.
    reduce: reduces the losses of `loss_fn` to a scalar; the mean by default.
    num_parts: M >= 1. If M > 1, every positional argument after the parameters
      has a leading axis [M] of equal parts of this device's examples. Loss and
      gradients are averaged over the parts, which are processed in turn, and
      then over devices. aux gets the leading axis [M]; keyword arguments are
      shared by the parts. Unlike `accumulated`, it repeats no forward pass.

  Returns:
    A function of `loss_fn`'s arguments that returns (value, gradients); value
    is (loss, aux) with `has_aux`. aux is not averaged over devices. The
    function raises a ValueError if `shard_map` tracks varying values
    (`check_vma=True`) and a parameter varies over a mesh axis: parameters must
    be replicated. For sharded parameters use `jax.jit` without `axis_name`.
  """
  checks.count('num_parts', num_parts)

  def reduced(params: Params, *args: Any, **kwargs: Any) -> Any:
    out = loss_fn(params, *args, **kwargs)
    loss, aux = out if has_aux else (out, None)
    return reduce(loss), aux

  def averaged(params: Params, *args: Any, **kwargs: Any) -> Any:
    loss, aux = reduced(params, *args, **kwargs)
    if axis_name is not None:
      loss = jax.lax.pmean(loss, axis_name)
    return loss, aux

  def value_and_grad(params: Params, *args: Any, **kwargs: Any) -> Any:
    _check_replicated(params, axis_name)
    if num_parts > 1:
      (loss, aux), gradients = _mean_over_parts(
          reduced, num_parts, axis_name, params, args, kwargs)
    else:
      (loss, aux), gradients = jax.value_and_grad(averaged, has_aux=True)(
          params, *args, **kwargs)
    if axis_name is not None:
      gradients = jax.lax.pmean(gradients, axis_name)
    return ((loss, aux) if has_aux else loss), gradients

  return value_and_grad


def gradient_fns(
    method: Method, loss_fn: LossFn, *, has_aux: bool = False,
    axis_name: str | None = None, num_parts: int = 1
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The passes of a method, for the ascent and for the descent.

  Args:
    method: the method.
    loss_fn: `loss_fn(params, *args, **kwargs)` -> mean loss or losses [B], or
      a pair of that and aux.
    has_aux: whether `loss_fn` returns a pair.
    axis_name: the axis of the devices, or None.
    num_parts: as in `averaged_value_and_grad`.

  Returns:
    Two functions of `loss_fn`'s arguments that return ((loss, aux), gradients),
    averaged over devices; aux is None without `has_aux`. They differ only if
    `examples_below` excludes examples from the ascent.
  """

  def paired(params: Params, *args: Any, **kwargs: Any) -> Any:
    out = loss_fn(params, *args, **kwargs)
    return out if has_aux else (out, None)

  descent_fn = averaged_value_and_grad(
      paired, has_aux=True, axis_name=axis_name, num_parts=num_parts)
  if method.examples_below is None:
    return descent_fn, descent_fn
  return averaged_value_and_grad(
      paired, has_aux=True, axis_name=axis_name, num_parts=num_parts,
      reduce=mean_below(method.examples_below)), descent_fn


def _split(args: Any, parts: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...]: example i goes to part i % parts.

  If the batch is sharded over devices, each contiguous part would be on one
  device, and every device would compute all parts.
  """

  def split(leaf: Array) -> Array:
    shape = jnp.shape(leaf)
    if not shape or shape[0] % parts:
      raise ValueError(
          f'num_microbatches={parts} must divide the leading axis of every '
          f'positional argument after the parameters, got shape {shape}; bind '
          'other arguments with functools.partial(loss_fn, key=key).')
    return jnp.swapaxes(
        jnp.reshape(leaf, (shape[0] // parts, parts, *shape[1:])), 0, 1)

  return jax.tree.map(split, args)


def accumulated(
    loss_fn: LossFn, num_microbatches: int, *, has_aux: bool = False) -> LossFn:
  """Computes a loss in micro-batches, one after the other.

  Value and gradient are those of the whole batch, but only the activations of
  one micro-batch are in memory at a time. The backward pass recomputes them,
  which costs a third more work. Every pass of a method calls the loss function,
  so the ascent uses the whole batch as well.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs)` -> mean loss or losses [B]. It
      must not couple the examples, as batch statistics do.
    num_microbatches: k, the number of equal parts that every positional
      argument is split into along its leading axis; part j has the examples j,
      j + k, j + 2k, ... Other arguments (such as a dropout key) must be bound
      by `functools.partial(loss_fn, key=key)` or passed by keyword.
    has_aux: whether `loss_fn` returns a pair.

  Returns:
    A loss function. Losses [B] keep the order of the examples. aux has a new
    leading axis [k].

  Raises:
    ValueError: if k does not divide the batch.
  """
  checks.count('num_microbatches', num_microbatches)

  def loss(params: Params, *args: Any, **kwargs: Any) -> Any:
    parts = _split(args, num_microbatches)
    part_fn = jax.checkpoint(
        lambda part: loss_fn(params, *part, **kwargs))
    out = loops.mapped(num_microbatches, part_fn, parts)
    losses, aux = out if has_aux else (out, None)
    losses = jnp.mean(losses) if losses.ndim == 1 else losses.T.reshape(-1)
    return (losses, aux) if has_aux else losses

  return loss
