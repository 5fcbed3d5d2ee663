"""The software and hardware that numbers depend on."""

import importlib.metadata
import platform

import jax

import awp_jax

PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'chex', 'ml_collections',
    'tensorflow-datasets', 'orbax-checkpoint')


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that numbers depend on."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    found[name] = importlib.metadata.version(name)
  # Not of its metadata: it may be used without being installed.
  return found | {'awp_jax': awp_jax.__version__}


def devices() -> list[str]:
  """The kinds of the devices of this run, one entry a device."""
  return [device.device_kind for device in jax.devices()]
