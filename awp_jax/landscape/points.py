"""Measurements at points around the weights, and the flatness of a curve."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks, numerics, rewriting, sharding
from awp_jax.landscape.directions import check_like
from awp_jax.landscape.measures import Measure
from awp_jax.types import Array, Params


@jax.jit
def displaced(
    params: Params, directions: Sequence[Params], point: Array) -> Params:
  """Returns w + sum_k alpha_k d_k for coordinates `point` [K]."""
  for number, direction in enumerate(directions):
    params = jax.tree.map(
        lambda w, d, alpha=point[number]: w + (alpha * d).astype(w.dtype),
        params, direction)
  return params


@functools.partial(jax.jit, static_argnames=('measure',))
def _sums(
    params: Params, batch: Any, valid: Array, key: Array, measure: Measure
) -> dict[str, Array]:
  def total(values: Array) -> Array:
    return jnp.sum(jnp.where(valid, numerics.wide(values), 0))

  return {
      name: total(values)
      for name, values in rewriting.cpu_convolutions(measure)(
          params, batch, key).items()}


def evaluate_points(
    key: Array, measure: Measure, params: Params, directions: Sequence[Params],
    points: Any, examples: Any, *, batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None
) -> list[dict[str, float]]:
  """Measures means over all examples at w + sum_k alpha_k d_k.

  One direction gives a curve, two give a plane. The host loops over the points
  and compiles one function for all of them. Examples stay on the host: one
  batch is transferred while the previous one is computed.

  Args:
    key: a PRNG key, shared by all points: attacks start from the same noise,
      and only the weights differ.
    measure: called with the displaced weights at every point.
    params: w.
    directions: K pytrees like `params`.
    points: coordinates alpha [P, K], finite, P >= 1.
    examples: a pytree of arrays [N, ...], N >= 1, such as (images, labels).
    batch_size: examples per batch over all devices, a multiple of the number of
      devices. At most two batches are on the devices at a time.
    devices: the devices to shard each batch over; None means the default
      device.
    progress: called with each point's index and means as they become available.

  Returns:
    A dict of means for each point, in the order of `points`.

  Raises:
    ValueError: if there are no points or no examples, a point is not finite,
      `batch_size` is less than 1 or not a multiple of the number of devices, or
      shapes or structures do not match.
  """
  points = np.asarray(points, np.float64)
  _check_points(points, directions, params)
  checks.count('batch_size', batch_size)
  if devices and batch_size % len(devices):
    raise ValueError(
        f'batch_size must be a multiple of the {len(devices)} devices, got '
        f'{batch_size}.')
  count = _count(examples)
  params, directions = sharding.replicate(
      (params, tuple(directions)), devices)
  found = []
  for number, point in enumerate(points):
    weights = displaced(params, directions, jnp.asarray(point))
    pending: list[dict[str, Array]] = []
    for index, (batch, valid) in enumerate(
        _batches(examples, count, batch_size, devices)):
      pending.append(
          _sums(weights, batch, valid, jax.random.fold_in(key, index), measure))
      if index:
        # Without this the host transfers all batches before the first is done.
        jax.block_until_ready(pending[-2])
    sums = jax.device_get(pending)
    means = {
        name: sum(float(part[name]) for part in sums) / count
        for name in sums[0]}
    found.append(means)
    if progress is not None:
      progress(number, means)
  return found


def mean_rise(alphas: Any, losses: Any) -> float:
  """Mean rise of a curve above its center, a measure of sharpness.

    R = 1/(b - a)  integral_a^b ( g(alpha) - g(0) ) d alpha,

  by the trapezoidal rule over the given points, in units of the loss. It is 0
  for a constant and c (b^2 + ab + a^2) / 6 for c alpha^2 / 2 in the limit of
  dense points. A linear slope cancels if a = -b. Near a minimum, smaller is
  flatter; a negative R means that the loss falls away from the center. Compare
  models only with the same kind of direction, range and points.

  Args:
    alphas: strictly increasing coordinates [P], P >= 2, including 0.
    losses: g at `alphas`, [P].

  Returns:
    R; not finite if any loss is not finite.

  Raises:
    ValueError: if `alphas` or the shape of `losses` is not as above.
  """
  a, g = np.asarray(alphas, np.float64), np.asarray(losses, np.float64)
  if a.ndim != 1 or len(a) < 2 or a.shape != g.shape or np.any(np.diff(a) <= 0):
    raise ValueError(
        'alphas must be at least two increasing numbers with a loss each, got '
        f'{a.tolist()} and {g.shape} losses.')
  center = np.flatnonzero(np.abs(a) <= 1e-9 * (a[-1] - a[0]))
  if not len(center):
    raise ValueError(f'alphas must include 0, got {a.tolist()}.')
  return float(np.trapezoid(g - g[center[0]], a) / (a[-1] - a[0]))


def _check_points(
    points: np.ndarray, directions: Sequence[Params], params: Params) -> None:
  if not directions:
    raise ValueError('directions must hold at least one direction, got none.')
  for direction in directions:
    check_like('each direction', direction, params)
  if points.ndim != 2 or not len(points) or (
      points.shape[1] != len(directions)):
    raise ValueError(
        f'points must be an array [P, {len(directions)}] with P >= 1, one '
        f'coordinate per direction, got shape {points.shape}.')
  if not np.all(np.isfinite(points)):
    raise ValueError(f'points must be finite, got {points.tolist()}.')


def _count(examples: Any) -> int:
  """Returns N of a pytree of arrays [N, ...]."""
  counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(examples)}
  if len(counts) != 1 or not all(counts) or counts == {(0,)}:
    raise ValueError(
        'examples must be arrays with the same first axis of at least 1, got '
        f'first axes {sorted(counts)}.')
  ((count,),) = counts
  return count


def _batches(
    examples: Any, count: int, size: int, devices: Sequence[jax.Device] | None
) -> Iterator[tuple[Any, Any]]:
  """Yields padded batches on the devices, and which rows are valid."""
  for begin in range(0, count, size):
    rows = np.arange(begin, begin + size)
    batch = jax.tree.map(
        lambda leaf, rows=rows: np.asarray(leaf)[np.minimum(rows, count - 1)],
        examples)
    yield sharding.shard((batch, rows < count), devices)
