"""The benchmarks' networks have the sizes in the files."""

import importlib
import json
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import models
from experiments.ahead import sizes

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


@pytest.mark.slow
def test_accelerator(benchmark, capsys):
  case = 'preact_resnet:AT-AWP:128:tf32:perturbed'
  sizes = ['--width=1', '--depth=10', '--batch_size=2', '--image_size=4',
           '--num_steps=1']
  benchmark('accelerator').main(
      ['ours', case, *sizes, '--seconds=0', '--ceilings', '1', '2'])
  found = json.loads(capsys.readouterr().out)
  assert found['batch_size'] == 2 and found['steps'] == 5
  # Two passes for the attack's step, three each for ascent and descent, less
  # the gradient of the first convolution with respect to the images.
  assert 7.5 < found['forward_passes'] < 8.5
  assert found['tflops'] == pytest.approx(
      found['flops'] / found['seconds'] / 1e12)
  assert found['share_of_ceiling'] == pytest.approx(found['tflops'] / 2)
  with pytest.raises(ValueError, match='NETWORK:METHOD'):
    benchmark('accelerator').main(['ours', 'resnet:AT:1:tf32:perturbed'])


@pytest.mark.torch
@pytest.mark.parametrize('beta', [None, 6.0])
def test_torch_steps_agree(benchmark, monkeypatch, beta):
  """The tuned step makes the updates of the published one."""
  torch = pytest.importorskip('torch')
  steps = benchmark('torch_train_step')
  method = steps.Method(0.01, beta)
  monkeypatch.setattr(steps, 'start', lambda x, method: x + 0.01)
  x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
  y, moved = torch.arange(4), {}
  for variant in ('eager', 'tuned'):
    torch.manual_seed(0)
    model = steps.network('wide_resnet', width=1, depth=10)
    before = [w.detach().clone() for w in model.parameters()]
    steps.make_step(variant, model, x, y, method, 'float32')()
    moved[variant] = [
        (w.detach() - b).numpy()
        for w, b in zip(model.parameters(), before, strict=True)]
  for ours, theirs in zip(*moved.values(), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.torch
def test_torch_wide_resnet_has_our_parameters(benchmark):
  pytest.importorskip('torch')
  theirs = benchmark('torch_wide_resnet').WideResNet(10, 16, 2)
  model = models.WideResNet(10, depth=16, width=2)
  shapes = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
  assert sum(p.numel() for p in theirs.parameters()) == sum(
      leaf.size for leaf in jax.tree.leaves(shapes))


def record(**fields):
  """A record of `main.py --mode=compile --json`."""
  step = {
      'images_per_device': 16, 'fits': True, 'remedies': [],
      'memory': {'arguments': 240 * 10**6, 'temporaries': 170 * 10**6},
      'compile_seconds': 20.4, 'reused': 5, 'donated': 5,
      'flops': {'bfloat16': 4e11, 'float32': 1e11}, 'bytes_moved': 7.5e9,
      'collectives': [
          {'bytes': 10**6, 'times': 3, 'in_loop': True},
          {'bytes': 5 * 10**5, 'times': 1, 'in_loop': False}],
      'seconds': [0.010, 0.0115]}
  return {
      'config': 'cifar10_awp', 'target': 'h100:8', 'options': [],
      'date': '2026-11-26', 'versions': {'jax': '0.12'},
      'programs': {'training step': step}, 'epoch_seconds': [3.9, 4.5],
      'run_seconds': [1800.0, 3600.0]} | fields


def test_table_of_compiled_configs(benchmark):
  ahead = benchmark('ahead_of_time')
  assert ahead.row(record()) == [
      'cifar10_awp', '16', 'yes', '240 MB', '170 MB', '4', '3', '3.5', '5/5',
      '500.0', '7.50', '10.00 - 11.50', '3.9 - 4.5', '0.50 - 1.00', '20']
  step = record()['programs']['training step']
  del step['seconds']
  full = record(config='big', programs={
      'training step': step | {'fits': False, 'remedies': ['fewer images']}})
  failed = record(config='bad', error=['error: no'])
  page = ahead.table([record(), full, failed], 'a machine')
  assert '2026-11-26, a machine, no accelerator; jax 0.12.' in page
  assert '| big | 16 | **no** |' in page
  assert '`bad`: error: no' in page and '| bad |' not in page
  assert 'The training step of `big` fits with any of:\n\n* fewer' in page


def test_every_config_is_compiled(benchmark, tmp_path):
  ahead = benchmark('ahead_of_time')
  names = ahead.names()
  assert {'cifar10_awp', 'svhn_trades', 'digits_at'} < set(names)
  assert not {'base', 'parts'} & set(names)
  (flag,) = ahead.flags('cifar10_rst_awp', tmp_path)
  stored = sizes.headers(pathlib.Path(flag.partition('=')[2]))
  assert stored == {'image': ((500_000, 32, 32, 3), np.uint8)}
  assert ahead.flags('cifar10_awp', tmp_path) == []
