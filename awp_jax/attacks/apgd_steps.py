"""One iteration of Auto-PGD, as pure functions of losses and gradients.

See `awp_jax.attacks.apgd` for the formulas. Every row of the state has its own
iteration t. Evaluation t = 0 is of the start, so a run of K steps has K + 1
evaluations.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from awp_jax import threat as threats
from awp_jax.evaluation.model import Gradients
from awp_jax.evaluation.protocol import Examples, Report
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

_RISES = 0.75        # halve the step if at most this fraction of losses rose
_NEW_SHARE = 0.75    # weight of the new step; the rest is momentum
_DENSITY = 1.5       # L1: the best point's sparsity over the next step's
_SPARSER = 0.95      # L1: below this ratio of sparsities, reset the step size
_L1_SHRINK = 1.5     # L1: divisor of the step size
_L1_SMALLEST = 10.0  # L1: the first step size over the smallest


class Schedule(NamedTuple):
  """Settings of evaluation t = 0, 1, ...; tuples, so that it is hashable.

  Attributes:
    first: whether t is the start of a stage, not the end of a step.
    last_stage: whether the radius is the final one, so that successes count.
    epsilon: the radius at t.
    window: number of iterations covered by the checkpoint at t; 0 if none.
  """

  first: tuple[bool, ...]
  last_stage: tuple[bool, ...]
  epsilon: tuple[float, ...]
  window: tuple[int, ...]


class APGDState(NamedTuple):
  """One row per example; images [B, ...], the rest [B].

  Attributes:
    x: the next point to evaluate.
    previous: the point before it.
    best: the point of the highest loss so far in this stage.
    best_gradient: the gradient at `best`.
    best_loss: the loss at `best`.
    last_loss: the loss at the last evaluation.
    step_size: eta.
    rises: number of times the loss rose since the last checkpoint.
    check_loss: `best_loss` at the last checkpoint.
    reduced: whether the last checkpoint halved the step.
    share: L1: the fraction of the entries that a step moves.
    sparsity: L1: number of moved entries of the best point at the last
      checkpoint.
    time: t, the number of evaluations made.
  """

  x: Array
  previous: Array
  best: Array
  best_gradient: Array
  best_loss: Array
  last_loss: Array
  step_size: Array
  rises: Array
  check_loss: Array
  reduced: Array
  share: Array
  sparsity: Array
  time: Array


def checkpoint_windows(num_steps: int) -> tuple[int, ...]:
  """Window of the checkpoint after step t = 0..num_steps; 0 if none."""
  window = max(int(0.22 * num_steps), 1)
  smallest = max(int(0.06 * num_steps), 1)
  shrink = max(int(0.03 * num_steps), 1)
  windows = [0] * (num_steps + 1)
  time = window
  while time <= num_steps:
    windows[time] = window
    window = max(window - shrink, smallest)
    time += window
  return tuple(windows)


def make_schedule(
    threat: ThreatModel, num_steps: int, staged: bool) -> Schedule:
  """The schedule of a run.

  Args:
    threat: its norm selects the checkpoints, its epsilon the radii.
    num_steps: iterations, summed over the stages.
    staged: whether the radius shrinks in stages: 3, 2 and 1 times epsilon for
      30, 30 and 40 % of the iterations.

  Returns:
    The schedule: `num_steps` evaluations, and one more for each stage's start.
  """
  third = math.ceil(0.3 * num_steps)
  stages = [(3, third), (2, third), (1, num_steps - 2 * third)]
  if not staged or stages[-1][1] < 1:
    stages = [(1, num_steps)]
  first, last_stage, epsilon, window = [], [], [], []
  for factor, steps in stages:
    first += [True] + [False] * steps
    last_stage += [factor == 1] * (steps + 1)
    epsilon += [factor * threat.epsilon] * (steps + 1)
    if threat.norm == 'L1':
      every = max(int(0.04 * steps), 1)
      window += [every if t and t % every == 0 else 0 for t in range(steps + 1)]
    else:
      window += checkpoint_windows(steps)
  return Schedule(
      tuple(first), tuple(last_stage), tuple(epsilon), tuple(window))


def _column(values: Array, like: Array) -> Array:
  return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _select(mask: Array, new: Array, old: Array) -> Array:
  return jnp.where(_column(mask, new), new, old)


def _project(
    x_adv: Array, x: Array, threat: ThreatModel, radius: Array) -> Array:
  if threat.norm != 'L1':
    return threat.project(x_adv, x)
  inside = threats.project_l1(
      x_adv - x, x, radius, threat.lower, threat.upper)
  return threat.clip(x + inside)


def _moved(x_adv: Array, x: Array) -> Array:
  """Number of entries that differ, [B]."""
  changed = (x_adv != x).reshape(x.shape[0], -1)
  return jnp.sum(changed, axis=-1).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=('threat', 'schedule'))
def start(
    examples: Examples, threat: ThreatModel, schedule: Schedule) -> APGDState:
  """Random starts: on the sphere for L_inf and L_2, inside the ball for L_1."""
  x = examples.images
  draw = jax.random.uniform if threat.norm == 'Linf' else jax.random.normal
  noise = jax.vmap(lambda key: draw(key, x.shape[1:], x.dtype))(examples.keys)
  if threat.norm == 'Linf':
    noise = 2 * noise - 1
    flat = jnp.abs(noise).reshape(x.shape[0], -1)
    noise = noise / (_column(jnp.max(flat, axis=-1), x) + 1e-12)
  elif threat.norm == 'L2':
    noise = threats.unit_l2(noise, 1e-12)
  if threat.norm == 'L1':
    radius = jnp.full(x.shape[0], schedule.epsilon[0], x.dtype)
    width = threat.upper - threat.lower
    begin = _project(x + width * noise, x, threat, radius)
  else:
    begin = threat.clip(x + threat.epsilon * noise)
  none = jnp.zeros(x.shape[0], x.dtype)
  count = jnp.zeros(x.shape[0], jnp.int32)
  return APGDState(
      x=begin, previous=begin, best=begin, best_gradient=jnp.zeros_like(x),
      best_loss=none, last_loss=none, step_size=none, rises=count,
      check_loss=none, reduced=count > 0, share=none, sparsity=none, time=count)


def _record(
    state: APGDState, seen: Gradients, x: Array, threat: ThreatModel,
    schedule: Schedule) -> APGDState:
  """Records an evaluation; resets the counters at the start of a stage."""
  first = jnp.asarray(schedule.first)[state.time]
  radius = jnp.asarray(schedule.epsilon, x.dtype)[state.time]
  losses = seen.losses.astype(x.dtype)
  better = first | (losses > state.best_loss)
  best_loss = jnp.where(better, losses, state.best_loss)
  staged = len(set(schedule.epsilon)) > 1
  moved = _moved(state.x, x)
  size = x[0].size
  return state._replace(
      previous=_select(first, state.x, state.previous),
      best=_select(better, state.x, state.best),
      best_gradient=_select(better, seen.gradient, state.best_gradient),
      best_loss=best_loss,
      # As in the reference, the first step is compared with a loss of 0, not
      # with the loss of the start.
      last_loss=jnp.where(first, 0, losses),
      rises=jnp.where(
          first, 0,
          state.rises + (losses > state.last_loss).astype(state.rises.dtype)),
      step_size=jnp.where(
          first, radius * (1 if threat.norm == 'L1' else 2), state.step_size),
      check_loss=jnp.where(first, best_loss, state.check_loss),
      reduced=state.reduced | first,
      share=jnp.where(
          first, moved / size / _DENSITY if staged else threats.L1_SHARE,
          state.share),
      sparsity=jnp.where(first, moved if staged else size, state.sparsity))


def _halve(
    state: APGDState, gradient: Array, due: Array, window: Array
) -> tuple[APGDState, Array]:
  """The checkpoint of L_inf and L_2; returns state and gradient to continue."""
  few = state.rises.astype(float) <= _RISES * window.astype(float)
  stuck = ~state.reduced & (state.check_loss >= state.best_loss)
  halved = due & (few | stuck)
  state = state._replace(
      step_size=jnp.where(halved, state.step_size / 2, state.step_size),
      x=_select(halved, state.best, state.x),
      reduced=jnp.where(due, halved, state.reduced),
      check_loss=jnp.where(due, state.best_loss, state.check_loss),
      rises=jnp.where(due, 0, state.rises))
  return state, _select(halved, state.best_gradient, gradient)


def _resparsify(
    state: APGDState, gradient: Array, due: Array, x: Array, radius: Array
) -> tuple[APGDState, Array]:
  """The checkpoint of L_1."""
  moved = _moved(state.best, x)
  sparser = moved / state.sparsity < _SPARSER
  shrunk = jnp.clip(
      jnp.where(sparser, radius, state.step_size / _L1_SHRINK),
      radius / _L1_SMALLEST, radius)
  again = due & sparser
  state = state._replace(
      step_size=jnp.where(due, shrunk, state.step_size),
      share=jnp.where(due, moved / x[0].size / _DENSITY, state.share),
      sparsity=jnp.where(due, moved, state.sparsity),
      x=_select(again, state.best, state.x))
  return state, _select(again, state.best_gradient, gradient)


def _ascend(
    state: APGDState, gradient: Array, x: Array, threat: ThreatModel,
    first: Array, radius: Array) -> Array:
  """The next point."""
  if threat.norm == 'L1':
    direction = threats.sparse_signs(gradient, state.share)
    step = _column(state.step_size, x) * direction
    return _project(state.x + step, x, threat, radius)
  direction = threat.linear_maximizer(gradient, 1e-12)
  target = threat.project(
      state.x + _column(state.step_size, x) * direction, x)
  new = _column(jnp.where(first, 1.0, _NEW_SHARE).astype(x.dtype), x)
  mixed = (state.x + (target - state.x) * new
           + (state.x - state.previous) * (1 - new))
  return threat.project(mixed, x)


@functools.partial(jax.jit, static_argnames=('threat', 'schedule'))
def advance(
    state: APGDState, seen: Gradients, x: Array, threat: ThreatModel,
    schedule: Schedule) -> tuple[APGDState, Report]:
  """One iteration, given losses and gradients at `state.x`.

  Args:
    state: the state.
    seen: losses, gradients and misclassifications at `state.x`.
    x: natural images [B, ...].
    threat: ball and box.
    schedule: from `make_schedule`.

  Returns:
    The next state, and a report on `state.x`.
  """
  total = len(schedule.first)
  time = state.time
  state = state._replace(time=jnp.minimum(time, total - 1))
  first = jnp.asarray(schedule.first)[state.time]
  radius = jnp.asarray(schedule.epsilon, x.dtype)[state.time]
  window = jnp.asarray(schedule.window)[state.time]
  counts = jnp.asarray(schedule.last_stage)[state.time]
  no_gradient = jnp.all(
      seen.gradient.reshape(x.shape[0], -1) == 0, axis=-1)
  margin = None if seen.margin is None else jnp.where(
      counts, seen.margin, -jnp.inf)
  report = Report(
      state.x, seen.broken & counts, time + 1 >= total,
      no_gradient & (time == 0), seen.nonfinite, margin)

  state = _record(state, seen, x, threat, schedule)
  if threat.norm == 'L1':
    state, gradient = _resparsify(
        state, seen.gradient, window > 0, x, radius)
  else:
    state, gradient = _halve(state, seen.gradient, window > 0, window)
  after = jnp.minimum(state.time + 1, total - 1)
  x_next = _ascend(state, gradient, x, threat, first, radius)
  if len(set(schedule.epsilon)) > 1:
    # A new stage starts at the best point of the last, projected.
    begin = _project(
        state.best, x, threat,
        jnp.asarray(schedule.epsilon, x.dtype)[after])
    x_next = _select(jnp.asarray(schedule.first)[after], begin, x_next)
  return state._replace(x=x_next, previous=state.x, time=time + 1), report
