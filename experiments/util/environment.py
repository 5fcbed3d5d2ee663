"""The software and hardware that results depend on."""

import importlib.metadata
import platform

import jax

import awp_jax

PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'chex', 'ml_collections',
    'tensorflow-datasets', 'orbax-checkpoint')


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that results depend on.

  Returns:
    Versions by name; 'not installed' for packages that only some commands need,
    such as tensorflow-datasets.
  """
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  # Not from the metadata: the package may be used without installation.
  return found | {'awp_jax': awp_jax.__version__}


def devices() -> list[str]:
  """The kind of each device of this process."""
  return [device.device_kind for device in jax.devices()]
