"""Tests of collapse detection: on given metrics, and in collapsing runs."""

import json
import math

import ml_collections
import numpy as np
import pytest

from experiments.modes import train
from experiments.runs import checkpoints, metrics
from experiments.runs import run as run_lib
from experiments.training import collapse
from tests.experiments.modes import train_test

SETTINGS = ml_collections.ConfigDict({
    'action': 'stop', 'grace_steps': 10, 'stretch_steps': 20, 'factor': 0.5,
    'most_shrinks': 2})
LEVEL = collapse.chance(np.arange(1000) % 10, 10)
LOST = collapse.Window(math.log(10), 0.1, 1.0, 1000)
WELL = collapse.Window(2.1, 0.2, 1.0, 1000)


def test_chance_is_that_of_the_labels():
  assert LEVEL == pytest.approx((0.1, math.log(10), math.log(10)))
  uneven = collapse.chance(np.array([0, 0, 0, 2]), 3)
  entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
  assert uneven == pytest.approx((0.75, entropy, math.log(3)))


@pytest.mark.parametrize('look, shown', [
    (LOST, 'the loss 2.3026'),
    (LOST._replace(accuracy=0.0), 'the loss 2.3026'),  # ties go to the attack
    (LOST._replace(loss=2.41), 'robust accuracy 10.00 %'),  # of MART
    (LOST._replace(loss=9.0, accuracy=0.12), 'robust accuracy 12.00 %'),
    (WELL._replace(gradient_norm=0.0), 'the gradient is zero'),
])
def test_faults(look, shown):
  assert shown in collapse.fault(look, LEVEL)


@pytest.mark.parametrize('look', [
    WELL,
    WELL._replace(loss=2.29),  # near chance, but it separates classes
    LOST._replace(loss=2.0),
    LOST._replace(loss=3.0, accuracy=0.02),  # attacked, not constant
    LOST._replace(loss=2.5, accuracy=0.14),
])
def test_no_faults(look):
  assert collapse.fault(look, LEVEL) == ''


def test_a_jump_of_the_loss_is_a_fault_and_a_high_one_is_not():
  high = WELL._replace(loss=4.0)  # MART's may be
  assert collapse.fault(high, LEVEL) == collapse.fault(high, LEVEL, 2.1) == ''
  assert 'was 1.4000 before' in collapse.fault(high, LEVEL, 1.4)
  # Twice as large, but still better than constant outputs.
  assert collapse.fault(WELL, LEVEL, 0.5) == ''
  detector = collapse.Detector(SETTINGS, LEVEL, first_step=10)
  detector.update(20, WELL._replace(loss=1.4))
  detector.update(30, high)
  assert detector.is_suspicious


def test_few_images_need_a_greater_distance():
  look = WELL._replace(loss=2.29, accuracy=0.18, images=20)
  assert collapse.fault(look, LEVEL) and not collapse.fault(
      look._replace(images=2000), LEVEL)


def test_a_stretch_is_needed_and_one_good_look_ends_it():
  detector = collapse.Detector(SETTINGS, LEVEL, first_step=10)
  for step in (5, 10):
    detector.update(step, LOST)
    assert not detector.is_suspicious  # too early for suspicion
  detector.update(15, LOST)
  assert detector.is_suspicious
  detector.update(25, LOST)
  detector.update(29, WELL)
  assert not detector.is_suspicious
  detector.update(35, LOST)
  detector.update(48, LOST)
  with pytest.raises(collapse.Collapsed, match='since step 29, for 20 steps'):
    detector.update(49, LOST)


def test_zero_gradient_is_a_collapse_at_once():
  detector = collapse.Detector(SETTINGS, LEVEL, first_step=10)
  with pytest.raises(collapse.Collapsed, match='gradient is zero'):
    detector.update(1, WELL._replace(gradient_norm=0.0))


def test_the_record_survives(tmp_path):
  record = collapse.Record(tmp_path)
  assert record.factor == 1 and not list(tmp_path.iterdir())
  record.shrink(0.5, 30, 20, 'why')
  record.shrink(0.5, 40, 20, 'again')
  again = collapse.Record(tmp_path)
  assert again.factor == 0.25
  assert again.shrinks == [
      {'step': 30, 'back_to': 20, 'factor': 0.5, 'why': 'why'},
      {'step': 40, 'back_to': 20, 'factor': 0.25, 'why': 'again'}]


def collapsing(tmp_path, monkeypatch, **fields):
  """A run with a far too large gamma from its third epoch on."""
  train_test.use_tiny_net(monkeypatch)
  train_test.without_report(monkeypatch)
  return run_lib.prepare(train_test.small(
      dataset='npz', npz_path=train_test.write_images(tmp_path / 'mine.npz'),
      awp__gamma=300.0, awp__warmup_epochs=2, epochs=8, attack__num_steps=1,
      eval__num_steps=1, threat__epsilon=0.01, attack__step_size=0.01,
      guard__grace_steps=0, guard__stretch_steps=6,
      optimizer__learning_rate=0.05, **fields), tmp_path / 'run')


def test_a_collapse_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
  run = collapsing(tmp_path, monkeypatch)
  with pytest.raises(train.Diverged) as error:
    train.train(run)
  text = str(error.value)
  last = checkpoints.Checkpoints(run.workdir, 'last')
  # Three steps per epoch; AWP starts after the sixth.
  assert last.step() == 6, text
  assert f'state of step 6 is in {last.folder}' in text
  last.close()
  assert 'collapsed' in text or 'diverged' in text
  assert 'guard.action=shrink' in text
  assert not (run.workdir / 'summary.json').exists()


def test_a_collapse_goes_back_with_a_smaller_gamma(tmp_path, monkeypatch):
  run = collapsing(
      tmp_path, monkeypatch, guard__action='shrink', guard__factor=1e-4)
  summary = train.train(run)
  assert summary['last']['epoch'] == 8
  record = json.loads((run.workdir / 'guard.json').read_text())
  (shrink,) = record['shrinks']
  assert shrink['back_to'] == 6 and record['factor'] == shrink['factor'] == 1e-4
  lines = metrics.read_metrics(run.workdir)
  assert [line['epoch'] for line in lines] == list(range(1, 9))
  ratios = [line['perturbation_ratio'] for line in lines]
  np.testing.assert_allclose(ratios, [0] * 2 + [0.03] * 6, rtol=1e-3)
  assert lines[-1]['train_loss'] < lines[0]['train_loss']

  # Resumed, it is still finished and keeps its gamma.
  assert train.train(run) == summary


def test_shrinking_gives_up(tmp_path, monkeypatch):
  run = collapsing(
      tmp_path, monkeypatch, guard__action='shrink', guard__factor=0.9,
      guard__most_shrinks=2)
  with pytest.raises(train.Diverged):
    train.train(run)
  assert len(json.loads(
      (run.workdir / 'guard.json').read_text())['shrinks']) == 2
