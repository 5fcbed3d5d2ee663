"""Which examples sit in which places of a batch of a fixed size.

The work is a queue of tasks (example, run), ordered by run. Free places are
filled from it; when it is empty the batch shrinks to one of a few sizes, so
that few programs are compiled.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from awp_jax.core import loops


class Places(NamedTuple):
  """The task in each place: example -1 where it is idle."""

  example: np.ndarray
  run: np.ndarray


class Filled(NamedTuple):
  """Places after a refill.

  Attributes:
    places: the tasks.
    rows: the row of the former batch that each place takes over.
    fresh: which places begin a new task.
  """

  places: Places
  rows: np.ndarray
  fresh: np.ndarray


def batch_sizes(batch_size: int, num_devices: int) -> tuple[int, ...]:
  """The full batch and the smaller ones that the end of a queue shrinks to.

  On the CPU idle places cost as much as busy ones, so the sizes lie close; an
  accelerator hardly notices them, and compiles for longer.
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
  """The queue; reads `broken` as it stands when a task is taken."""
  for run in range(num_runs):
    for example in range(count):
      if not broken[example]:
        yield example, run


def fill(
    places: Places, queue: Iterator[tuple[int, int]], sizes: tuple[int, ...],
    may_shrink: bool) -> Filled:
  """Puts tasks into idle places; shrinks the batch when the queue runs dry.

  Args:
    places: the present tasks.
    queue: of `tasks`.
    sizes: the batch sizes allowed, largest first.
    may_shrink: whether the size may change now.

  Returns:
    The next places.
  """
  example, run = places.example.copy(), places.run.copy()
  fresh = np.zeros(example.size, bool)
  dry = False
  for row in np.flatnonzero(example < 0):
    task = next(queue, None)
    if task is None:
      dry = True
      break
    example[row], run[row] = task
    fresh[row] = True
  rows = np.arange(example.size)
  occupied = int(np.sum(example >= 0))
  size = min((s for s in sizes if s >= occupied), default=example.size)
  if dry and may_shrink and size < example.size:
    # Idle places last, in their old order otherwise.
    rows = np.argsort(example < 0, kind='stable')[:size]
  return Filled(Places(example[rows], run[rows]), rows, fresh[rows])
