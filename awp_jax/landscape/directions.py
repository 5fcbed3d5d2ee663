"""Directions in weight space, scaled to the norms of the weights."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks, numerics
from awp_jax.perturbation.leaves import (
  Mask,
  StackAxes,
  is_weight,
  leaf_paths,
  num_stack_axes,
  weight_mask,
)
from awp_jax.types import Array, Params

Norm = Literal['filter', 'layer']
NORMS: tuple[Norm, ...] = ('filter', 'layer')


def check_like(name: str, direction: Params, params: Params) -> None:
  """Raises a ValueError unless a direction has the leaves of the parameters."""
  expected: Any = jax.tree.structure(params)
  if jax.tree.structure(direction) != expected:
    raise ValueError(
        f'{name} must be a pytree like the parameters, {expected}, got '
        f'{jax.tree.structure(direction)}.')
  shapes, wanted = (
      [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
      for tree in (direction, params))
  if shapes != wanted:
    raise ValueError(
        f'{name} must have the shapes of the parameters, {wanted}, got '
        f'{shapes}.')


def filter_normalize(
    direction: Params, params: Params, *, norm: Norm = 'filter',
    mask: Mask = is_weight, filter_axis: int = -1, stack_axes: StackAxes = 0
) -> Params:
  """A direction scaled to the weights: d_j <- d_j |w_j| / |d_j|.

  Args:
    direction: d, a pytree like `params`: noise, or an adversarial v.
    params: w.
    norm: the groups j: 'filter', the slices of a leaf along `filter_axis`;
      'layer', whole leaves, as in AWP.
    mask: the leaves to scale; the others get zeros.
    filter_axis: the axis of the output filters: the last in Flax and Keras, the
      first in PyTorch and Equinox. Stack axes do not count.
    stack_axes: the number of leading axes of a leaf that index layers, as in
      `awp_jax.Ball`. Each layer has separate norms.

  Returns:
    The direction, a pytree like `params`. A slice of zeros in d or in w gives
    zeros, never NaN.

  Raises:
    ValueError: if `norm` is unknown, or the structure or a shape of `direction`
      differs from that of `params`.
  """
  checks.one_of('norm', norm, NORMS)
  check_like('direction', direction, params)

  def scale(d: Array, w: Array, stacked: int) -> Array:
    axes = tuple(range(stacked, w.ndim))
    if norm == 'filter' and axes:
      axes = tuple(i for i in axes if i != axes[filter_axis % len(axes)])
    unit, _ = numerics.unit_and_norm(numerics.wide(d), axes)
    _, length = numerics.unit_and_norm(numerics.wide(w), axes)
    return (length * unit).astype(w.dtype)

  flat, structure = jax.tree.flatten(params)
  flags = jax.tree.leaves(weight_mask(params, mask, stack_axes))
  return jax.tree.unflatten(structure, [
      scale(d, w, num_stack_axes(stack_axes, path, w)) if flag
      else jnp.zeros_like(w) for path, flag, d, w in zip(
          leaf_paths(params), flags, jax.tree.leaves(direction), flat,
          strict=True)])


def random_direction(
    key: Array, params: Params, *, norm: Norm = 'filter',
    mask: Mask = is_weight, filter_axis: int = -1, stack_axes: StackAxes = 0
) -> Params:
  """Draws a Gaussian direction with the norms of the weights.

    d ~ N(0, 1),   d_j <- d_j |w_j| / |d_j|

  Args:
    key: a PRNG key. Models with the same leaf shapes get the same noise, so
      they can be compared along it.
    params: w.
    norm: as in `filter_normalize`.
    mask: as in `filter_normalize`.
    filter_axis: as in `filter_normalize`.
    stack_axes: as in `filter_normalize`.

  Returns:
    The direction, a pytree like `params`, zero outside the mask.

  Raises:
    ValueError: as `filter_normalize`.
  """
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, max(len(leaves), 1))
  noise = [
      jax.random.normal(k, leaf.shape, leaf.dtype)
      for k, leaf in zip(keys, leaves, strict=False)]
  return filter_normalize(
      jax.tree.unflatten(structure, noise), params, norm=norm, mask=mask,
      filter_axis=filter_axis, stack_axes=stack_axes)
