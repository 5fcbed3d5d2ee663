"""The loss around a model's weights: along directions and over planes.

Robust generalisation goes with a robust loss that is flat in the weights. What
one plots is, for a direction d of the weights,

  g(alpha) = mean_i max_{|x'_i - x_i| <= eps} loss(f_{w + alpha d}(x'_i), y_i),

with adversarial examples made afresh for every w + alpha d. (Those of w, kept
fixed, attack the moved network less and less, and make any landscape look
flat.) A network's function does not change when a filter is scaled up and the
next layer down, so d is made comparable: d ~ N(0, 1), then each output filter
is given the norm of the weight's, |d_j| = |w_j|; leaves that are no weights
(biases, scales) stay where they are.

  >>> import jax, jax.numpy as jnp
  >>> params = {'w': jnp.array([[3.0], [4.0]])}
  >>> def measure(params, batch, key):
  ...   return {'loss': jnp.square(batch @ params['w'])[:, 0]}
  >>> direction = {'w': jnp.array([[1.0], [0.0]])}
  >>> points = evaluate_points(
  ...     jax.random.key(0), measure, params, [direction],
  ...     [[-1.0], [0.0], [1.0]], jnp.eye(2))
  >>> [point['loss'] for point in points]
  [10.0, 12.5, 16.0]

References:
  Li, Xu, Taylor, Studer, Goldstein, Visualizing the Loss Landscape of Neural
  Nets, NeurIPS 2018. Wu, Xia, Wang, Adversarial Weight Perturbation Helps
  Robust Generalization, NeurIPS 2020.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax import objectives
from awp_jax.attacks import pgd as pgd_lib
from awp_jax.core import checks, numerics, sharding
from awp_jax.perturbation.leaves import (
  Mask,
  StackAxes,
  is_weight,
  leaf_paths,
  num_stack_axes,
  weight_mask,
)
from awp_jax.threat import ThreatModel
from awp_jax.types import Array, Params

Norm = Literal['filter', 'layer']
NORMS: tuple[Norm, ...] = ('filter', 'layer')


class Measure(Protocol):
  """What is measured at a point: values of a model, one an example.

  `measure(params, batch, key)` returns a dict of arrays [B]. `batch` holds the
  rows of the examples that are due, and `key` is the batch's own. Whatever
  depends on the weights, adversarial examples above all, is made in here.
  """

  def __call__(
      self, params: Params, batch: Any, key: Array, /) -> dict[str, Array]:
    """Values [B] by name."""
    ...


def filter_normalize(
    direction: Params, params: Params, *, norm: Norm = 'filter',
    mask: Mask = is_weight, filter_axis: int = -1, stack_axes: StackAxes = 0
) -> Params:
  """A direction scaled to the weights: d_j <- d_j |w_j| / |d_j|.

  Args:
    direction: d, a pytree like `params`: noise, or the weight adversary's v.
    params: w.
    norm: what j runs over: 'filter', the slices of a leaf along `filter_axis`;
      'layer', whole leaves, as AWP measures its v.
    mask: which leaves move; the others get zeros.
    filter_axis: the axis of the output filters: the last in Flax and Keras, the
      first in PyTorch's layout. Stack axes do not count.
    stack_axes: how many leading axes of a leaf count layers, as in
      `awp_jax.Ball`: each layer has norms of its own.

  Returns:
    The direction, a pytree like `params`. A slice of zeros in d or in w gives
    zeros, never NaN.

  Raises:
    ValueError: for another `norm`, or a direction of another structure.
  """
  checks.one_of('norm', norm, NORMS)
  wanted: Any = jax.tree.structure(params)
  if jax.tree.structure(direction) != wanted:
    raise ValueError(
        f'direction must be a pytree like the parameters, {wanted}, got '
        f'{jax.tree.structure(direction)}.')

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
  """A Gaussian direction with the norms of the weights.

    d ~ N(0, 1),   d_j <- d_j |w_j| / |d_j|

  Args:
    key: a PRNG key. Models with leaves of the same shapes get the same noise,
      so that they can be compared along it.
    params: w.
    norm: as in `filter_normalize`.
    mask: as in `filter_normalize`.
    filter_axis: as in `filter_normalize`.
    stack_axes: as in `filter_normalize`.

  Returns:
    The direction, a pytree like `params`, zero on the leaves left alone.

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


def robust_measure(
    logits_fn: Callable[[Params, Array], Array], threat: ThreatModel, *,
    step_size: float, num_steps: int, start: pgd_lib.Start = 'random',
    restarts: int = 1) -> Measure:
  """Natural and robust loss and accuracy of a classifier, attacked by PGD.

  Args:
    logits_fn: (params, images [B, ...]) -> logits [B, C], as in evaluation:
      running statistics, no dropout.
    threat: the ball and the box.
    step_size: of PGD on the cross-entropy, > 0.
    num_steps: of PGD, >= 1.
    start: as in `awp_jax.pgd`.
    restarts: as in `awp_jax.pgd`.

  Returns:
    A `Measure` of batches (images [B, ...], labels [B]) with the values
    'natural_loss', 'robust_loss', 'natural_accuracy', 'robust_accuracy' and
    'nonfinite'. An example counts as robust if it is classified right at x and
    at x', by finite logits. 'nonfinite' is 1 where the logits or a gradient of
    the attack had an entry that is not finite: such gradient entries count as
    0, so the attack is weaker there. Images narrower than float32 are cast to
    it, and matrix products run at `jax.default_matmul_precision('float32')`.
    Keep the measure: one object is compiled once for all points, models
    and directions.

  Raises:
    ValueError: for a step size or a number of steps out of range.
  """
  checks.positive('step_size', step_size)
  checks.count('num_steps', num_steps)

  def measure(params: Params, batch: Any, key: Array) -> dict[str, Array]:
    images, labels = numerics.wide(batch[0]), batch[1]

    def loss_fn(x: Array, nothing: Any) -> tuple[Array, Any]:
      return objectives.cross_entropy(logits_fn(params, x), labels), nothing

    def broken_fn(x: Array) -> Array:
      return ~objectives.is_correct(logits_fn(params, x), labels)

    # By default accelerators multiply float32 in fewer bits.
    with jax.default_matmul_precision('float32'):
      out = pgd_lib.run_pgd(
          key, loss_fn, (), images, threat, step_size=step_size,
          num_steps=num_steps, start=start, restarts=restarts,
          broken_fn=broken_fn)
      natural, robust = logits_fn(params, images), logits_fn(params, out.x_adv)
    is_natural = objectives.is_correct(natural, labels)
    is_finite = jnp.all(jnp.isfinite(natural) & jnp.isfinite(robust), axis=-1)
    return {
        'natural_loss': objectives.cross_entropy(natural, labels),
        'robust_loss': objectives.cross_entropy(robust, labels),
        'natural_accuracy': is_natural,
        'robust_accuracy': is_natural & objectives.is_correct(robust, labels),
        'nonfinite': out.nonfinite | ~is_finite}

  return measure


