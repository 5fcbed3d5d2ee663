"""Assigns tasks to the places of a batch of fixed size.

A queue holds tasks (example, run), ordered by run, and refills free places.
When it is empty the batch shrinks, to one of a few sizes so that few programs
are compiled.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from awp_jax.core import loops


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
  size = min((s for s in sizes if s >= occupied), default=example.size)
  if empty and may_shrink and size < example.size:
    # Stable: idle places last, the others in their previous order.
    rows = np.argsort(example < 0, kind='stable')[:size]
  return Filled(Places(example[rows], run[rows]), rows, fresh[rows])
