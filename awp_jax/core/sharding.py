"""Placement of arrays: on one device, sharded or replicated."""

from collections.abc import Sequence
from typing import Any

import jax
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
