"""The landscape of a finished run: numbers, records, resuming, errors."""

import json
import shutil

import jax
import numpy as np
import pytest

import awp_jax
from experiments.configs import digits_awp
from experiments.evaluation import landscape, landscape_records
from experiments.modes import landscape as landscape_mode
from experiments.modes import train
from experiments.runs import precision, restore, workdirs
from experiments.runs import run as run_lib
from tests.experiments.modes import train_test

SETTINGS = {
    'landscape__num_train': 20, 'landscape__num_test': 12,
    'landscape__num_directions': 2, 'landscape__points': 3,
    'landscape__range': 0.5, 'landscape__plane_points': 3,
    'landscape__num_steps': 2, 'landscape__batch_size': 8,
    'threat__epsilon': 0.1}


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """A run of two epochs and its landscape."""
  folder = tmp_path_factory.mktemp('landscape')
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=2, awp__gamma=0.01, **SETTINGS)
  with pytest.MonkeyPatch.context() as monkeypatch:
    train_test.use_tiny_net(monkeypatch)
    run = run_lib.prepare(config, folder / 'run')
  train.train(run)
  return run, landscape_mode.measure(run)


def test_writes_what_it_returns(measured):
  run, values = measured
  stored = json.loads((run.workdir / 'landscape.json').read_text())
  assert stored == json.loads(json.dumps(values, allow_nan=False))
  assert list(stored['subjects']) == ['best', 'last']
  assert stored['images'] == {'train': 20, 'test': 12}
  for entry in stored['subjects'].values():
    assert entry['random']['alphas'] == [-0.5, 0.0, 0.5]
    assert entry['adversarial']['alphas'] == [-0.05, 0.0, 0.05]
    assert np.shape(entry['plane']['train']['robust_loss']) == (3, 3)


@pytest.mark.parametrize('split,wanted', [('train', 20), ('test', 12)])
def test_center_is_the_checkpoint(measured, split, wanted):
  run, values = measured
  images = getattr(run.dataset, f'x_{split}')
  rows = np.linspace(0, len(images) - 1, wanted).astype(int)
  labels = getattr(run.dataset, f'y_{split}')[rows]
  for kind, step, variables in restore.load_variables(run):
    logits = jax.jit(run.model.apply)(
        variables, images[rows] / np.float32(255))
    natural = float(np.mean(awp_jax.cross_entropy(logits, labels)))
    entry = values['subjects'][kind]
    assert entry['step'] == step
    for name in ('random', 'adversarial'):
      part = entry[name][split]
      for one in part['natural_loss']['directions']:
        assert one[1] == pytest.approx(natural, rel=1e-5)
      assert part['natural_accuracy']['mean'][1] == pytest.approx(
          np.mean(np.argmax(logits, axis=-1) == labels))
      assert part['robust_loss']['mean'][1] > natural


def test_plane_crosses_the_curves(measured):
  _, values = measured
  for entry in values['subjects'].values():
    first, second = entry['random']['train']['robust_loss']['directions']
    plane = np.array(entry['plane']['train']['robust_loss'])
    np.testing.assert_allclose(plane[:, 1], first, rtol=1e-5)
    np.testing.assert_allclose(plane[1], second, rtol=1e-5)


def test_moments_and_rise(measured):
  _, values = measured
  part = values['subjects']['last']['random']['test']
  table = np.array(part['robust_loss']['directions'])
  np.testing.assert_allclose(part['robust_loss']['mean'], table.mean(axis=0))
  np.testing.assert_allclose(  # of two values
      part['robust_loss']['std'], np.abs(table[0] - table[1]) / np.sqrt(2))
  # Trapezoids: half of the mean of both ends, minus the center.
  np.testing.assert_allclose(
      part['mean_rise']['directions'],
      (table[:, 0] + table[:, 2]) / 4 - table[:, 1] / 2, rtol=1e-12)


