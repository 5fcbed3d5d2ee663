"""Norms and unit vectors that neither overflow nor divide by zero.

In float32, squares of small gradients underflow and squares of large ones
overflow. A zero gradient has no direction. The library computes every norm
here, in float32 or wider: each group of entries is first scaled by its largest
magnitude, and a group of zeros yields zeros.

  >>> import jax.numpy as jnp
  >>> x = jnp.array([[3e-30, 4e-30], [0.0, 0.0]])
  >>> units, norms = unit_and_norm(x, axes=(1,))
  >>> print(units)
  [[0.6 0.8]
   [0.  0. ]]
  >>> print(norms[:, 0])
  [5.e-30 0.e+00]
"""

from collections.abc import Sequence

import jax.numpy as jnp

from awp_jax.types import Array, Scalar


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """float32 for half precision and integers; wider floats are unchanged."""
  if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32:
    return dtype
  return jnp.dtype(jnp.float32)


def wide(x: Array) -> Array:
  """Casts half precision and integers to float32; keeps wider floats."""
  x = jnp.asarray(x)
  return x.astype(wide_dtype(x.dtype))


def units_and_norms(
    leaves: Sequence[Array], axes: Sequence[tuple[int, ...]], *,
    joint: bool = False, floor: Scalar = 0.0
) -> tuple[list[Array], list[Array]]:
  """Computes x_i / (|x_i| + floor) and |x_i| for each group i of entries.

  Args:
    leaves: arrays in float32 or wider.
    axes: for each leaf, the axes that a group spans; () makes every entry a
      separate group.
    joint: whether all entries of all leaves form one group; `axes` then only
      determines the shapes of the norms.
    floor: added to the norms in the division, >= 0.

  Returns:
    The unit vectors and the norms, two lists like `leaves`. The norms keep the
    reduced axes with size 1. Both are 0 for a group of zeros. A group with a
    non-finite entry has NaN in its unit vector.
  """
  pairs = list(zip(leaves, axes, strict=True))
  largest = [jnp.max(jnp.abs(leaf), over, keepdims=True, initial=0)
             for leaf, over in pairs]
  if joint and largest:
    most = jnp.max(jnp.stack([jnp.max(m, initial=0) for m in largest]))
    largest = [jnp.broadcast_to(most, m.shape) for m in largest]
  scales = [jnp.where(m > 0, m, 1) for m in largest]
  scaled = [leaf / s for leaf, s in zip(leaves, scales, strict=True)]
  sums = [jnp.sum(jnp.square(leaf), over, keepdims=True)
          for leaf, (_, over) in zip(scaled, pairs, strict=True)]
  if joint and sums:
    total = sum(jnp.sum(s) for s in sums)
    sums = [jnp.broadcast_to(total, s.shape) for s in sums]
  roots = [jnp.sqrt(s) for s in sums]
  # The largest scaled entry is 1, so only groups of zeros have roots below 1.
  units = [
      leaf / (jnp.maximum(root, 1) + floor / scale)
      for leaf, root, scale in zip(scaled, roots, scales, strict=True)]
  return units, [m * root for m, root in zip(largest, roots, strict=True)]


def unit_and_norm(
    x: Array, axes: tuple[int, ...] | None = None, floor: Scalar = 0.0
) -> tuple[Array, Array]:
  """`units_and_norms` of one array, with groups over `axes` (None: all)."""
  over = tuple(range(jnp.ndim(x))) if axes is None else axes
  (unit,), (norm,) = units_and_norms([x], [over], floor=floor)
  return unit, norm


def global_norm(leaves: Sequence[Array]) -> Array:
  """Euclidean norm over all leaves, in float32 or wider."""
  _, norms = units_and_norms(
      [wide(leaf) for leaf in leaves], [tuple(range(jnp.ndim(leaf)))
                                        for leaf in leaves], joint=True)
  return norms[0].reshape(()) if norms else jnp.float32(0)
