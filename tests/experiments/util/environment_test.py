"""Records of the software name what is installed and what is missing."""

import importlib.metadata

import jax

from experiments.util import environment


def test_versions_of_missing_packages(monkeypatch):
  known = importlib.metadata.version

  def version(name):
    if name == 'tensorflow-datasets':
      raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

  monkeypatch.setattr(importlib.metadata, 'version', version)
  found = environment.versions()
  assert found['tensorflow-datasets'] == 'not installed'
  assert found['jax'] == jax.__version__