@jax.jit
def displaced(
    params: Params, directions: Sequence[Params], point: Array) -> Params:
  """w + sum_k alpha_k d_k, for coordinates `point` [K]."""
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
      for name, values in measure(params, batch, key).items()}


def evaluate_points(
    key: Array, measure: Measure, params: Params, directions: Sequence[Params],
    points: Any, examples: Any, *, batch_size: int = 256,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, dict[str, float]], None] | None = None
) -> list[dict[str, float]]:
  """Means over all examples at w + sum_k alpha_k d_k, for each point alpha.

  One direction gives a curve, two give a plane. The host goes from point to
  point; one function is compiled for all of them. Examples stay on the host:
  one batch is computed while the next is sent.

  Args:
    key: a PRNG key. Every point uses the same one, so that the attacks start
      alike and only the weights differ from point to point.
    measure: what is measured; called with the moved weights at every point.
    params: w.
    directions: K pytrees like `params`.
    points: coordinates [P, K], finite, P >= 1.
    examples: a pytree of arrays [N, ...], N >= 1, say (images, labels).
    batch_size: examples per batch over all devices, a multiple of their number;
      two batches are on the devices at a time.
    devices: over which each batch is spread; None means the default device.
    progress: called with a point's number and its means as soon as they are
      known.

  Returns:
    A dict of means for each point, in the order of `points`.

  Raises:
    ValueError: for no point, no examples, or arguments that do not fit.
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
    there = displaced(params, directions, jnp.asarray(point))
    pending: list[dict[str, Array]] = []
    for turn, (batch, valid) in enumerate(
        _batches(examples, count, batch_size, devices)):
      pending.append(
          _sums(there, batch, valid, jax.random.fold_in(key, turn), measure))
      if turn:
        # Else the host sends every batch before the first is computed.
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
  """How much a curve rises around its centre; the smaller, the flatter.

    R = 1/(b - a)  integral_a^b ( g(alpha) - g(0) ) d alpha,

  by the trapezoidal rule over the points given, in units of the loss. It is 0
  for a constant, c (b^2 + ab + a^2) / 6 for c alpha^2 / 2 as the points get
  dense, and it does not see a slope where a = -b. Compare it between models for
  the same kind of direction, range and points only.

  Args:
    alphas: rising coordinates [P], P >= 2, with 0 among them.
    losses: g at these, [P].

  Returns:
    R; not finite if a loss is not.

  Raises:
    ValueError: if the coordinates are not as above.
  """
  a, g = np.asarray(alphas, np.float64), np.asarray(losses, np.float64)
  if a.ndim != 1 or len(a) < 2 or a.shape != g.shape or np.any(np.diff(a) <= 0):
    raise ValueError(
        'alphas must be at least two rising numbers with a loss each, got '
        f'{a.tolist()} and {g.shape} losses.')
  centre = np.flatnonzero(np.abs(a) <= 1e-9 * (a[-1] - a[0]))
  if not len(centre):
    raise ValueError(f'alphas must have 0 among them, got {a.tolist()}.')
  return float(np.trapezoid(g - g[centre[0]], a) / (a[-1] - a[0]))


def _check_points(
    points: np.ndarray, directions: Sequence[Params], params: Params) -> None:
  if not directions:
    raise ValueError('directions must hold at least one direction, got none.')
  wanted: Any = jax.tree.structure(params)
  for direction in directions:
    if jax.tree.structure(direction) != wanted:
      raise ValueError(
          f'each direction must be a pytree like the parameters, {wanted}, got '
          f'{jax.tree.structure(direction)}.')
  if points.ndim != 2 or not len(points) or (
      points.shape[1] != len(directions)):
    raise ValueError(
        f'points must be an array [P, {len(directions)}] with P >= 1: a '
        f'coordinate a direction, got shape {points.shape}.')
  if not np.all(np.isfinite(points)):
    raise ValueError(f'points must be finite, got {points.tolist()}.')


def _count(examples: Any) -> int:
  """N of a pytree of arrays [N, ...]."""
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
  """Batches of one size on the devices, and which of their rows count."""
  for begin in range(0, count, size):
    rows = np.arange(begin, begin + size)
    batch = jax.tree.map(
        lambda leaf, rows=rows: np.asarray(leaf)[np.minimum(rows, count - 1)],
        examples)
    yield sharding.shard((batch, rows < count), devices)
