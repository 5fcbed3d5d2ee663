"""The sets that a weight perturbation may lie in: which norm, how large.

A `Ball` is { v : |v_i| <= size s_i for every group i }, where the groups are
whole tensors, output filters, the whole tree or single entries, and s_i is the
norm of the weights of the group ('relative') or 1 ('absolute'). With 'adaptive'
the ball is stretched entry by entry, { v : |v / t| <= size }, t = |w| + floor.

Two functions are all that a perturbation needs of it, for lists of leaves:
`farthest`, the point of the ball that lies farthest along a direction, and
`project`. The farthest point of a ball of single entries is a sign:

  >>> import jax.numpy as jnp
  >>> g, w = [jnp.array([[3., -4.]])], [jnp.array([[8., 6.]])]
  >>> print(farthest(Ball(0.5, 'tensor'), g, w, 0.5)[0])
  [[ 3. -4.]]
  >>> print(farthest(Ball(0.5, 'element'), g, w, 0.5)[0])
  [[ 4. -3.]]
  >>> print(farthest(Ball(0.5, 'element', 'absolute'), g, w, 0.5)[0])
  [[ 0.5 -0.5]]
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp

from awp_jax import checks
from awp_jax.perturbation.leaves import Mask
from awp_jax.types import Array, Scalar

Norm = Literal['tensor', 'filter', 'tree', 'element']
NORMS: tuple[Norm, ...] = ('tensor', 'filter', 'tree', 'element')
Scale = Literal['relative', 'absolute', 'adaptive']
SCALES: tuple[Scale, ...] = ('relative', 'absolute', 'adaptive')

#: A number, or a function of the step count as optax's schedules are.
Size: TypeAlias = Scalar | Callable[[Array], Scalar]


@dataclasses.dataclass(frozen=True)
class Ball:
  """A set of perturbations.

  Attributes:
    size: the radius, >= 0, relative to s_i; or a function of the step count.
    norm: the groups: 'tensor', one for each leaf; 'filter', one for each entry
      of `filter_axis`, leaves of fewer than two axes being one group; 'tree',
      one for all leaves; 'element', one for each number.
    scale: s_i: 'relative' |w_i|, 'absolute' 1, 'adaptive' stretched by t.
    filter_axis: the axis that counts output filters: -1 as in Flax, 0 as in
      PyTorch and Equinox.
    tiny: added to norms of directions before they are divided by, >= 0; exact
      zeros give zero without it.
    floor: added to |w_i| in s_i (or to |w| in t), >= 0.
    stretched: which leaves t stretches where the scale is 'adaptive', a mask;
      on the others t is 1. None means all but biases.
  """

  size: Size
  norm: Norm = 'tensor'
  scale: Scale = 'relative'
  filter_axis: int = -1
  tiny: float = 0.0
  floor: float = 0.0
  stretched: Mask | None = None

  def __post_init__(self) -> None:
    if not callable(self.size):
      checks.not_negative('size', self.size)
    checks.one_of('norm', self.norm, NORMS)
    checks.one_of('scale', self.scale, SCALES)
    checks.not_negative('tiny', self.tiny)
    checks.not_negative('floor', self.floor)

  def size_at(self, step: Array) -> Scalar:
    """The radius at a step."""
    return self.size(step) if callable(self.size) else self.size


def _axes(leaf: Array, norm: Norm, filter_axis: int) -> tuple[int, ...]:
  """The axes that a group of this leaf spans."""
  every = tuple(range(leaf.ndim))
  if norm == 'element':
    return ()
  if norm == 'filter' and leaf.ndim > 1:
    return tuple(i for i in every if i != filter_axis % leaf.ndim)
  return every


def _sums(
    leaves: list[Array], norm: Norm, filter_axis: int) -> list[Array]:
  """Sums over the groups, of shapes that broadcast against the leaves."""
  sums = [jnp.sum(leaf, _axes(leaf, norm, filter_axis), keepdims=True)
          for leaf in leaves]
  if norm != 'tree' or not sums:
    return sums
  total = sum(jnp.sum(s) for s in sums)
  return [jnp.broadcast_to(total, s.shape) for s in sums]


def _maxima(
    leaves: list[Array], norm: Norm, filter_axis: int) -> list[Array]:
  """Largest magnitudes of the groups; 0 for empty ones."""
  maxima = [
      jnp.max(jnp.abs(leaf), _axes(leaf, norm, filter_axis), keepdims=True,
              initial=0) for leaf in leaves]
  if norm != 'tree' or not maxima:
    return maxima
  largest = jnp.max(jnp.stack([jnp.max(m) for m in maxima]))
  return [jnp.broadcast_to(largest, m.shape) for m in maxima]


def units_and_norms(
    leaves: list[Array], norm: Norm = 'tensor', filter_axis: int = -1
) -> tuple[list[Array], list[Array]]:
  """x_i / |x_i| and |x_i| for each group; both 0 for a group of zeros.

  Scaled by the largest entry first, so that tiny gradients do not vanish (nor
  huge ones overflow) when squared; what is left has a norm of at least 1.

  Args:
    leaves: float32 or wider.
    norm: the groups.
    filter_axis: as in `Ball`.

  Returns:
    Two lists like `leaves`; the norms broadcast against them.
  """
  largest = _maxima(leaves, norm, filter_axis)
  scaled = [leaf / jnp.where(m > 0, m, 1)
            for leaf, m in zip(leaves, largest, strict=True)]
  norms = [jnp.sqrt(s) for s in _sums(
      [jnp.square(leaf) for leaf in scaled], norm, filter_axis)]
  units = [leaf / jnp.maximum(n, 1)
           for leaf, n in zip(scaled, norms, strict=True)]
  return units, [m * n for m, n in zip(largest, norms, strict=True)]


def filter_sums(leaf: Array, filter_axis: int = -1) -> Array:
  """Sums over each output filter; a leaf of one axis is left as it is."""
  axes = tuple(i for i in range(leaf.ndim) if i != filter_axis % leaf.ndim)
  return jnp.sum(leaf, axes, keepdims=True)


def lengths(
    ball: Ball, weights: list[Array], stretched: list[bool]) -> list[Array]:
  """s_i, or t where the ball is stretched; they broadcast against weights."""
  if ball.scale == 'absolute':
    return [jnp.ones((), w.dtype) for w in weights]
  if ball.scale == 'adaptive':
    return [jnp.abs(w) + ball.floor if is_stretched else jnp.ones((), w.dtype)
            for w, is_stretched in zip(weights, stretched, strict=True)]
  _, norms = units_and_norms(weights, ball.norm, ball.filter_axis)
  return [n + ball.floor for n in norms] if ball.floor else norms


def farthest(
    ball: Ball, direction: list[Array], weights: list[Array], size: Scalar,
    stretched: list[bool] | None = None) -> list[Array]:
  """argmax of <direction, v> over the ball, size s_i d_i / |d_i|.

  Args:
    ball: the set; its own size is not read.
    direction: d, float32 or wider.
    weights: w, likewise.
    size: the radius.
    stretched: whether t stretches each leaf; by default all.

  Returns:
    v; zero for groups whose direction or s_i is zero, never NaN. A direction
    that is not finite gives NaN.
  """
  scale = lengths(ball, weights, stretched or [True] * len(weights))
  if ball.scale == 'adaptive':
    direction = [s * d for s, d in zip(scale, direction, strict=True)]
  units, norms = units_and_norms(direction, ball.norm, ball.filter_axis)
  if ball.tiny:
    units = [u * (n / (n + ball.tiny))
             for u, n in zip(units, norms, strict=True)]
  return [size * s * u for s, u in zip(scale, units, strict=True)]


def project(
    ball: Ball, perturbation: list[Array], weights: list[Array], size: Scalar,
    stretched: list[bool] | None = None) -> list[Array]:
  """The multiple of each group of v, at most 1, that lies in the ball.

  Args:
    ball: the set; its own size is not read.
    perturbation: v, float32 or wider.
    weights: w, likewise.
    size: the radius.
    stretched: whether t stretches each leaf; by default all.

  Returns:
    v_i min(1, size s_i / |v_i|).
  """
  scale = lengths(ball, weights, stretched or [True] * len(weights))
  if ball.scale != 'adaptive':
    units, norms = units_and_norms(perturbation, ball.norm, ball.filter_axis)
    return [jnp.minimum(n, size * s) * u
            for u, n, s in zip(units, norms, scale, strict=True)]
  safe = [jnp.where(s > 0, s, 1) for s in scale]
  units, norms = units_and_norms(
      [v / s for v, s in zip(perturbation, safe, strict=True)], ball.norm,
      ball.filter_axis)
  return [jnp.minimum(n, size) * s * u
          for u, n, s in zip(units, norms, scale, strict=True)]
