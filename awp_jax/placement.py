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


def cut(tree: Any, devices: Sequence[jax.Device] | None) -> Any:
  """Puts arrays [B, ...] onto devices, each with its part of the rows.

  Args:
    tree: a pytree of arrays whose first axis the number of devices divides.
    devices: any number; None or none means the default device.

  Returns:
    The tree.
  """
  return _put(tree, devices, jax.sharding.PartitionSpec('batch'))


def everywhere(tree: Any, devices: Sequence[jax.Device] | None) -> Any:
  """Puts arrays whole onto each of some devices; arguments as for `cut`."""
  return _put(tree, devices, jax.sharding.PartitionSpec())
