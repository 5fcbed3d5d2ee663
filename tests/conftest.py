"""Eight virtual CPU devices, before jax is imported."""

from importlib import metadata
import os
import pathlib

# Low LLVM optimisation halves the time that the suite spends compiling, and the
# old code generator takes another third off it. XLA refuses flags that it does
# not know, and later releases may have dropped that one.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_backend_optimization_level=0' + (
        ' --xla_cpu_use_fusion_emitters=false'
        if metadata.version('jaxlib').startswith(('0.10.', '0.11.')) else ''))
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
import pytest

#: Folders of reference trajectories and of prepared data. They are not part of
#: the repository; tests that need them are skipped without.
FIXTURES = os.environ.get('AWP_TEST_FIXTURES')


@pytest.fixture
def x64():
  """64-bit arrays within one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def load_fixture():
  """Reads a reference trajectory by name, or skips."""

  def load(name: str) -> np.lib.npyio.NpzFile:
    if not FIXTURES:
      pytest.skip('AWP_TEST_FIXTURES names no folder of trajectories')
    return np.load(pathlib.Path(FIXTURES) / f'{name}.npz')

  return load
