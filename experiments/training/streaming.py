"""Passes training images from the host to the devices, step by step.

For images that do not fit on a device. Threads of `grain` gather the rows of
the next steps while the devices compute. The rows are those that the step would
gather on the device: the same function selects them, from (seed, step) alone.
"""

import collections
import mmap
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parallel import placement
from experiments.runs import run as run_lib
from experiments.training import training_data

#: Threads that gather rows. Several overlap the page faults of memory-mapped
#: images.
_THREADS = 4

#: Batches that wait on the host.
_BUFFER = 4

#: Steps that the devices have not completed when the next is dispatched; their
#: rows occupy the devices.
_IN_FLIGHT = 2


def _host_device() -> Any:
  """A device of this process to select rows on, the CPU if JAX offers it.

  An accelerator would select them after the steps that are queued on it.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names accelerators only
    return jax.local_devices()[0]


def _expect_random_reads(array: np.ndarray | None) -> None:
  """Tells the system not to read ahead in the file of a memory map.

  Reading ahead fetches many times the rows of a batch and displaces others.
  """
  base: Any = array
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, mmap.mmap):
    base.madvise(mmap.MADV_RANDOM)


class Stream:
  """The rows of each step, gathered on the host ahead of it."""

  def __init__(self, run: run_lib.Run) -> None:
    """Gathers nothing before the first call of `rows`.

    Args:
      run: the run.
    """
    self._run, self._data = run, training_data.of_run(run)
    _expect_random_reads(self._data.extra_images)
    self._key = jax.device_put(
        run_lib.keys(run.config)['order'], _host_device())
    self._order_fn = training_data.make_order_fn(run)
    self._select_fn = jax.jit(
        lambda key, order, step, size: training_data.select(
            run, key, order, step, size).index, static_argnums=3)
    self._lock = threading.Lock()
    self._orders: dict[int, Any] = {}
    self._iterator: Any = None
    self._current: tuple[int, Any] | None = None
    self._pending: collections.deque[Any] = collections.deque()

  def rows(self, step: int) -> Any:
    """The rows of a step, `training_data.Rows`, as an argument of the step.

    Args:
      step: number of completed steps. Another than the last or the next one, as
        after a return to a checkpoint, starts the gathering anew.

    Returns:
      The rows, split over the devices, or whole on each of them if
      `training_data.needs_all_rows`.
    """
    if self._current is None or self._current[0] != step:
      if self._current is None or self._current[0] + 1 != step:
        self._start(step)
      self._current = step, self._placed(step, next(self._iterator))
    return self._current[1]

  def wait(self, sums: Any) -> None:
    """Waits until few steps are incomplete.

    Args:
      sums: results of the last dispatched step.
    """
    # A copy, because the next step donates the buffer.
    self._pending.append(jnp.copy(jax.tree.leaves(sums)[0]))
    if len(self._pending) > _IN_FLIGHT:
      jax.block_until_ready(self._pending.popleft())

  def close(self) -> None:
    """Stops the threads."""
    if self._iterator is not None:
      self._iterator.close()

  def _start(self, step: int) -> None:
    import grain  # half of the start of a run that does not stream

    self.close()
    total = self._run.config.epochs * self._run.steps_per_epoch
    steps = grain.MapDataset.range(step, total).map(self._gather)
    self._iterator = iter(steps.to_iter_dataset(grain.ReadOptions(
        num_threads=_THREADS, prefetch_buffer_size=_BUFFER)))

  def _size(self, step: int) -> int:
    return self._run.batch_sizes[step % self._run.steps_per_epoch]

  def _order(self, number: int) -> Any:
    """A permutation; those of two passes are kept, for steps at the border."""
    with self._lock:
      if number not in self._orders:
        for old in [n for n in self._orders if abs(n - number) > 1]:
          del self._orders[old]
        self._orders[number] = self._order_fn(self._key, number)
      return self._orders[number]

  def _gather(self, step: int) -> training_data.Rows:
    """The rows of a step that this process needs; runs in a thread."""
    size = self._size(step)
    order = self._order(training_data.order_number(self._run, step))
    index = np.asarray(self._select_fn(self._key, order, step, size))
    is_extra = training_data.extra_mask(self._run, size)
    if not training_data.needs_all_rows(self._run):
      mine = placement.local_rows(size)
      index, is_extra = index[mine], is_extra[mine]
    images, labels, extra_images, extra_labels = self._data
    if extra_images is None:
      return training_data.Rows(images[index], labels[index])
    own, extra = index[~is_extra], index[is_extra]

    def mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
      rows = np.empty(
          (len(index), *first.shape[1:]),
          np.result_type(first.dtype, second.dtype))
      rows[~is_extra], rows[is_extra] = first[own], second[extra]
      return rows

    return training_data.Rows(
        mixed(images, extra_images), mixed(labels, extra_labels))

  def _placed(self, step: int, rows: training_data.Rows) -> Any:
    if training_data.needs_all_rows(self._run):
      return placement.replicate(rows)
    return placement.split_local(rows, self._size(step))
