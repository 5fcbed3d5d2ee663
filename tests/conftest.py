"""Eight virtual CPU devices and a compilation cache, before jax is imported."""

import atexit
import gc
from importlib import metadata
import os
import pathlib
import shutil
import tempfile

# Low LLVM optimization halves the time that the suite spends compiling; the old
# code generator takes a third off the rest, and small programs that are not
# split over threads another 15 %. XLA refuses flags that it does not know, and
# later releases have dropped the old generator.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_backend_optimization_level=0 '
    '--xla_cpu_parallel_codegen_split_count=1' + (
        ' --xla_cpu_use_fusion_emitters=false'
        if metadata.version('jaxlib').startswith(('0.10.', '0.11.')) else ''))
os.environ['JAX_PLATFORMS'] = 'cpu'

# Many tests compile the same programs. The cache is shared with the other
# worker and with the commands that tests start. To keep it from one session to
# the next, name its folder by JAX_COMPILATION_CACHE_DIR.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  cache = tempfile.mkdtemp(prefix='awp_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import numpy as np
import pytest

from tests.helpers import strict

#: Folders of reference trajectories and of real data. They are not part of the
#: repository; tests that need them are skipped without.
FIXTURES = os.environ.get('AWP_TEST_FIXTURES')
DATA = os.environ.get('AWP_TEST_DATA')


def pytest_configure(config: pytest.Config) -> None:
  """Registers CI's rules where the environment asks for them."""
  if os.environ.get('AWP_TEST_STRICT'):
    config.pluginmanager.register(
        strict.Strict(strict.read(strict.ALLOWED.read_text())))


def pytest_collection_finish() -> None:
  """Collects garbage less often, and not among all that was imported.

  Tracing creates many objects. With the default thresholds, looking for cycles
  among them takes 6 % of the suite's processor time.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(10_000, 10, 10)


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


@pytest.fixture
def data_folder():
  """The folder with `tfds/` and `graphs/`, or skips."""
  if not DATA:
    pytest.skip('AWP_TEST_DATA does not name a folder with real data')
  return pathlib.Path(DATA)
