"""Square Attack: random search over squares, without gradients.

A candidate changes the best perturbation so far inside one square window, whose
area is a share p of the image. It is kept if the margin z_y - max_{k != y} z_k
falls. p halves at fixed numbers of queries. For L_inf a window is filled with
one sign of epsilon per channel. For L_2 and L_1 a second window is set to zero
and its norm moves to the first, shaped as two opposite bumps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax import threat as threats
from awp_jax.attacks import square_patterns
from awp_jax.attacks.square_patterns import (
  SquareSchedule,
  pattern,
  window_sides,
)
from awp_jax.core import checks
from awp_jax.evaluation import evaluate, protocol
from awp_jax.evaluation.model import Model, margins, misclassified
from awp_jax.evaluation.protocol import (
  AttackSpec,
  BoundAttack,
  Examples,
  Report,
)
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

#: Factor on epsilon that keeps rounding inside the L1 ball.
_L1_INSIDE = 1 - 1e-6


class SquareState(NamedTuple):
  """One row per example.

  Attributes:
    x: the next candidate to evaluate, [B, H, W, C].
    best: the best candidate so far, [B, H, W, C].
    margin: its margin, as `model.margins`, [B].
    time: number of candidates evaluated, [B].
  """

  x: Array
  best: Array
  margin: Array
  time: Array


def _extent(corner: Array, side: Array, x: Array, axis: int) -> Array:
  """The rows (axis 0) or columns (1) of a window, [B, H] or [B, W]."""
  places = jnp.arange(x.shape[axis + 1])
  begin = corner[:, axis, None]
  return (places >= begin) & (places < begin + side[:, None])


def _window(corner: Array, side: Array, x: Array) -> Array:
  """Mask of a window: corner [B, 2], side [B] -> [B, H, W, 1]."""
  rows, columns = (_extent(corner, side, x, axis) for axis in (0, 1))
  return (rows[:, :, None] & columns[:, None, :])[..., None]


def _corner(uniform: Array, side: Array, x: Array) -> Array:
  """Maps uniform numbers [B, 2] to the upper left corner of a window."""
  # Unlike in the reference, windows may include the last row and column.
  free = (jnp.asarray(x.shape[1:3], jnp.int32)
          - side.astype(jnp.int32)[:, None] + 1)
  place = uniform * free.astype(uniform.dtype)
  return jnp.minimum(place.astype(jnp.int32), free - 1)


def _place_pattern(
    corner: Array, which: Array, flip: Array, table: Array, x: Array) -> Array:
  """Places pattern `which` at a corner, transposed if `flip`: [B, H, W, 1]."""
  last = table.shape[-1] - 1
  down = jnp.arange(x.shape[1])[None, :] - corner[:, :1]
  across = jnp.arange(x.shape[2])[None, :] - corner[:, 1:]
  down = jnp.clip(down, 0, last)[:, :, None]
  across = jnp.clip(across, 0, last)[:, None, :]
  flipped = flip[:, None, None]
  row = jnp.where(flipped, across, down)
  column = jnp.where(flipped, down, across)
  return table[which[:, None, None], row, column][..., None]


def _stripes(keys: Array, x: Array, threat: ThreatModel) -> Array:
  """The start for L_inf: vertical stripes of random sign."""
  shape = (1, x.shape[2], x.shape[3])
  signs = jax.vmap(lambda key: jax.random.rademacher(key, shape, x.dtype))(keys)
  return threat.clip(x + threat.epsilon * signs)


def _tiles(keys: Array, x: Array, threat: ThreatModel) -> Array:
  """The start for L_2 and L_1: a grid of patterns of random sign and axis."""
  _, height, width, channels = x.shape
  side = max(height // 5, 1)
  rows, columns = height // side, max(width // side, 1)
  shape = (rows, columns, channels + 1)
  draws = jax.vmap(lambda key: jax.random.rademacher(key, shape, x.dtype))(keys)
  down = np.arange(height) - (height - rows * side) // 2
  across = np.arange(width) - max(width - columns * side, 0) // 2
  inside = ((down >= 0) & (down < rows * side))[:, None] & (
      (across >= 0) & (across < columns * side))[None, :]
  tile = np.clip(down // side, 0, rows - 1)[:, None], np.clip(
      across // side, 0, columns - 1)[None, :]
  upright = pattern(side, threat.norm)[down % side][:, across % side]
  turned = pattern(side, threat.norm).T[down % side][:, across % side]
  here = draws[:, tile[0], tile[1]]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  laid = jnp.where(here[..., -1] > 0, upright, turned)[..., None].astype(wide)
  delta = jnp.where(inside[..., None], laid * here[..., :-1].astype(wide), 0)
  return _to_ball(delta.astype(x.dtype), x, threat)


def _to_ball(delta: Array, x: Array, threat: ThreatModel) -> Array:
  """Scales a perturbation to the sphere (L_2) or projects to the ball (L_1)."""
  if threat.norm == 'L2':
    return threat.clip(x + threats.unit_l2(delta, 1e-12) * threat.epsilon)
  inside = threats.project_l1(
      delta, x, threat.epsilon * _L1_INSIDE, threat.lower, threat.upper)
  return threat.clip(x + inside)


@functools.partial(jax.jit, static_argnames=('threat',))
def start(examples: Examples, threat: ThreatModel) -> SquareState:
  """The first candidate of each example."""
  x = examples.images
  make = _stripes if threat.norm == 'Linf' else _tiles
  first = make(examples.keys, x, threat)
  return SquareState(
      first, first, jnp.full(x.shape[0], -jnp.inf, jnp.float32),
      jnp.zeros(x.shape[0], jnp.int32))


def _exchange(
    delta: Array, new: Array, inside: Array, cleared: Array,
    threat: ThreatModel) -> Array:
  """Moves the norm of two windows into the first, for L_2 and L_1.

  Args:
    delta: the perturbation, [B, H, W, C].
    new: the pattern with its signs, [B, H, W, C].
    inside: mask of the first window, [B, H, W, 1].
    cleared: mask of the second window, which becomes zero, [B, H, W, 1].
    threat: the ball.

  Returns:
    The next perturbation, before `_to_ball`.
  """
  power = 2 if threat.norm == 'L2' else 1

  def mass(a: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(jnp.abs(a) ** power, axis=axes, keepdims=True)

  per_channel = (1, 2)
  channels = delta.shape[-1]
  spare = jnp.maximum(
      threat.epsilon ** power - mass(delta, (1, 2, 3)), 0) / channels
  moved = mass(jnp.where(inside | cleared, delta, 0), per_channel)
  old = jnp.where(inside, delta, 0)
  mixed = jnp.where(inside, new, 0) + old / (
      1e-12 + mass(old, per_channel) ** (1 / power))
  target = (spare + moved) ** (1 / power)
  if threat.norm == 'L1':
    target = target * channels
  scaled = mixed * target / (1e-12 + mass(mixed, per_channel) ** (1 / power))
  return jnp.where(inside, scaled, jnp.where(cleared, 0, delta))


def propose(
    keys: Array, best: Array, x: Array, query: Array, threat: ThreatModel,
    schedule: SquareSchedule) -> Array:
  """The next candidate.

  Args:
    keys: one per example, for this query.
    best: the best candidate so far, [B, H, W, C].
    x: natural images.
    query: number of the query, from 0, [B].
    threat: ball and box.
    schedule: settings of the run.

  Returns:
    Candidates inside ball and box.
  """
  height, width, channels = x.shape[1:]
  odd = threat.norm != 'Linf'
  sides = window_sides(schedule, height, width, odd)
  side = jnp.asarray(sides)[jnp.minimum(query, sides.size - 1)]
  draws = jax.vmap(
      lambda key: jax.random.uniform(key, (5 + channels,)))(keys)
  signs = jnp.where(draws[:, 5:] < 0.5, -1, 1).astype(x.dtype)[:, None, None]
  corner = _corner(draws[:, :2], side, x)
  if threat.norm == 'Linf':
    # A product of rows and columns takes half the time of a choice by a mask.
    rows, columns = (
        _extent(corner, side, x, axis).astype(x.dtype) for axis in (0, 1))
    steps = columns[:, :, None] * (2 * threat.epsilon * signs[:, 0])
    moved = best + rows[:, :, None, None] * steps[:, None]
    return threat.project(moved, x)
  inside = _window(corner, side, x)
  distinct = np.unique(sides)
  table = jnp.asarray(square_patterns.patterns(
      tuple(distinct.tolist()), threat.norm), x.dtype)
  new = signs * _place_pattern(
      corner, jnp.searchsorted(distinct, side), draws[:, 4] > 0.5, table, x)
  cleared = _window(_corner(draws[:, 2:4], side, x), side, x)
  moved = _exchange(best - x, new, inside, cleared, threat)
  return _to_ball(moved, x, threat)


@functools.partial(jax.jit, static_argnames=('threat', 'schedule'))
def advance(
    state: SquareState, logits: Array, examples: Examples, threat: ThreatModel,
    schedule: SquareSchedule) -> tuple[SquareState, Report]:
  """Evaluates the candidate and proposes the next."""
  x, labels = examples.images, examples.labels
  margin = margins(logits, labels)
  broken = misclassified(logits, labels)
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  better = finite & (margin > state.margin)
  rows = better.reshape((-1, 1, 1, 1))
  best = jnp.where(rows, state.x, state.best)
  keys = jax.vmap(jax.random.fold_in)(examples.keys, state.time)
  x_next = propose(keys, best, x, state.time, threat, schedule)
  none = jnp.zeros_like(broken)
  report = Report(
      state.x, broken, state.time >= schedule.num_queries, none, margin=margin)
  return SquareState(
      x_next, best, jnp.where(better, margin, state.margin),
      state.time + 1), report


def square_spec(
    name: str = 'square', *, num_queries: int = 5000, p_init: float = 0.8,
    restarts: int = 1, rescale: bool = False) -> AttackSpec:
  """Square for a list of attacks; the arguments are those of `square`."""
  checks.count('num_queries', num_queries)
  checks.count('restarts', restarts)
  if not 0 < p_init <= 1:
    raise ValueError(f'p_init must be in (0, 1], got {p_init!r}.')
  schedule = SquareSchedule(num_queries, p_init, rescale)

  def build(model: Model, threat: ThreatModel) -> BoundAttack:
    def step(examples: Examples, state: SquareState) -> tuple[Any, Report]:
      keys = protocol.step_keys(examples.keys, state.time)
      logits = model.logits(state.x, keys)
      return advance(state, logits, examples, threat, schedule)

    return BoundAttack(restarts, lambda examples: start(examples, threat), step)

  return AttackSpec(
      name, build, white_box=False, needs_images=True, settings={
          'attack': 'square', 'num_queries': num_queries, 'p_init': p_init,
          'restarts': restarts, 'rescale': rescale})


def square(
    key: Array, logits_fn: Any, images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel, *,
    num_queries: int = 5000, p_init: float = 0.8, restarts: int = 1,
    rescale: bool = False, options: evaluate.EvalOptions | None = None
) -> evaluate.AttackResult:
  """Square Attack: random search, unaffected by masked gradients.

  Args:
    key: a PRNG key.
    logits_fn: images [B, H, W, C] -> logits [B, K], K >= 2.
    images: [N, H, W, C], inside the box; H and W may differ. Warns if they look
      like [N, C, H, W].
    labels: integers [N] in [0, K).
    threat: L_inf, L_2 or L_1.
    num_queries: candidates per run after the start, >= 1.
    p_init: the share of the image that the first windows cover, in (0, 1].
    restarts: runs from different random starts.
    rescale: whether to rescale the schedule of p from 10,000 queries to
      `num_queries`. AutoAttack does not.
    options: batching, resuming and reporting.

  Returns:
    The result.

  Raises:
    ValueError: for arguments outside the ranges above.

  References:
    Andriushchenko et al., Square Attack: a Query-efficient Black-box
    Adversarial Attack via Random Search, ECCV 2020.
  """
  spec = square_spec(
      num_queries=num_queries, p_init=p_init, restarts=restarts,
      rescale=rescale)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, (spec,), options=options)
