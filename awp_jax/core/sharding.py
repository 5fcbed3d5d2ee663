"""Where arrays lie: on one device, cut over several, or whole on each."""

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
  """Puts arrays [B, ...] onto devices, each with its part of the rows.

  Args:
    tree: a pytree of arrays whose first axis the number of devices divides.
    devices: any number; None or none means the default device.

  Returns:
    The tree.
  """
  return _put(tree, devices, jax.sharding.PartitionSpec('batch'))


def replicate(tree: Any, devices: Sequence[jax.Device] | None) -> Any:
  """Puts arrays whole onto each of some devices; arguments as for `shard`."""
  return _put(tree, devices, jax.sharding.PartitionSpec())


def varying_axes(leaf: Any) -> frozenset[str]:
  """The mesh axes over which a value varies, where `shard_map` tracks that.

  Args:
    leaf: an array, or its shape from `jax.eval_shape`.

  Returns:
    The names of the axes; none outside of `shard_map`, under `pmap` and `vmap`,
    and with `check_vma=False`.
  """
  of_type = leaf if isinstance(
      leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
  tracked = getattr(of_type, 'manual_axis_type', None)
  return frozenset(getattr(tracked, 'varying', None) or ())