def test_adversarial_direction_ascends(measured):
  _, values = measured
  curve = values['subjects']['last']['adversarial']['train']['robust_loss']
  left, center, right = curve['mean']
  assert right > center and right > left


def test_resumes_after_the_measured_points(measured, monkeypatch):
  run, values = measured
  calls = []
  measure = landscape.Checkpoint.measure
  monkeypatch.setattr(
      landscape.Checkpoint, 'measure',
      lambda self, series, points, progress: calls.append(
          (series.name, series.split, points)) or measure(
              self, series, points, progress))
  assert landscape_mode.measure(run) == values and not calls
  # A killed process leaves out the last lines, or truncates one.
  path = sorted(run.workdir.glob('landscape/*.jsonl'))[-1]
  whole = path.read_text()
  lines = whole.splitlines(keepends=True)
  path.write_text(''.join(lines[:-2]) + lines[-2][:30])
  assert landscape_mode.measure(run) == values
  assert calls == [('plane', 'train', [[0.5, 0.0], [0.5, 0.5]])]
  assert path.read_text() == whole
  # Only an additional direction is measured.
  calls.clear()
  config = run.config.copy_and_resolve_references()
  config.landscape.num_directions = 3
  more = landscape_mode.measure(run._replace(config=config))
  assert {name for name, _, _ in calls} == {'direction-2'}
  directions = more['subjects']['best']['random']['test']['robust_loss'][
      'directions']
  assert directions[:2] == values['subjects']['best']['random']['test'][
      'robust_loss']['directions']
  # Another attack gets its own records.
  calls.clear()
  config.landscape.num_steps = 1
  landscape_mode.measure(run._replace(config=config))
  assert len(calls) >= 9


def test_not_finite_is_null():
  points = [[{name: float('nan') for name in landscape_records.METRICS}] * 3]
  entry = landscape._curves(points, [-1, 0, 1])
  assert entry['robust_loss']['mean'] == [None] * 3
  assert entry['mean_rise']['mean'] is None
  json.dumps(entry, allow_nan=False)


def test_several_runs(measured, tmp_path, monkeypatch, capsys):
  train_test.use_tiny_net(monkeypatch)
  run, _ = measured
  other = tmp_path / 'AT'
  shutil.copytree(run.workdir, other)
  (other / 'landscape.json').unlink()
  landscape_mode.run_all(run.config, str(run.workdir), [str(other)])
  out = capsys.readouterr().out
  assert 'AT, best' in out and 'run, last' in out
  assert (other / 'landscape.json').exists()
  assert (other / 'report.html').exists()
  together = run.workdir / 'figures/landscapes'
  numbers = json.loads(
      (together / 'landscape_random_train_robust_loss.json').read_text())
  assert list(numbers['numbers']) == [
      'run, best', 'run, last', 'AT, best', 'AT, last']
  with pytest.raises(ValueError, match='contains a workdir twice'):
    landscape_mode.run_all(
        run.config, str(run.workdir), [str(other), f'{other}/'])


def test_moved_images_are_not_measured_again(measured, tmp_path, monkeypatch):
  run, values = measured
  monkeypatch.setattr(
      landscape.Checkpoint, 'measure',
      lambda *a: pytest.fail('a point was measured again'))
  moved = run._replace(
      workdir=shutil.copytree(run.workdir, tmp_path / 'moved'),
      dataset=run.dataset._replace(source='elsewhere'))
  found = landscape_mode.measure(moved)
  assert found['subjects'] == values['subjects']
  # Other images get other records, even if their number is the same.
  other = run._replace(dataset=run.dataset._replace(
      x_train=run.dataset.x_train[::-1]))
  monkeypatch.undo()
  facts = [landscape.record_facts(one, {}, landscape.select_images(one), 8)
           for one in (run, moved, other)]
  assert facts[0] == facts[1] != facts[2]


