"""Fixtures of the data tests: private folders, and a download server."""

import pytest

from experiments.data import archives
from tests.helpers.dataset_files import Server, at, serving, tiny

PROXIES = ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy')


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
  """Hides this machine's data, cache and proxies from the tests."""
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('AWP_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  for name in PROXIES:
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def shop():
  """(server, its tiny CIFAR-10, the arrays of that)."""
  files = {}
  expected = tiny(archives.CIFAR10, files)
  with serving(Server(files)) as server:
    yield server, at(server, archives.CIFAR10), expected
