"""Projection onto a hyperplane inside a box, in three norms.

For a point t of the box and a hyperplane <w, x> = b,

  minimize |d|_p   subject to   <w, t + d> = b,   lower <= t + d <= upper.

Each entry reduces |c|, c = <w, t> - b, by at most the distance m_i to the box:
d_i = -sign(c w_i) s_i with 0 <= s_i <= m_i and sum |w_i| s_i = |c|. The norm
determines s:

  L_inf  s_i = min(l, m_i)         L_2  s_i = min(l |w_i|, m_i)
  L_1    s_i = m_i for the largest |w_i| first, until the sum is reached.

If the hyperplane does not meet the box, d goes as far as the box allows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from awp_jax.threat import Norm
from awp_jax.types import Array

#: Most Newton iterations; more than were ever observed.
_MAX_ITERATIONS = 50

#: Relative distance to the hyperplane at which Newton's method stops.
_TOLERANCE = 1e-6


def _spread(weights: Array, reach: Array, room: Array, pace: Array) -> Array:
  """s = min(l pace, room) with sum weights s = reach.

  The sum is concave and piecewise linear in l, so Newton's method from 0
  increases to the solution without overshoot and is exact on its last piece.
  """

  def total(pull: Array) -> Array:
    return jnp.sum(
        weights * jnp.minimum(pull * pace, room), axis=-1, keepdims=True)

  def unfinished(carry: tuple[Array, Array, Array]) -> Array:
    _, missing, turn = carry
    return (turn < _MAX_ITERATIONS) & jnp.any(missing > _TOLERANCE * reach)

  def newton(
      carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    pull, missing, turn = carry
    free = pull * pace < room
    slope = jnp.sum(
        jnp.where(free, weights * pace, 0), axis=-1, keepdims=True)
    # No entry is free: the box allows no more.
    stuck = slope <= 0
    pull = pull + jnp.where(
        stuck, 0, jnp.maximum(missing, 0) / jnp.where(stuck, 1, slope))
    return pull, jnp.where(stuck, 0, reach - total(pull)), turn + 1

  begin = (jnp.zeros_like(reach), reach, jnp.int32(0))
  pull, _, _ = jax.lax.while_loop(unfinished, newton, begin)
  return jnp.minimum(pull * pace, room)


def _greedy(weights: Array, reach: Array, room: Array) -> Array:
  """s = room for the largest weights first, until sum weights s = reach."""
  order = jnp.argsort(-weights, axis=-1)
  gains = jnp.take_along_axis(weights * room, order, axis=-1)
  before = jnp.cumsum(gains, axis=-1) - gains
  ranked = jnp.take_along_axis(weights, order, axis=-1)
  needed = jnp.maximum(reach - before, 0) / jnp.where(ranked > 0, ranked, 1)
  moved = jnp.minimum(needed, jnp.take_along_axis(room, order, axis=-1))
  moved = jnp.where(ranked > 0, moved, 0)
  return jnp.take_along_axis(moved, jnp.argsort(order, axis=-1), axis=-1)


def project(
    points: Array, normals: Array, offsets: Array, norm: Norm,
    lower: float = 0.0, upper: float = 1.0) -> Array:
  """The shortest step to a hyperplane inside the box.

  Args:
    points: t, [B, D], inside the box.
    normals: w, [B, D].
    offsets: b, [B].
    norm: the norm of d to minimize.
    lower: lower bound of the box.
    upper: upper bound of the box.

  Returns:
    d, [B, D]; 0 where w is 0.
  """
  # Rescaled so that squares of w do not underflow.
  scale = jnp.max(jnp.abs(normals), axis=-1, keepdims=True)
  scale = jnp.where(scale > 0, scale, 1)
  normals = normals / scale
  gap = jnp.sum(normals * points, axis=-1, keepdims=True)
  gap = gap - offsets[:, None] / scale
  against = -jnp.where(gap >= 0, 1, -1) * jnp.sign(normals)
  room = jnp.maximum(
      jnp.where(against > 0, upper - points, points - lower), 0)
  weights, reach = jnp.abs(normals), jnp.abs(gap)
  share: dict[str, Callable[[], Array]] = {
      'Linf': lambda: _spread(weights, reach, room, jnp.ones_like(weights)),
      'L2': lambda: _spread(weights, reach, room, weights),
      'L1': lambda: _greedy(weights, reach, room),
  }
  return against * share[norm]()
