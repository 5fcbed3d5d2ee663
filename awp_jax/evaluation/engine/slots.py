"""The places of a batch of fixed size: tasks, the loop of steps, what is found.

A queue holds tasks (example, run), ordered by run, and refills free places.
When it is empty the batch shrinks, to one of a few sizes so that few programs
are compiled.
"""

from collections.abc import Callable, Iterator
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import loops
from awp_jax.evaluation.engine import compilation
from awp_jax.evaluation.protocol import BoundAttack, Examples, Report
from awp_jax.types import Array

#: Growth of the margin after a rejection before the next check.
_GROWTH = 2.0


class Places(NamedTuple):
  """The task in each place; example is -1 in an idle place."""

  example: np.ndarray
  run: np.ndarray


class Filled(NamedTuple):
  """Places after a refill.

  Attributes:
    places: the tasks.
    rows: the row of the previous batch that each place continues.
    fresh: which places start a new task.
  """

  places: Places
  rows: np.ndarray
  fresh: np.ndarray


def batch_sizes(batch_size: int, num_devices: int) -> tuple[int, ...]:
  """The full batch size and the smaller ones used at the end of a queue.

  On the CPU idle places cost as much as busy ones, so the sizes are closely
  spaced. On an accelerator they cost little and compiling takes longer.
  """
  if loops.unrolls():
    parts = (batch_size >> k for k in range(8))
    sizes = sorted({s for p in parts for s in (p, p * 3 // 4)}, reverse=True)
  else:
    sizes = [batch_size, batch_size // 4, batch_size // 16]
  return tuple(
      s for s in sizes
      if s == batch_size or (s >= 8 and s % num_devices == 0))


def _smallest(sizes: tuple[int, ...], count: int, default: int) -> int:
  """The smallest of the sizes that holds `count`, or else the default."""
  return min((size for size in sizes if size >= count), default=default)


def first_size(sizes: tuple[int, ...], num_tasks: int) -> int:
  """The size of the first batch of a queue.

  Args:
    sizes: from `batch_sizes`.
    num_tasks: length of the queue.

  Returns:
    The smallest of the sizes that holds all tasks, or the largest. On the CPU,
    if more than a fifth of its places would be idle, as many places as tasks,
    rounded up to the greatest common divisor of the sizes.
  """
  size = _smallest(sizes, num_tasks, sizes[0])
  if not loops.unrolls() or 4 * size <= 5 * num_tasks:
    return size
  step = math.gcd(*sizes)
  return -(-num_tasks // step) * step


def spare(busy: np.ndarray, sizes: tuple[int, ...]) -> int:
  """By how many places a batch of one of the sizes could be smaller.

  Args:
    busy: the busy places, [B].
    sizes: from `batch_sizes`.
  """
  return max(0, busy.size - _smallest(sizes, int(busy.sum()), busy.size))


def tasks(
    count: int, num_runs: int, broken: np.ndarray
) -> Iterator[tuple[int, int]]:
  """Yields tasks; skips examples that are `broken` when their turn comes."""
  for run in range(num_runs):
    for example in range(count):
      if not broken[example]:
        yield example, run


def fill(
    places: Places, queue: Iterator[tuple[int, int]], sizes: tuple[int, ...],
    may_shrink: bool) -> Filled:
  """Puts tasks into idle places; shrinks the batch when the queue is empty.

  Args:
    places: the current tasks.
    queue: of `tasks`.
    sizes: the allowed batch sizes, largest first.
    may_shrink: whether the size may change now.

  Returns:
    The next places.
  """
  example, run = places.example.copy(), places.run.copy()
  fresh = np.zeros(example.size, bool)
  empty = False
  for row in np.flatnonzero(example < 0):
    task = next(queue, None)
    if task is None:
      empty = True
      break
    example[row], run[row] = task
    fresh[row] = True
  rows = np.arange(example.size)
  occupied = int(np.sum(example >= 0))
  size = _smallest(sizes, occupied, example.size)
  if empty and may_shrink and size < example.size:
    # Stable: idle places last, the others in their previous order.
    rows = np.argsort(example < 0, kind='stable')[:size]
  return Filled(Places(example[rows], run[rows]), rows, fresh[rows])


class Found(NamedTuple):
  """What the runs of a batch have found so far, one row per place.

  Attributes:
    candidates: what to check next, [B, ...].
    pending: whether the candidate has not been checked, [B].
    broken: whether the attack's model misclassifies it, [B].
    finished: whether the run is over, [B].
    zero_gradient: as in `Report`, [B].
    nonfinite: whether any gradient had entries that are not finite, [B].
    margin: of the candidate, [B]; -inf before the first one, or without
      `Report.margin`.
    bar: a misclassified candidate of a higher margin is checked at once, [B].
  """

  candidates: Array
  pending: Array
  broken: Array
  finished: Array
  zero_gradient: Array
  nonfinite: Array
  margin: Array
  bar: Array


def select(mask: Array, new: Array, old: Array) -> Array:
  """`new` where `mask` [B], else `old`."""
  return jnp.where(mask.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)


def _waits(found: Found, ranked: bool) -> Array:
  """Whether a success waits to be checked, [B]."""
  return found.broken & (found.margin > found.bar) if ranked else found.broken


@functools.partial(jax.jit, static_argnames=('to_end', 'own_model'))
def note(
    found: Found, report: Report, to_end: bool, own_model: bool
) -> tuple[Found, Array]:
  """Merges a report into the results.

  Args:
    found: the results so far.
    report: of the next step.
    to_end: keep the last success. Otherwise the first one, or with margins the
      first one above the bar.
    own_model: with margins, also keep the best candidate without a success.

  Returns:
    The results, and which runs are over or wait for a check.
  """
  rank = None if to_end else report.margin
  active = ~found.finished
  if not to_end:
    active &= ~_waits(found, rank is not None)
  new, margin = report.broken & active, found.margin
  if rank is not None:
    counts = active if own_model else new
    new = counts & (rank > margin)
    margin = jnp.where(new, rank, margin)
  nonfinite = found.nonfinite
  if report.nonfinite is not None:
    nonfinite |= report.nonfinite & active
  total = Found(
      select(new, report.candidates, found.candidates), found.pending | new,
      found.broken | (new & report.broken), found.finished | report.finished,
      found.zero_gradient | report.zero_gradient, nonfinite, margin, found.bar)
  over = total.finished
  return total, over if to_end else over | _waits(total, rank is not None)


@jax.jit
def clear_refused(found: Found, refused: Array) -> Found:
  """Clears rejected candidates of runs that continue; raises their bars."""
  bar = _GROWTH * jnp.maximum(found.margin, 0)
  return found._replace(
      pending=found.pending & ~refused, broken=found.broken & ~refused,
      bar=jnp.where(refused, bar, found.bar))


class Carry(NamedTuple):
  """A batch on the device: examples, attack state, and results so far."""

  examples: Examples
  state: Any
  found: Found


#: (carry, busy places [B], free places to wait for, most iterations) -> (carry,
#: finished runs [B], number of iterations made).
Advance = Callable[
    [Carry, np.ndarray, int, int], tuple[Carry, np.ndarray, int]]


#: Most iterations of the compiled loop before it returns to the host, and about
#: the most seconds: Python handles no signal before. Results depend on neither.
_LONGEST_CALL = 100
_LONGEST_SECONDS = 1.0


def make_advance(
    attack: BoundAttack, to_end: bool, own_model: bool = False, *,
    compiled: bool = False) -> Advance:
  """Builds the loop of an attack, once for all of its groups.

  A compiled loop runs until the given number of places is free, or for the
  given number of iterations. Otherwise each call makes one iteration, of
  functions that are already compiled.

  Args:
    attack: the attack.
    to_end: whether runs continue after a misclassified iterate.
    own_model: as in `Job`.
    compiled: whether to compile the loop on CPUs; elsewhere it always is,
      because a transfer to the host costs more than an iteration. On CPUs this
      saves up to a fifth of the time, but some convolutions are much slower
      inside a loop (`Traced.suits_loops`).

  Returns:
    The loop.
  """

  def iterate(carry: Carry) -> tuple[Carry, Array]:
    state, report = attack.step(carry.examples, carry.state)
    found, over = note(carry.found, report, to_end, own_model)
    return Carry(carry.examples, state, found), over

  if loops.unrolls() and not compiled:
    def once(
        carry: Carry, busy: np.ndarray, patience: int, limit: int
    ) -> tuple[Carry, np.ndarray, int]:
      del busy, patience, limit
      carry, over = iterate(carry)
      return carry, np.asarray(over), 1
    return once

  def loop(carry: Carry, busy: Array, patience: Array, limit: Array) -> Any:
    with loops.rolled():
      return jax.lax.while_loop(
          lambda c: (c[2] < limit) & (jnp.sum(c[1] & busy) < patience),
          lambda c: (*iterate(c[0]), c[2] + 1),
          (carry, jnp.zeros_like(busy), jnp.int32(0)))

  program = compilation.constants_as_arguments(loop)
  #: Types of a carry -> whether an iteration changes them.
  known: dict[Any, bool] = {}

  def many(
      carry: Carry, busy: np.ndarray, patience: int, limit: int
  ) -> tuple[Carry, np.ndarray, int]:
    if jax.dtypes.canonicalize_dtype(float) == np.float64:
      # E.g. a float64 network widens float32 iterates in the first step.
      types = tuple([leaf.dtype for leaf in jax.tree.leaves(carry)])
      if types not in known:
        known[types] = loops.changes_types(lambda c: iterate(c)[0], carry)
      if known[types]:
        carry, over = iterate(carry)
        return carry, np.asarray(over), 1
    carry, over, made = program(
        carry, busy, np.int32(patience), np.int32(limit))
    return carry, np.asarray(over), int(made)

  return many


def next_limit(limit: int, made: int, seconds: float) -> int:
  """The most iterations of the next call.

  Args:
    limit: of this call.
    made: iterations of this call.
    seconds: that it took, with compiling.

  Returns:
    Half as many after more than a second, twice as many after a call of
    `limit` iterations in less than half of that; in [1, 100].
  """
  if seconds > _LONGEST_SECONDS:
    return max(1, limit // 2)
  if made == limit and 2 * seconds < _LONGEST_SECONDS:
    return min(2 * limit, _LONGEST_CALL)
  return limit
