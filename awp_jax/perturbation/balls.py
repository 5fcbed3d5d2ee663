"""Constraint sets of weight perturbations.

A `Ball` is { v : |v_i| <= size s_i for every group i }. Groups are whole
tensors, output filters, the whole tree or single entries. s_i is the norm of
the group's weights ('relative') or 1 ('absolute'). An 'adaptive' ball is
stretched entry by entry, { v : |v / t| <= size }, t = |w| + floor.

Two functions work on leaves by path: `linear_maximizer`, the point of the ball
that maximizes a linear function, and `project`. For single entries the
maximizer follows the sign:

  >>> import jax.numpy as jnp
  >>> g, w = {'w': jnp.array([[3., -4.]])}, {'w': jnp.array([[8., 6.]])}
  >>> print(linear_maximizer(Ball(0.5, 'tensor'), g, w, 0.5)['w'])
  [[ 3. -4.]]
  >>> print(linear_maximizer(Ball(0.5, 'element'), g, w, 0.5)['w'])
  [[ 4. -3.]]
  >>> print(linear_maximizer(Ball(0.5, 'element', 'absolute'), g, w, 0.5)['w'])
  [[ 0.5 -0.5]]

With `stack_axes`, layers that `nn.scan` or `jax.vmap` stacks in one leaf
[L, ...] are separate groups:

  >>> w = {'w': jnp.array([[[8.]], [[2.]]])}
  >>> g = {'w': jnp.array([[[3.]], [[-1.]]])}
  >>> print(linear_maximizer(Ball(0.5, stack_axes=1), g, w, 0.5)['w'][:, 0, 0])
  [ 4. -1.]
"""

from collections.abc import Callable, Collection
import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp

from awp_jax.core import checks, numerics
from awp_jax.perturbation import leaves
from awp_jax.perturbation.leaves import Chosen, Mask, StackAxes
from awp_jax.types import Array, Scalar

NormGroup = Literal['tensor', 'filter', 'tree', 'element']
NORM_GROUPS: tuple[NormGroup, ...] = ('tensor', 'filter', 'tree', 'element')
Scale = Literal['relative', 'absolute', 'adaptive']
SCALES: tuple[Scale, ...] = ('relative', 'absolute', 'adaptive')

#: A number, or a function of the step count, like an optax schedule.
Size: TypeAlias = Scalar | Callable[[Array], Scalar]


@dataclasses.dataclass(frozen=True)
class Ball:
  """A set of perturbations.

  Attributes:
    size: the radius, >= 0, relative to s_i; or a function of the step count.
    norm: the groups: 'tensor', one per leaf; 'filter', one per index of
      `filter_axis` (leaves with fewer than two axes are one group); 'tree', one
      for all leaves; 'element', one per entry.
    scale: s_i: 'relative' |w_i|, 'absolute' 1, 'adaptive' stretched by t.
    filter_axis: the axis of the output filters: -1 as in Flax, 0 as in PyTorch
      and Equinox. Stack axes do not count.
    eps: added to norms of directions in divisions, >= 0. A zero direction gives
      zero even with eps = 0.
    floor: added to |w_i| in s_i (or to |w| in t), >= 0.
    stretched: a mask of the leaves that t stretches if the scale is 'adaptive';
      on other leaves t is 1. None means all but biases.
    stack_axes: the number of leading axes of a leaf that index layers; each
      layer has separate groups. A number for all leaves, or numbers by path
      pattern, {'layers/*': 1}; the first matching pattern applies.
  """

  size: Size
  norm: NormGroup = 'tensor'
  scale: Scale = 'relative'
  filter_axis: int = -1
  eps: float = 0.0
  floor: float = 0.0
  stretched: Mask | None = None
  stack_axes: StackAxes = 0

  def __post_init__(self) -> None:
    if not callable(self.size):
      checks.not_negative('size', self.size)
    checks.one_of('norm', self.norm, NORM_GROUPS)
    checks.one_of('scale', self.scale, SCALES)
    checks.not_negative('eps', self.eps)
    checks.not_negative('floor', self.floor)
    object.__setattr__(
        self, 'stack_axes', leaves.as_stack_axes(self.stack_axes))

  def size_at(self, step: Array) -> Scalar:
    """The radius at step number `step`."""
    return self.size(step) if callable(self.size) else self.size


