"""Tests of the training run in this process, on eight virtual devices."""

import json

from flax import linen as nn
import jax
import numpy as np
import pytest

from experiments.config import networks, schema
from experiments.configs import base, digits_awp
from experiments.modes import train
from experiments.reports import page
from experiments.runs import checkpoints, metrics, reading
from experiments.runs import run as run_lib
from experiments.training import step


def write_images(path, num_train=48, num_test=20, seed=0):
  """8 x 8 images: brightness by class, plus noise."""
  rng = np.random.default_rng(seed)
  arrays = {}
  for part, num in (('train', num_train), ('test', num_test)):
    labels = np.arange(num) % 4
    images = 50 * labels[:, None, None, None] + rng.integers(
        0, 60, (num, 8, 8, 1))
    arrays |= {f'x_{part}': images.astype(np.uint8), f'y_{part}': labels}
  np.savez(path, **arrays)
  return str(path)


def small(config=None, **fields):
  """A config that compiles fast; `a__b` sets `a.b`."""
  config = config or digits_awp.get_config()
  fields = {
      'attack.num_steps': 2, 'eval.num_steps': 2, 'eval.batch_size': 24,
      'eval.num_train': 16, 'eval.every_epochs': 1, 'log_every_steps': 1,
      'num_train': 0,
      'num_test': 0, 'batch_size': 16,
  } | {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict(fields)
  schema.check(config, base.get_config())
  return config


class TinyNet(nn.Module):
  """A network that compiles fast."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3), use_bias=False)(x - 0.5)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(4)(x.mean(axis=(1, 2)))


def use_tiny_net(monkeypatch):
  monkeypatch.setattr(networks, 'build', lambda config, dataset: TinyNet())


def without_report(monkeypatch):
  """Skips the report, for tests of other things."""
  monkeypatch.setattr(page, 'write_or_warn', lambda run, mode: None)


class Watched:
  """Trains one run and records its calls and compilations."""

  def __init__(self, folder, monkeypatch):
    self.made, self.compiled, self.output = [], 0, []
    self.compiled_by_epoch = []
    self.config = small(
        dataset='npz', npz_path=write_images(folder / 'mine.npz'),
        num_validation=8, select_on='validation', awp__warmup_epochs=1,
        awp__gamma=0.01, epochs=4, batch_size=32)
    make, append = step.make_train_fn, metrics.MetricsLog.append

    def make_train_fn(run, size, factor):
      self.made.append((size, factor))
      return make(run, size, factor)

    def counted_append(log, line):
      self.compiled_by_epoch.append(self.compiled)
      append(log, line)

    def count(event, duration, **kwargs):
      del duration, kwargs
      self.compiled += event == '/jax/core/compile/backend_compile_duration'

    evaluate = step.evaluate

    def evaluated(run, eval_fn, state, is_stopping):
      # Epoch 1 is the best on test images, epoch 3 on validation images.
      values = evaluate(run, eval_fn, state, is_stopping)
      epoch = int(state.step) // run.steps_per_epoch
      for split, best in (('test', 1), ('validation', 3)):
        values[f'{split}_robust_accuracy'] = (
            values[f'{split}_natural_accuracy'] if epoch == best else 0.0)
      return values

    use_tiny_net(monkeypatch)
    monkeypatch.setattr(step, 'evaluate', evaluated)
    monkeypatch.setattr(step, 'make_train_fn', make_train_fn)
    monkeypatch.setattr(metrics.MetricsLog, 'append', counted_append)
    jax.monitoring.register_event_duration_secs_listener(count)
    self.run = run_lib.prepare(self.config, folder / 'run')
    self.summary = train.train(self.run)


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
  with pytest.MonkeyPatch.context() as monkeypatch:
    return Watched(tmp_path_factory.mktemp('train'), monkeypatch)


def test_files(watched):
  folder = watched.run.workdir
  names = {path.name for path in folder.iterdir()}
  assert names == {
      'config.json', 'metrics.jsonl', 'steps.jsonl', 'tensorboard',
      'curves.png',
      'summary.json', 'checkpoints', 'report.html', 'figures', '.lock'}
  assert json.loads((folder / 'summary.json').read_text()) == watched.summary
  assert (folder / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert list((folder / 'tensorboard').glob('*tfevents*'))


def test_lines_of_steps(watched):
  """With a line per step, their means over an epoch are those of its line."""
  steps = metrics.read_lines(watched.run.workdir / 'steps.jsonl', 'step')
  assert [line['step'] for line in steps] == list(range(1, 1 + len(steps)))
  per_epoch = watched.run.steps_per_epoch
  epochs = metrics.read_metrics(watched.run.workdir)
  assert len(steps) == per_epoch * len(epochs)
  for number, epoch in enumerate(epochs):
    own = steps[number * per_epoch:(number + 1) * per_epoch]
    images = [line['images'] for line in own]
    assert sum(images) == epoch['images']
    for name, key in (('loss', 'train_loss'), ('gradient_norm',) * 2,
                      ('robust_accuracy', 'train_batch_robust_accuracy')):
      np.testing.assert_allclose(
          np.average([line[name] for line in own], weights=images),
          epoch[key], rtol=1e-5)
    assert own[-1]['learning_rate'] == pytest.approx(epoch['learning_rate'])


def test_lines(watched):
  lines = metrics.read_metrics(watched.run.workdir)
  assert [line['epoch'] for line in lines] == [1, 2, 3, 4]
  # The rate drops to 0.1 at half of the run and to 0.01 at three quarters. A
  # line has the rate of the epoch's last step.
  np.testing.assert_allclose(
      [line['learning_rate'] for line in lines], [0.1, 0.01, 0.001, 0.001],
      rtol=1e-6)
  for line in lines:
    for split, num in (('train', 16), ('test', 20), ('validation', 8)):
      natural, robust = (
          line[f'{split}_{kind}_accuracy'] for kind in ('natural', 'robust'))
      assert 0 <= robust <= natural <= 1
      assert natural * num == pytest.approx(round(natural * num), abs=1e-4)
      assert line[f'{split}_robust_loss'] >= line[f'{split}_natural_loss'] > 0
    assert line['seconds_training'] > 0 and line['images_per_second'] > 0
  assert lines[-1]['train_loss'] < lines[0]['train_loss']


def test_the_smaller_last_batch_is_kept(watched):
  assert watched.run.batch_sizes == [32, 8]
  lines = metrics.read_metrics(watched.run.workdir)
  assert [line['images'] for line in lines] == [40] * 4
  last = checkpoints.Checkpoints(watched.run.workdir, 'last')
  assert last.step() == 4 * 2
  last.close()


def test_remainder_over_the_devices_is_dropped(watched):
  dataset = watched.run.dataset
  shorter = dataset._replace(x_train=dataset.x_train[:37])
  assert watched.run._replace(dataset=shorter).batch_sizes == [32]
  shorter = dataset._replace(x_train=dataset.x_train[:20])
  assert watched.run._replace(dataset=shorter).batch_sizes == [16]
  config = watched.run.config.copy_and_resolve_references()
  config.accumulate = 2  # 20 images are one multiple of 16
  parted = watched.run._replace(config=config)
  assert parted.batch_sizes == [32]
  assert parted._replace(dataset=shorter).batch_sizes == [16]


def test_warm_up_has_no_perturbation(watched):
  assert watched.made == [(32, 0), (8, 0), (32, 1), (8, 1)]
  ratios = [
      line['perturbation_ratio']
      for line in metrics.read_metrics(watched.run.workdir)]
  assert ratios[0] == 0
  # |v_l| = gamma |w_l| on every perturbed leaf.
  np.testing.assert_allclose(ratios[1:], 0.01, rtol=1e-4)


def test_later_epochs_compile_nothing(watched):
  first, second, *later = watched.compiled_by_epoch
  assert 0 < first < second
  # All code paths have run by the end of epoch 2.
  assert later[1] == later[0], watched.compiled_by_epoch


def test_summary_and_best_checkpoint(watched):
  lines, summary = metrics.read_metrics(watched.run.workdir), watched.summary
  scores, others = (
      [line[f'{split}_robust_accuracy'] for line in lines]
      for split in ('validation', 'test'))
  assert scores[2] > max(scores[:2] + scores[3:])
  assert others[0] > max(others[1:])
  best = lines[2]
  assert summary['best'] == {
      'epoch': best['epoch'], 'selected_on': 'validation',
      'natural_accuracy': best['test_natural_accuracy'],
      'robust_accuracy': best['test_robust_accuracy'], 'nonfinite': 0.0}
  assert summary['last']['epoch'] == 4
  assert summary['dataset']['num_train'] == 40
  assert summary['dataset']['num_test'] == 20
  assert len(summary['devices']) == 8

  # The stored weights are those of that epoch.
  state = run_lib.initial_state(watched.run)
  store = checkpoints.Checkpoints(watched.run.workdir, 'best')
  tree, notes = store.load(step.to_tree(state, step.zero_sums()))
  assert store.step() == 2 * best['epoch'] and notes == best
  store.close()
  pixels = watched.run.dataset.x_test.astype(np.float32) / 255
  logits = jax.jit(watched.run.model.apply)(
      {'params': tree['params'], 'batch_stats': tree['batch_stats']}, pixels)
  hits = np.argmax(logits, axis=-1) == watched.run.dataset.y_test
  assert np.mean(hits) == pytest.approx(best['test_natural_accuracy'])


def test_a_finished_run_is_not_changed(watched, monkeypatch):
  before = (watched.run.workdir / 'metrics.jsonl').read_bytes()
  use_tiny_net(monkeypatch)
  monkeypatch.setattr(step, 'make_train_fn', None)
  again = train.train(run_lib.prepare(watched.config, watched.run.workdir))
  assert again == watched.summary
  assert (watched.run.workdir / 'metrics.jsonl').read_bytes() == before


def test_resuming_with_other_images_is_an_error(watched):
  dataset = watched.run.dataset
  other = dataset._replace(x_train=dataset.x_train[::-1])
  with pytest.raises(reading.CheckpointError, match='training_data_crc32'):
    train.train(watched.run._replace(dataset=other))


@pytest.mark.filterwarnings('ignore:overflow encountered in cast')
def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
  use_tiny_net(monkeypatch)
  config = small(
      dataset='npz', npz_path=write_images(tmp_path / 'mine.npz', 32),
      awp__gamma=0.0, attack__num_steps=1, eval__num_steps=1, epochs=2,
      batch_size=16, log_every_steps=1000, checkpoint_every_steps=1,
      optimizer__decay_at=(0.75,), optimizer__decay_factor=3e38)
  run = run_lib.prepare(config, tmp_path / 'run')
  # The third of four steps has an infinite rate; its loss is still finite.
  with pytest.raises(train.Diverged) as error:
    train.train(run)
  text = str(error.value)
  assert 'diverged by step 3 (epoch 2)' in text and 'state of step 2' in text
  store = checkpoints.Checkpoints(run.workdir, 'last')
  assert store.step() == 2 and str(store.folder) in text
  tree, _ = store.load(
      step.to_tree(run_lib.initial_state(run), step.zero_sums()))
  store.close()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
  assert len(metrics.read_metrics(run.workdir)) == 1
  assert not (run.workdir / 'summary.json').exists()


@pytest.mark.slow
def test_digits_train_with_their_own_network(tmp_path):
  config = small(
      digits_awp.get_config(), num_train=24, num_test=16, batch_size=8,
      epochs=1,
      attack__num_steps=1, eval__num_steps=1, eval__batch_size=16)
  run = run_lib.prepare(config, tmp_path)
  assert run.steps_per_epoch == 3
  summary = train.train(run)
  assert summary['last']['epoch'] == 1
  (line,) = metrics.read_metrics(tmp_path)
  assert line['images'] == 24
  assert line['perturbation_ratio'] == pytest.approx(
      config.awp.gamma, rel=1e-4, abs=0)


@pytest.mark.parametrize('fields, shown', [
    ({'batch_size': 12}, 'batch_size=12 does not divide among 8 devices'),
    ({'eval__batch_size': 20}, 'eval.batch_size=20 does not divide'),
    ({'num_train': 5}, '5 training images cannot be spread over 8 devices'),
    ({'num_train': 5000}, 'num_train must be at most 1000'),
    ({'num_train': 80, 'num_validation': 80},
     'num_validation must leave a training image'),
    ({'model__depth': 11}, '6 n + 4'),
])
def test_prepare_rejects_and_claims_no_folder(fields, shown, tmp_path):
  with pytest.raises(ValueError) as error:
    run_lib.prepare(small(**fields), tmp_path / 'run')
  assert shown in str(error.value)
  assert not (tmp_path / 'run/config.json').exists()
