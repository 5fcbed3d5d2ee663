"""Copies of arrays on all devices."""

from typing import Any

import jax
import numpy as np

from experiments.config.build import AXIS


def on_all_devices() -> jax.sharding.NamedSharding:
  """The sharding of an array that is replicated on all devices."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def replicate(tree: Any) -> Any:
  """Copies a pytree of arrays to all devices."""
  return jax.device_put(tree, on_all_devices())