def test_stored_config(measured, tmp_path):
  run, _ = measured
  like = digits_awp.get_config()
  like.landscape.points, like.data_dir = 5, 'elsewhere'
  config = workdirs.stored_config(run.workdir, like)
  assert config.epochs == 2 and config.landscape.points == 5
  assert config.data_dir == 'elsewhere'
  assert config.optimizer.decay_at == (0.5, 0.75)
  with pytest.raises(ValueError, match=r'holds no config\.json of a run'):
    workdirs.stored_config(tmp_path, like)


@pytest.mark.parametrize('fields,shown', [
    ({'landscape__points': 0}, r'landscape\.points must .* got 0'),
    ({'landscape__points': 4}, 'an odd number >= 3, .* got 4'),
    ({'landscape__plane_points': 1}, 'an odd number >= 3, .* got 1'),
    ({'landscape__num_directions': 0}, 'num_directions must .* got 0'),
    ({'landscape__num_directions': 1}, 'num_directions >= 2, got 1'),
    ({'landscape__range': -1.0}, r'landscape\.range must .* got -1'),
    ({'landscape__adversarial_range': -1.0}, 'adversarial_range must'),
    ({'landscape__num_train': -1}, 'num_train must .* got -1'),
    ({'landscape__num_steps': 0}, 'num_steps must .* got 0'),
    ({}, 'holds no checkpoints: train there first')])
def test_settings_are_checked_before_data_are_read(fields, shown, tmp_path):
  with pytest.raises(ValueError, match=shown):
    landscape_mode.check(train_test.small(**fields), tmp_path)


def test_batches_are_spread_over_every_device(measured, monkeypatch):
  run, _ = measured
  seen = []

  def device_put(tree, *args, **kwargs):
    found = put(tree, *args, **kwargs)
    seen.extend(
        leaf.sharding.device_set for leaf in jax.tree.leaves(found)
        if leaf.shape == (8, 8, 8, 1))
    return found

  put = jax.device_put
  monkeypatch.setattr(jax, 'device_put', device_put)
  config = run.config.copy_and_resolve_references()
  config.landscape.update({
      'num_directions': 1, 'plane_points': 0, 'adversarial_range': 0.0,
      'seed': 1})
  landscape_mode.measure(run._replace(config=config))
  assert len(jax.devices()) == 8
  assert seen and all(devices == set(jax.devices()) for devices in seen)


def test_every_point_records_its_environment(measured):
  run, values = measured
  for entry in values['subjects'].values():
    (environment,) = entry['judged_by']
    assert environment['precision'] == 'float32'
    assert environment['matmul_precision'] == 'float32'
    assert environment['devices'] == [d.device_kind for d in jax.devices()]
    assert environment['versions']['jax'] == jax.__version__
    assert environment['versions']['awp_jax'] == (
        awp_jax.__version__)
  for path in run.workdir.glob('landscape/*.jsonl'):
    first, *others = map(json.loads, path.read_text().splitlines())
    assert first == {'judged_by': environment}
    assert others and not any('judged_by' in line for line in others)


def test_a_later_environment_is_kept_apart(tmp_path, monkeypatch):
  series = landscape_records.Series('plane', 'train', [[0.0], [1.0], [2.0]])
  point = dict.fromkeys(landscape_records.METRICS, 1.0)
  path = tmp_path / 'a.jsonl'
  for number, version in enumerate('112'):
    monkeypatch.setattr(
        precision, 'judged_by', lambda version=version: {'v': version})
    records = landscape_records.Records(path)
    assert records.find(series, [float(number)]) is None
    records.append(series, [float(number)], point)
  kinds = ['judged_by' in line for line in map(
      json.loads, path.read_text().splitlines())]
  assert kinds == [True, False, False, True, False]
  again = landscape_records.Records(path)
  assert again.judged_by == [{'v': '1'}, {'v': '2'}]
  assert all(again.find(series, p) == point for p in series.points)
