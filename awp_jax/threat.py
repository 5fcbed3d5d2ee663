"""Threat models: which inputs an adversary may choose.

For an input x the adversary chooses x' from

  { x' :  |x' - x|_p <= epsilon,   lower <= x'_i <= upper },   p = inf, 2, 1,

where the norm runs over all axes but the first (batch) axis. `ThreatModel`
provides the operations on this set that attacks need: random starts, steepest
steps, projections and distances.

  >>> import jax.numpy as jnp
  >>> threat = ThreatModel('Linf', epsilon=8 / 255)
  >>> x = jnp.full((1, 3), 0.5)
  >>> moved = threat.project(x + jnp.array([[1.0, -1.0, 0.01]]), x)
  >>> [round(float(d), 4) for d in (moved - x)[0] * 255]
  [8.0, -8.0, 2.55]
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from awp_jax.core import checks, numerics
from awp_jax.types import Array

Norm = Literal['Linf', 'L2', 'L1']
NORMS: tuple[Norm, ...] = ('Linf', 'L2', 'L1')


def _over_features(x: Array) -> tuple[int, ...]:
  if x.ndim < 2:
    raise ValueError(
        'inputs need a batch axis and at least one more (rank >= 2), got shape '
        f'{x.shape}.')
  return tuple(range(1, x.ndim))


def l2_norms(x: Array) -> Array:
  """Euclidean norm of each example, |x_i|_2, shape [B, 1, ..., 1].

  Each example is first scaled by its largest entry, so squares of tiny or huge
  entries stay in the range of float32.

  Args:
    x: [B, ...], rank >= 2.

  Returns:
    The norms; 0 for an example of zeros.
  """
  return numerics.unit_and_norm(numerics.wide(x), _over_features(x))[1]


def unit_l2(x: Array, floor: float = 0.0) -> Array:
  """x_i / (|x_i|_2 + floor) for each example; zeros stay zeros."""
  unit, _ = numerics.unit_and_norm(
      numerics.wide(x), _over_features(x), floor)
  return unit.astype(x.dtype)


def l1_norms(x: Array) -> Array:
  """Sum of absolute values of each example, |x_i|_1, shape [B, 1, ..., 1]."""
  return jnp.sum(
      jnp.abs(numerics.wide(x)), axis=_over_features(x), keepdims=True)


def sparse_signs(gradient: Array, share: float | Array) -> Array:
  """Signs of the largest entries of each gradient, scaled to unit L1 norm.

  The steepest L_1 step changes only the single largest entry, but the box soon
  stops it. Steps over several large entries go further.

  Args:
    gradient: [B, ...].
    share: the fraction of entries to change, in [0, 1], a number or [B]. At
      least one entry changes. Ties with the smallest of them change as well.

  Returns:
    Steps like `gradient`; zero where the gradient is zero.
  """
  size = gradient[0].size
  flat = jnp.abs(gradient).reshape(-1, size)
  shares = jnp.broadcast_to(jnp.asarray(share, flat.dtype), flat.shape[:1])
  first = jnp.clip((1 - shares) * size, 0, size - 1).astype(jnp.int32)
  floor = jnp.take_along_axis(jnp.sort(flat, axis=-1), first[:, None], axis=-1)
  kept = jnp.where(flat >= floor, jnp.sign(gradient.reshape(-1, size)), 0)
  moved = jnp.maximum(jnp.sum(jnp.abs(kept), axis=-1, keepdims=True), 1)
  return (kept / moved).reshape(gradient.shape)


#: Bisections for the shrinkage of an L1 projection, before the final exact step
#: on a linear piece.
_HALVINGS = 30


def project_l1(
    delta: Array, x: Array, epsilon: float | Array, lower: float = 0.0,
    upper: float = 1.0) -> Array:
  """The nearest d to `delta` with |d|_1 <= epsilon and x + d in the box.

    d_i = sign(delta_i) clip(|delta_i| - a, 0, c_i)

  where c_i is the smaller of |delta_i| and the distance to the box boundary,
  and a >= 0 is the smallest shrinkage with sum_i |d_i| <= epsilon. The sum is
  piecewise linear and decreasing in a, so bisection finds the linear piece.

  Args:
    delta: [B, ...].
    x: inputs of the same shape, inside the box.
    epsilon: the radius, > 0, a number or [B].
    lower: the lower bound of the entries of x + d.
    upper: the upper bound.

  Returns:
    Perturbations like `delta`.
  """
  axes = _over_features(x)
  shape = (-1,) + (1,) * len(axes)
  radius = jnp.asarray(epsilon, delta.dtype).reshape(shape)
  size = jnp.abs(delta)
  room = jnp.maximum(jnp.where(delta > 0, upper - x, x - lower), 0)
  cap = jnp.minimum(size, room)

  def excess(shrink: Array) -> Array:
    left = jnp.clip(size - shrink, 0, cap)
    return jnp.sum(left, axis=axes, keepdims=True) - radius

  def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = bounds
    middle = (low + high) / 2
    outside = excess(middle) > 0
    return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

  high = jnp.max(size, axis=axes, keepdims=True)
  low = jnp.zeros_like(high)
  low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
  sliding = (size > high) & (size - high < cap)
  slope = jnp.maximum(jnp.sum(sliding, axis=axes, keepdims=True), 1)
  shrink = jnp.clip(high + excess(high) / slope.astype(delta.dtype), low, high)
  shrink = jnp.where(excess(jnp.zeros_like(high)) > 0, shrink, 0)
  inside = jnp.clip(size - shrink, 0, cap)
  total = jnp.sum(inside, axis=axes, keepdims=True)
  inside = inside * jnp.minimum(1, radius / jnp.maximum(total, radius))
  return jnp.sign(delta) * inside


#: The fraction of entries that an L1 step changes; also APGD's initial value.
L1_SHARE = 0.2

#: PyTorch's `renorm` adds this to its divisor. It also keeps points inside the
#: ball despite float32 rounding.
_RENORM_MARGIN = 1e-7


@dataclasses.dataclass(frozen=True)
class ThreatModel:
  """The L_p ball of radius `epsilon` around an input, within a box.

  Attributes:
    norm: 'Linf', 'L2' or 'L1'.
    epsilon: the radius, > 0, in the units of the inputs (pixels in [0, 1]:
      8 / 255 and 128 / 255 are usual on CIFAR-10).
    lower: the lower bound of the entries of inputs.
    upper: the upper bound.

  Raises:
    ValueError: if the norm is unknown, epsilon is not finite and positive, or
      the box is empty.
  """

  norm: Norm
  epsilon: float
  lower: float = 0.0
  upper: float = 1.0

  def __post_init__(self) -> None:
    checks.one_of('norm', self.norm, NORMS)
    checks.positive('epsilon', self.epsilon)
    if not self.lower < self.upper:
      raise ValueError(
          f'the box needs lower < upper, got [{self.lower}, {self.upper}].')

  def random_start(self, key: Array, x: Array) -> Array:
    """Draws a point in the ball around each input, clipped to the box.

    L_inf: every entry uniform in [-epsilon, epsilon]. L_2: a uniform direction
    with a length uniform in [0, epsilon], as in the reference (uniform points
    of the ball would concentrate near its surface). L_1: normal noise with the
    width of the box as standard deviation, projected onto ball and box.

    Args:
      key: a PRNG key.
      x: inputs [B, ...].

    Returns:
      Points shaped like `x`, inside ball and box.
    """
    if self.norm == 'Linf':
      delta = jax.random.uniform(
          key, x.shape, x.dtype, -self.epsilon, self.epsilon)
    elif self.norm == 'L1':
      noise = jax.random.normal(key, x.shape, x.dtype)
      return self.project(x + (self.upper - self.lower) * noise, x)
    else:
      direction_key, length_key = jax.random.split(key)
      lengths_shape = x.shape[:1] + (1,) * len(_over_features(x))
      lengths = jax.random.uniform(length_key, lengths_shape, x.dtype)
      normal = jax.random.normal(direction_key, x.shape, x.dtype)
      delta = unit_l2(normal) * lengths * self.epsilon
    return self.clip(x + delta)

  def linear_maximizer(self, gradient: Array, floor: float = 0.0) -> Array:
    """The unit step that maximizes a linear loss.

    argmax_{|d| <= 1} <d, g>: sign(g) for L_inf, g / |g|_2 for L_2; zero where
    the gradient is zero. For L_1 the step is spread evenly over the fifth of
    the entries with the largest |g|, since the box soon stops a single entry.

    Args:
      gradient: [B, ...].
      floor: added to |g|_2 in the division, >= 0, in the units of the gradient,
        as in some published attacks. It shortens the steps of examples with
        small gradients. Ignored for L_inf and L_1.

    Returns:
      The steps, shaped like `gradient`.
    """
    if self.norm == 'Linf':
      return jnp.sign(gradient)
    if self.norm == 'L1':
      return sparse_signs(gradient, L1_SHARE)
    return unit_l2(gradient, floor)

  def project(self, x_adv: Array, x: Array) -> Array:
    """Projects `x_adv` onto the ball around `x`, then onto the box.

    For L_inf and L_1 the result is the nearest point of the set. For L_2 the
    two projections are applied in turn, as in the reference. The result lies in
    ball and box, since clipping never moves an entry away from `x`, but it need
    not be the nearest point.

    Args:
      x_adv: perturbed inputs [B, ...].
      x: the natural inputs, of the same shape, inside the box.

    Returns:
      Points shaped like `x_adv`.
    """
    if self.norm == 'Linf':
      near = jnp.clip(x_adv, x - self.epsilon, x + self.epsilon)
    elif self.norm == 'L1':
      near = x + project_l1(x_adv - x, x, self.epsilon, self.lower, self.upper)
    else:
      delta = x_adv - x
      norms = l2_norms(delta)
      factor = jnp.where(
          norms > self.epsilon,
          self.epsilon / (norms + _RENORM_MARGIN), 1)
      near = x + delta * factor.astype(delta.dtype)
    return self.clip(near)

  def distance(self, x_adv: Array, x: Array) -> Array:
    """|x'_i - x_i|_p of each example, shape [B], in the ball's norm."""
    delta = x_adv - x
    if self.norm == 'Linf':
      return jnp.max(jnp.abs(delta), axis=_over_features(delta))
    if self.norm == 'L1':
      return l1_norms(delta).reshape(delta.shape[0])
    return l2_norms(delta).reshape(delta.shape[0])

  def clip(self, x: Array) -> Array:
    """Clips every entry to [lower, upper]."""
    return jnp.clip(x, self.lower, self.upper)
