"""Tests of initialization from another run or a PyTorch file."""

import jax
import numpy as np
import pytest

from awp_jax import models
from awp_jax.models import torch_exchange
from awp_jax.models.torch_exchange import files
from experiments.modes import train
from experiments.runs import checkpoints, metrics, warm_start
from experiments.runs import run as run_lib
from experiments.training import step
from tests.experiments.modes import train_test


def prepared(tmp_path, name, monkeypatch, **fields):
  train_test.use_tiny_net(monkeypatch)
  train_test.without_report(monkeypatch)
  return run_lib.prepare(train_test.small(
      dataset='npz', npz_path=train_test.write_images(tmp_path / 'mine.npz'),
      attack__num_steps=1, eval__num_steps=1, epochs=1, **fields),
      tmp_path / name)


@pytest.mark.parametrize('decay', [0.0, 0.5])
def test_a_run_starts_from_the_best_of_another(decay, tmp_path, monkeypatch):
  first = prepared(tmp_path, 'first', monkeypatch, ema_decay=decay)
  train.train(first)
  second = prepared(
      tmp_path, 'second', monkeypatch, init_from=str(first.workdir),
      ema_decay=0.9)
  state, said = run_lib.first_state(second)
  assert str(first.workdir) in said and 'classifier' not in said

  store = checkpoints.Checkpoints(first.workdir, 'best')
  tree, _ = store.load(
      step.to_tree(run_lib.initial_state(first), step.zero_sums()))
  store.close()
  wanted = tree['average']['params'] if decay else tree['params']
  jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
  jax.tree.map(np.testing.assert_array_equal, state.average.params, wanted)
  if decay:  # the average is not the last state
    assert any(
        (a != b).any() for a, b in zip(
            jax.tree.leaves(wanted), jax.tree.leaves(tree['params']),
            strict=True))
  # Training continues: the loss is lower than in the first run.
  train.train(second)
  losses = [
      metrics.read_metrics(run.workdir)[0]['train_loss']
      for run in (first, second)]
  assert losses[1] < losses[0]


def variables_of(model, seed):
  return jax.jit(model.init)(
      jax.random.key(seed), np.zeros((1, 8, 8, 3), np.float32))


@pytest.mark.parametrize('classes', [4, 7])
def test_a_pytorch_file(classes, tmp_path):
  theirs = models.WideResNet(num_classes=7, depth=10, width=1)
  stored = variables_of(theirs, 0)
  path = tmp_path / 'theirs.pt'
  files.write_state_dict(
      path, torch_exchange.to_torch(stored, theirs))
  ours = models.WideResNet(num_classes=classes, depth=10, width=1)
  start = variables_of(ours, 1)
  found, kept = warm_start.graft(start, warm_start.read(str(path)), str(path))
  assert kept == ([] if classes == 7 else [
      'params/fc/bias', 'params/fc/kernel'])
  for name, wanted in (('conv1', stored), ('fc', start if kept else stored)):
    np.testing.assert_array_equal(
        found['params'][name]['kernel'], wanted['params'][name]['kernel'])


def test_another_network_is_refused():
  small, large = (
      variables_of(models.WideResNet(num_classes=4, depth=10, width=k), 0)
      for k in (1, 2))
  with pytest.raises(ValueError, match=r'holds another network: .*block'):
    warm_start.graft(small, large, 'there')


def test_nothing_to_start_from(tmp_path):
  with pytest.raises(ValueError, match='no such file or folder'):
    warm_start.check(str(tmp_path / 'missing.pt'))
  with pytest.raises(ValueError, match='without checkpoints/best'):
    warm_start.check(str(tmp_path))