def _axes(ball: Ball, path: str, leaf: Array) -> tuple[int, ...]:
  """The axes that a group of this leaf spans."""
  if ball.norm == 'element':
    return ()
  stacked = leaves.num_stack_axes(ball.stack_axes, path, leaf)
  own = tuple(range(stacked, leaf.ndim))
  if ball.norm == 'filter' and len(own) > 1:
    return tuple(i for i in own if i != own[ball.filter_axis % len(own)])
  return own


def units_and_norms(
    ball: Ball, values: Chosen, floor: float = 0.0) -> tuple[Chosen, Chosen]:
  """Computes x_i / (|x_i| + floor) and |x_i| per group; zeros give zeros.

  Args:
    ball: the groups.
    values: x by path, float32 or wider.
    floor: added to the norms in the division.

  Returns:
    Two dicts like `values`; the norms broadcast against them.
  """
  units, norms = numerics.units_and_norms(
      list(values.values()),
      [_axes(ball, path, leaf) for path, leaf in values.items()],
      joint=ball.norm == 'tree', floor=floor)
  return (dict(zip(values, units, strict=True)),
          dict(zip(values, norms, strict=True)))


def filter_sums(leaf: Array, filter_axis: int = -1, stacked: int = 0) -> Array:
  """Sums over each output filter of each layer.

  Args:
    leaf: any array.
    filter_axis: as in `Ball`.
    stacked: the number of leading axes that index layers.

  Returns:
    The sums, which broadcast against the leaf; the leaf itself if layers have
    fewer than two axes.
  """
  own = tuple(range(stacked, leaf.ndim))
  if not own:
    return leaf
  axes = tuple(i for i in own if i != own[filter_axis % len(own)])
  return jnp.sum(leaf, axes, keepdims=True)


def lengths(
    ball: Ball, weights: Chosen, stretched: Collection[str] | None = None
) -> Chosen:
  """s_i, or t for a stretched ball; broadcasts against the weights."""
  if ball.scale == 'absolute':
    return {path: jnp.ones((), w.dtype) for path, w in weights.items()}
  if ball.scale == 'adaptive':
    return {
        path: jnp.abs(w) + ball.floor
        if stretched is None or path in stretched else jnp.ones((), w.dtype)
        for path, w in weights.items()}
  _, norms = units_and_norms(ball, weights)
  return {path: n + ball.floor for path, n in norms.items()}


def linear_maximizer(
    ball: Ball, direction: Chosen, weights: Chosen, size: Scalar,
    stretched: Collection[str] | None = None) -> Chosen:
  """argmax of <direction, v> over the ball, size s_i d_i / |d_i|.

  Args:
    ball: the set; `ball.size` is ignored.
    direction: d by path, float32 or wider.
    weights: w by path, float32 or wider.
    size: the radius.
    stretched: the paths that t stretches; None means all.

  Returns:
    v. Zero for groups whose direction or s_i is zero, never NaN; NaN for
    non-finite directions.
  """
  scale = lengths(ball, weights, stretched)
  if ball.scale == 'adaptive':
    direction = {path: scale[path] * d for path, d in direction.items()}
  units, _ = units_and_norms(ball, direction, ball.eps)
  return {path: size * scale[path] * u for path, u in units.items()}


def project(
    ball: Ball, perturbation: Chosen, weights: Chosen, size: Scalar,
    stretched: Collection[str] | None = None) -> Chosen:
  """Projects v onto the ball by rescaling each group.

  Args:
    ball: the set; `ball.size` is ignored.
    perturbation: v by path, float32 or wider.
    weights: w by path, float32 or wider.
    size: the radius.
    stretched: the paths that t stretches; None means all.

  Returns:
    v_i min(1, size s_i / |v_i|). For a stretched ball,
    v_i min(1, size / |v_i / t|), with zeros where t = 0.
  """
  scale = lengths(ball, weights, stretched)
  if ball.scale != 'adaptive':
    units, norms = units_and_norms(ball, perturbation)
    return {path: jnp.minimum(norms[path], size * scale[path]) * u
            for path, u in units.items()}
  units, norms = units_and_norms(ball, {
      path: jnp.where(scale[path] > 0, v, 0) / jnp.where(
          scale[path] > 0, scale[path], 1)
      for path, v in perturbation.items()})
  return {path: jnp.minimum(norms[path], size) * scale[path] * u
          for path, u in units.items()}
