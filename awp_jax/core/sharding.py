"""Placement of arrays: on one device, sharded or replicated."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _put(
    tree: Any, devices: Sequence[jax.Device] | None, spec: Any) -> Any:
  if not devices:
    return jax.device_put(tree)
  mesh = jax.sharding.Mesh(np.asarray(devices), ('batch',))
  return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def shard(tree: Any, devices: Sequence[jax.Device] | None) -> Any:
  """Shards arrays [B, ...] over devices along the first axis.

  Args:
    tree: a pytree of arrays; the number of devices must divide B.
    devices: the devices; None or an empty sequence means the default device.

  Returns:
    The tree of device arrays.
  """
  return _put(tree, devices, jax.sharding.PartitionSpec('batch'))


def replicate(tree: Any, devices: Sequence[jax.Device] | None) -> Any:
  """Replicates arrays over devices; arguments as in `shard`."""
  return _put(tree, devices, jax.sharding.PartitionSpec())


def varying_axes(leaf: Any) -> frozenset[str]:
  """The mesh axes that a value varies over, if `shard_map` tracks them.

  Args:
    leaf: an array, or its shape from `jax.eval_shape`.

  Returns:
    The names of the axes. Empty outside `shard_map`, under `pmap` and `vmap`,
    and with `check_vma=False`.
  """
  of_type = leaf if isinstance(
      leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
  tracked = getattr(of_type, 'manual_axis_type', None)
  return frozenset(getattr(tracked, 'varying', None) or ())


def zeros(tree: Any) -> Any:
  """Zeros of the shapes of `jax.eval_shape`, varying over the same axes."""

  def make(shape: Any) -> Any:
    return _varying(
        jnp.zeros(shape.shape, shape.dtype), tuple(varying_axes(shape)))

  return jax.tree.map(make, tree)


def as_local(tree: Any, axis_name: str) -> Any:
  """Each device's own copy of replicated values.

  Where `shard_map` tracks varying values, the gradient with respect to a
  replicated value is summed over the devices. That with respect to a copy is
  the device's own.

  Args:
    tree: a pytree of arrays, equal on all devices of the axis.
    axis_name: the axis of the devices.

  Returns:
    The same values, marked as varying if they are tracked.
  """
  axes = tuple(varying_axes(jax.lax.axis_index(axis_name)))
  return jax.tree.map(lambda leaf: _varying(leaf, axes), tree)


def _varying(leaf: Any, axes: tuple[str, ...]) -> Any:
  return jax.lax.pcast(leaf, axes, to='varying') if axes else leaf
