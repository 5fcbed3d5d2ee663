"""Training steps against short trajectories of the published PyTorch code.

The files are in the repository, so parity is tested everywhere. PyTorch is
needed only to write them (benchmarks/parity_trajectory.py).
"""

import importlib
import pathlib

import numpy as np
import pytest

import awp_jax
from awp_jax.core import loops
from tests.helpers import torch_layout

ROOT = pathlib.Path(__file__).resolve().parents[3]
DATA = ROOT / 'tests/data'

CASES = {
    'at': ('at_awp_small', awp_jax.adversarial(), {
        'statistics': 'reference', 'normalized': True}),
    # Each of the two passes at w + v updates the statistics once.
    'trades': ('trades_awp_small', awp_jax.trades(6.0), {
        'statistics': 'perturbed', 'normalized': False})}


@pytest.mark.parametrize('kind', CASES)
def test_steps_equal_those_of_pytorch(kind, monkeypatch, x64):
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  name, objective, keywords = CASES[kind]
  archive = np.load(DATA / f'{name}.npz')
  wanted = torch_layout.recorded(archive)
  got = torch_layout.follow(archive, objective, **keywords)
  assert torch_layout.distance(got, wanted) < 1e-10
  first = torch_layout.variables(archive, 'init/')
  for part in ('params', 'batch_stats'):
    assert torch_layout.distance(first[part], getattr(wanted, part)) > 1e-2


@pytest.mark.torch
@pytest.mark.parametrize('kind', CASES)
def test_files_are_what_the_script_writes(kind, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
  script = importlib.import_module('parity_trajectory')
  archive = np.load(DATA / f'{CASES[kind][0]}.npz')
  again = script.trajectory(kind)
  assert set(again) == set(archive.files)
  for key, value in again.items():
    np.testing.assert_allclose(archive[key], value, atol=1e-12, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize('kind', CASES)
def test_every_part_of_the_files_depends_on_the_perturbation(
    kind, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
  script = importlib.import_module('parity_trajectory')
  archive = np.load(DATA / f'{CASES[kind][0]}.npz')
  monkeypatch.setitem(script.GAMMA, kind, 0.0)
  plain = script.trajectory(kind)
  for part in ('loss', 'final/conv1.weight', 'final/bn.running_mean',
               'final/bn.running_var', 'momentum/conv1.weight'):
    assert np.abs(archive[part] - plain[part]).max() > 1e-6, part
