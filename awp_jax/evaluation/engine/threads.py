"""Parallel batches on the CPU, each in its own thread.

XLA leaves all cores but one idle for large parts of a gradient on the CPU. Two
batches at a time on two cores take 0.37 instead of 0.58 ms per image for the
gradient of a small convolutional network, and 9.6 instead of 14.8 ms for that
of PreActResNet-18 (`docs/results/autoattack_speed.md`). Verdicts do not depend
on how the examples are divided among the threads.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import os
import threading
from typing import Any

import jax
import numpy as np

from awp_jax.core import loops
from awp_jax.evaluation.engine import driver
from awp_jax.evaluation.engine.driver import Job, Outcome
from awp_jax.evaluation.verdicts import Group

#: Most parallel batches; more would make each one too small.
_MOST_STREAMS = 4

#: Fewest examples per thread.
_FEWEST_EXAMPLES = 8


def num_streams(batch_size: int) -> int:
  """Number of parallel batches that `batch_size` is divided into.

  One on accelerators; on the CPU one per core available to this process, at
  most 4.
  """
  if not loops.unrolls():
    return 1
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return max(1, min(cores, _MOST_STREAMS, batch_size // _FEWEST_EXAMPLES))


class _Stopped(Exception):
  """Another thread of the group failed, or the user interrupted it."""


class _Shared:
  """State that the threads of a group share."""

  def __init__(self) -> None:
    self.stop = threading.Event()
    self._compiling = threading.Lock()
    self._compiled: set[int] = set()

  @contextlib.contextmanager
  def around(self, width: int) -> Iterator[None]:
    """One thread compiles for a batch size; the others wait for it."""
    if self.stop.is_set():
      raise _Stopped
    if width in self._compiled:
      yield
      return
    with self._compiling:
      yield
      self._compiled.add(width)


def _settings() -> dict[str, Any]:
  """JAX's settings in this thread."""
  # Some settings cannot be read.
  return {n: getattr(jax.config, n, None) for n in jax.config.values}


def attack_group(job: Job, group: Group, *, streams: int) -> Outcome:
  """`driver.attack_group` with several batches at a time.

  Args:
    job: the attack; its sizes apply to each batch.
    group: the examples.
    streams: most batches at a time.

  Returns:
    The outcome.
  """

  def run(rows: np.ndarray) -> Outcome | None:
    part = Group(*(leaf[rows] for leaf in group))
    try:
      return driver.attack_group(job, part, around=shared.around)
    except _Stopped:
      return None
    except BaseException:
      # Workers are joined in order, so signal the failure now.
      shared.stop.set()
      raise

  shared, count = _Shared(), group.labels.size
  streams = max(1, min(streams, count // _FEWEST_EXAMPLES))
  with futures.ThreadPoolExecutor(max(1, streams - 1)) as pool:
    # JAX's context managers apply only to the thread that entered them.
    if streams > 1 and pool.submit(_settings).result() != _settings():
      streams = 1
    shares = [np.arange(count)[s::streams] for s in range(streams)]
    others = [pool.submit(run, rows) for rows in shares[1:]]
    try:
      outcomes = [run(shares[0]), *(other.result() for other in others)]
    except BaseException:
      shared.stop.set()
      raise
  whole = driver.no_outcome(group)
  for rows, outcome in zip(shares, outcomes, strict=True):
    assert outcome is not None, 'a thread stopped although none failed'
    for leaf, values in zip(whole, outcome, strict=True):
      leaf[rows] = values
  return whole


def attack_again(
    job: Job, group: Group, first: Outcome, *, streams: int) -> Outcome:
  """Attacks examples again that another model left undecided.

  Args:
    job: the attack on the model of the verdicts.
    group: the examples.
    first: the outcome of the attack on another model; updated in place. Robust
      examples with a rejected or close candidate are undecided.
    streams: most batches at a time.

  Returns:
    The outcome of both.
  """
  rows = np.flatnonzero(~first.broken & (first.refused | first.close))
  if not rows.size:
    return first
  second = attack_group(
      job, Group(*(leaf[rows] for leaf in group)), streams=streams)
  for name, leaf, new in zip(Outcome._fields, first, second, strict=True):
    if name in ('adversarial', 'distances'):
      leaf[rows] = new  # none of them was broken before
    elif name != 'refused':
      leaf[rows] |= new
  return first
