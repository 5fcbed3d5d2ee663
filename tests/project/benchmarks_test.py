"""The benchmarks' networks have the sizes in the files."""

import importlib
import pathlib

from flax import traverse_util
import jax
import numpy as np
import pytest

from awp_jax import models

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch):
  """Imports a script and lets it import its siblings."""
  monkeypatch.syspath_prepend(str(FOLDER))
  return importlib.import_module


def write_fixture(path, widths, classes):
  """Writes a file in the layout of autoattack.npz, with random weights."""
  rng, arrays = np.random.default_rng(0), {}
  for i, (into, out) in enumerate(zip((3, *widths), widths, strict=False)):
    arrays[f'param/{2 * i}.weight'] = rng.normal(size=(out, into, 3, 3)) / 3
    arrays[f'param/{2 * i}.bias'] = rng.normal(size=out)
  head = 2 * len(widths) + 2
  arrays[f'param/{head}.weight'] = rng.normal(size=(classes, widths[-1]))
  arrays[f'param/{head}.bias'] = rng.normal(size=classes)
  np.savez(path, **{k: v.astype(np.float32) for k, v in arrays.items()})


# In alphabetical order layer 10 precedes layer 2.
@pytest.mark.torch
@pytest.mark.parametrize('widths, classes', [
    ((3, 5, 7, 4), 10), ((4, 2), 3), ((2, 3, 4, 5, 6, 7), 4)])
def test_fixture_network(benchmark, tmp_path, widths, classes):
  torch = pytest.importorskip('torch')
  path = tmp_path / 'a.npz'
  write_fixture(path, widths, classes)
  theirs = benchmark('autoattack').torch_model(
      {'model': 'fixture', 'fixture': str(path)})
  ours = benchmark('autoattack_fixture').network(np.load(path))
  x = np.random.default_rng(1).uniform(size=(2, 12, 12, 3)).astype(np.float32)
  with torch.no_grad():
    wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2).copy())).numpy()
  assert wanted.shape == (2, classes) and np.ptp(wanted) > 0.1
  np.testing.assert_allclose(jax.jit(ours)(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.torch
def test_resnet(benchmark):
  torch = pytest.importorskip('torch')
  model = models.PreActResNet(10)
  x = np.random.default_rng(1).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  flat = traverse_util.flatten_dict(variables, sep='/')
  theirs = benchmark('torch_preact_resnet').load(flat)
  with torch.no_grad():
    wanted = theirs(torch.tensor(x.transpose(0, 3, 1, 2).copy())).numpy()
  np.testing.assert_allclose(
      jax.jit(model.apply)(variables, x), wanted, atol=1e-4)
