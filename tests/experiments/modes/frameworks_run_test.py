"""Whole runs of linen, nnx and Equinox networks of another package."""

import json

import jax
import numpy as np
import pytest

from experiments.modes import evaluate, landscape, train
from experiments.runs import reading
from experiments.runs import run as run_lib
from experiments.training import loop
from tests.experiments.config import named_parts_test
from tests.experiments.modes import train_test

PARTS = named_parts_test.PARTS


class Killed(BaseException):
  """Simulates a process that ends without saving."""


def config_of(kind):
  return train_test.small(
      dataset=f'{PARTS}:blobs(num=64)',
      model__name=f'{PARTS}:{kind}(hidden=16)',
      objective=f'{PARTS}:objective(weight=2.0)', awp__gamma=0.01, epochs=5,
      attack__name=f'{PARTS}:scaled_attack(scale=0.5)',
      augmentation__function=f'{PARTS}:darken(least=0.9)',
      optimizer__name=f'{PARTS}:optimizer', optimizer__learning_rate=0.01,
      ema_decay=0.5, eval__batch_size=32, eval__num_train=32,
      evaluation__attacks=(
          'pgd-3', f'{PARTS}:evaluation_attack(num_steps=2)'),
      evaluation__save_examples=True, landscape__num_train=16,
      landscape__num_test=16, landscape__points=3, landscape__plane_points=0,
      landscape__num_steps=2)


def weights(run, kind='last'):
  tree = reading.read_variables(run.workdir, kind).tree
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize('kind', named_parts_test.KINDS)
def test_a_whole_run(kind, tmp_path, monkeypatch):
  """Training, a kill and its resumption, evaluation, landscape, report."""
  whole = run_lib.prepare(config_of(kind), tmp_path / 'whole')
  with monkeypatch.context() as patch:
    train_test.without_report(patch)
    summary = train.train(whole)
  assert 0.7 < summary['best']['natural_accuracy'] <= 1

  usual = loop.Loop.end_epoch

  def end_epoch(self):
    if self.step == 3 * self.run.steps_per_epoch:
      raise Killed
    usual(self)

  stopped = run_lib.prepare(config_of(kind), tmp_path / 'stopped')
  with monkeypatch.context() as patch:
    train_test.without_report(patch)
    with patch.context() as inner:
      inner.setattr(loop.Loop, 'end_epoch', end_epoch)
      with pytest.raises(Killed):
        train.train(stopped)
    train.train(run_lib.prepare(config_of(kind), tmp_path / 'stopped'))
  for ours, theirs in zip(weights(stopped), weights(whole), strict=True):
    np.testing.assert_array_equal(ours, theirs)

  run = run_lib.reopen(config_of(kind), tmp_path / 'whole')
  found = evaluate.evaluate(run)['subjects']['last']
  assert found['natural']['accuracy'] == (
      summary['last']['natural_accuracy'])
  assert list(found['evaluations']) == list(run.config.evaluation.attacks)
  for entry in found['evaluations'].values():
    assert (tmp_path / 'whole' / entry['examples']).is_file()
  landscape.run_all(config_of(kind), tmp_path / 'whole', [])
  text = (tmp_path / 'whole' / 'report.html').read_text()
  assert 'evaluation_attack(num_steps=2)' in text
  measured = json.loads((tmp_path / 'whole' / 'landscape.json').read_text())
  assert measured
