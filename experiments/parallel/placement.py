"""Puts the arrays of the host on all devices of all processes.

Every process holds the whole of an array on its host, and passes its devices
the parts that they need.
"""

from typing import Any

import jax
import numpy as np

from experiments.parallel import mapping


def replicated() -> jax.sharding.NamedSharding:
  """The sharding of an array that is whole on every device."""
  return jax.sharding.NamedSharding(
      mapping.mesh(), jax.sharding.PartitionSpec())


def _by_rows() -> jax.sharding.NamedSharding:
  """The sharding of an array whose rows are split over all devices."""
  return jax.sharding.NamedSharding(
      mapping.mesh(), jax.sharding.PartitionSpec(mapping.AXIS))


def replicate(tree: Any) -> Any:
  """Copies a pytree of arrays to all devices.

  Args:
    tree: arrays or PRNG keys, equal in every process.

  Returns:
    The pytree, whole on every device.
  """
  sharding = replicated()
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(lambda leaf: _copy(leaf, sharding), tree)


def _copy(leaf: Any, sharding: jax.sharding.Sharding) -> Any:
  if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
    return leaf
  if not jax.dtypes.issubdtype(
      getattr(leaf, 'dtype', None), jax.dtypes.prng_key):
    return _from_host(np.asarray(leaf), sharding)
  return jax.random.wrap_key_data(
      _from_host(np.asarray(jax.random.key_data(leaf)), sharding),
      impl=jax.random.key_impl(leaf))


def _from_host(array: np.ndarray, sharding: jax.sharding.Sharding) -> Any:
  # Unlike device_put, this does not compare the processes' copies.
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index])


def split(tree: Any) -> Any:
  """Splits a pytree of arrays [B, ...] over all devices by rows.

  Args:
    tree: arrays of the host, equal in every process. The number of devices
      divides B.

  Returns:
    The pytree, as arguments in `rows` of `mapping.over_devices`.
  """
  if jax.process_count() == 1:
    count = jax.device_count()
    return jax.tree.map(
        lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree)
  sharding = _by_rows()
  return jax.tree.map(
      lambda leaf: _from_host(np.asarray(leaf), sharding), tree)


def own_devices() -> list[jax.Device] | None:
  """The devices of this process, to divide a batch over; None for one."""
  devices = jax.local_devices()
  return devices if len(devices) > 1 else None


def local_rows(size: int) -> np.ndarray:
  """The numbers of the rows of a batch on the devices of this process.

  Args:
    size: of the batch over all devices, whose number divides it.

  Returns:
    Integers [L], ascending; all of 0..size - 1 if there is one process.
  """
  rows = np.arange(size).reshape(jax.device_count(), -1)
  own = [device.process_index == jax.process_index()
         for device in jax.devices()]
  return rows[own].ravel()


def split_local(tree: Any, size: int) -> Any:
  """Like `split`, for a process that has only the rows of its own devices.

  Args:
    tree: arrays [L, ...] of the host, the rows `local_rows(size)`.
    size: of the batch over all devices.

  Returns:
    The pytree, as arguments in `rows` of `mapping.over_devices`.
  """
  if jax.process_count() == 1:
    return split(tree)
  sharding, rows = _by_rows(), local_rows(size)

  def place(leaf: np.ndarray) -> Any:
    def part(index: Any) -> np.ndarray:
      # JAX asks only for the rows of this process.
      return leaf[np.searchsorted(rows, np.arange(size)[index[0]])]

    return jax.make_array_from_callback(
        (size, *leaf.shape[1:]), sharding, part)

  return jax.tree.map(place, tree)


def rounded(batch_size: int) -> int:
  """A batch size rounded up to a multiple of the devices of this process."""
  count = jax.local_device_count()
  return -(-batch_size // count) * count


def device_numbers() -> Any:
  """The numbers of all devices, split over them: one, [1], on each."""
  return split(np.arange(jax.device_count()))


def own_rows(array: jax.Array, device: jax.Array) -> jax.Array:
  """The rows of a replicated array for one device, inside a mapped function.

  Args:
    array: [B, ...], equal on all devices; their number divides B.
    device: number of the device, [1], from `device_numbers`.

  Returns:
    Rows [B / D, ...].
  """
  size = array.shape[0] // jax.lax.axis_size(mapping.AXIS)
  return jax.lax.dynamic_slice_in_dim(array, device[0] * size, size)


