"""Tests of recipe options in whole runs, with a network that compiles fast."""

import functools

import jax
import numpy as np
import pytest

import awp_jax
from experiments.config import build
from experiments.modes import train
from experiments.runs import checkpoints
from experiments.runs import metrics as metrics_lib
from experiments.runs import run as run_lib
from experiments.training import step as step_lib
from experiments.training import training_data
from tests.experiments.modes import train_test


def prepared(tmp_path, monkeypatch, **fields):
  train_test.use_tiny_net(monkeypatch)
  train_test.without_report(monkeypatch)
  return run_lib.prepare(train_test.small(
      dataset='npz', npz_path=train_test.write_images(tmp_path / 'mine.npz'),
      attack__num_steps=1, eval__num_steps=1, **fields), tmp_path / 'run')


def batch_of(run, step):
  """Images and labels of a step, as in the compiled step."""
  keys = run_lib.keys(run.config)
  order = training_data.make_order_fn(run)(
      keys['order'], training_data.order_number(run, step))
  data = jax.tree.map(jax.numpy.asarray, training_data.of_run(run))
  return jax.jit(lambda order, step: training_data.global_batch(
      run, data, order, keys, step, 16))(order, np.int32(step))


def test_a_run_that_gets_no_better_stops_early(tmp_path, monkeypatch):
  run = prepared(
      tmp_path, monkeypatch, epochs=6, early_stopping_epochs=2,
      optimizer__learning_rate=1e-9, optimizer__weight_decay=0.0)
  summary = train.train(run)
  lines = metrics_lib.read_metrics(run.workdir)
  best = summary['best']['epoch']
  assert summary['last']['epoch'] == len(lines) == best + 2 < 6
  assert train.train(run) == summary  # and stays finished


def record_weights(monkeypatch):
  """The weights and statistics after each step of runs, in a list."""
  seen, make = [], step_lib.make_train_fn

  class Recording:
    """A compiled function that keeps what it returns."""

    def __init__(self, *arguments):
      self.compiled = make(*arguments)

    def lower(self, *given):
      self.step = self.compiled.lower(*given).compile()
      return self

    def compile(self):
      def call(*inputs):
        state, sums = self.step(*inputs)
        seen.append(jax.device_get((state.params, state.batch_stats)))
        return state, sums

      return call

  monkeypatch.setattr(step_lib, 'make_train_fn', Recording)
  return seen


def test_the_average_is_kept_and_is_what_is_judged(tmp_path, monkeypatch):
  run = prepared(
      tmp_path, monkeypatch, epochs=1, ema_decay=0.9, awp__warmup_steps=2)
  seen = record_weights(monkeypatch)
  start = run_lib.initial_state(run)
  start = jax.device_get((start.params, start.batch_stats))
  train.train(run)
  assert len(seen) == 3
  average = start
  for t, weights_and_statistics in enumerate(seen):
    decay = min(0.9, (1 + t) / (10 + t))
    average = jax.tree.map(
        lambda a, w, d=decay: d * a + (1 - d) * w, average,
        weights_and_statistics)
  store = checkpoints.Checkpoints(run.workdir, 'last')
  tree, _ = store.load(
      step_lib.to_tree(run_lib.initial_state(run), step_lib.zero_sums()))
  store.close()
  jax.tree.map(
      lambda got, wanted: np.testing.assert_allclose(
          got, wanted, rtol=1e-5, atol=1e-7),
      (tree['average']['params'], tree['average']['batch_stats']), average)

  # The logged accuracy is that of the average, recomputed in NumPy.
  pixels = run.dataset.x_test.astype(np.float32) / 255
  network = tree['average']
  logits = jax.jit(run.model.apply)(
      {name: network[name] for name in ('params', 'batch_stats')}, pixels)
  (line,) = metrics_lib.read_metrics(run.workdir)
  hits = np.argmax(logits, axis=-1) == run.dataset.y_test
  assert line['test_natural_accuracy'] == pytest.approx(np.mean(hits))
  # AWP started at the third step: 16 of 48 images.
  assert line['perturbation_ratio'] == pytest.approx(0.01 / 3, rel=1e-3)


def test_bfloat16_parameters_get_float32_images(tmp_path, monkeypatch):
  # Steps of 2 / 255 are lost in bfloat16.
  run = prepared(tmp_path, monkeypatch, model__param_dtype='bfloat16')
  images, _ = batch_of(run, 0)
  assert images.dtype == np.float32


def test_batches_hold_their_share_of_extra_images(tmp_path, monkeypatch):
  extra = tmp_path / 'extra.npz'
  np.savez(
      extra, images=np.full((5, 8, 8, 1), 255, np.uint8),
      labels=np.full(5, 3))
  run = prepared(
      tmp_path, monkeypatch, extra__path=str(extra), extra__fraction=0.25)
  assert run.batch_sizes == [16] * 3
  assert 'extra_data_crc32' in run.order
  images, labels = batch_of(run, 0)
  white = (np.asarray(images) == 1).all(axis=(1, 2, 3))
  assert white.sum() == 4 and (np.asarray(labels)[white] == 3).all()
  # Each of two devices has eight rows, two of them extra.
  assert white[:8].sum() == white[8:].sum() == 2


@pytest.mark.parametrize('fraction, per_pass', [(0.25, 4), (0.75, 12)])
def test_a_pass_sees_each_labeled_image_once(
    fraction, per_pass, tmp_path, monkeypatch):
  extra = tmp_path / 'extra.npz'
  np.savez(
      extra, images=np.full((5, 8, 8, 1), 255, np.uint8),
      labels=np.zeros(5, int))
  run = prepared(
      tmp_path, monkeypatch, extra__path=str(extra), extra__fraction=fraction)
  # Image i has the constant value i.
  dataset = run.dataset._replace(x_train=np.broadcast_to(
      np.arange(48, dtype=np.uint8)[:, None, None, None], (48, 8, 8, 1)))
  run = run._replace(dataset=dataset)
  keys = run_lib.keys(run.config)
  data = jax.tree.map(jax.numpy.asarray, training_data.of_run(run))
  order_fn = training_data.make_order_fn(run)
  batch = jax.jit(lambda order, step: training_data.global_batch(
      run, data, order, keys, step, 16)[0])
  passes = []
  for first in (0, per_pass):
    seen = []
    for step in range(first, first + per_pass):
      images = batch(
          order_fn(keys['order'], training_data.order_number(run, step)), step)
      names = np.round(255 * np.max(images, axis=(1, 2, 3))).astype(int)
      seen += names[names < 255].tolist()
    assert sorted(seen) == list(range(48))
    passes.append(seen)
  assert passes[0] != passes[1]


def test_mixed_labels_reach_the_step(tmp_path, monkeypatch):
  run = prepared(tmp_path, monkeypatch, augmentation__mixup=1.0)
  _, labels = batch_of(run, 0)
  assert labels.shape == (16, 4)
  np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
  state = run_lib.initial_state(run)
  step = jax.jit(functools.partial(
      awp_jax.train_step, objective=run.setup.objective,
      threat=run.setup.threat, attack=run.setup.attack,
      perturbation=run.setup.perturbation))
  state, metrics = step(
      state, (np.zeros((16, 8, 8, 1), np.float32), labels), jax.random.key(0))
  assert np.isfinite(metrics.loss) and 0 <= metrics.robust_accuracy <= 1


@pytest.mark.parametrize('fraction', [0.001, 0.999])
def test_a_fraction_that_leaves_no_image_of_a_kind(
    fraction, tmp_path, monkeypatch):
  extra = tmp_path / 'extra.npz'
  np.savez(
      extra, images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.zeros(2, int))
  with pytest.raises(ValueError, match='leaves no images of the other kind'):
    prepared(
        tmp_path, monkeypatch, extra__path=str(extra),
        extra__fraction=fraction)


@pytest.mark.parametrize('fields, shown', [
    ({'init_from': 'nowhere.pt'}, 'no such file or folder'),
    ({'extra__path': 'nowhere.npz', 'extra__fraction': 0.5}, 'nowhere.npz'),
])
def test_missing_files_are_named_before_anything_is_claimed(
    fields, shown, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=shown):
    prepared(tmp_path, monkeypatch, **fields)
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('text, kept', [
    ('rwp(num_steps=2, c_min=9.0)', False), ('momentum_awp(every=2)', True),
    ('m_arwp(sigma=0.02)', True), ('frwp', False)])
def test_other_weight_perturbations(text, kept, tmp_path, monkeypatch):
  run = prepared(tmp_path, monkeypatch, epochs=1, weight_perturbation=text)
  train.train(run)
  (line,) = metrics_lib.read_metrics(run.workdir)
  assert np.isfinite(line['train_loss']) and line['perturbation_ratio'] > 0
  # The state of the method is in the checkpoint, and not zero.
  like = step_lib.to_tree(run_lib.initial_state(run), step_lib.zero_sums())
  assert ('memory' in like) == kept
  store = checkpoints.Checkpoints(run.workdir, 'last')
  tree, _ = store.load(like)
  store.close()
  if kept:
    assert all(
        np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree['memory']))
  state, _ = step_lib.from_tree(run_lib.initial_state(run), tree)
  jax.tree.map(
      np.testing.assert_array_equal, state.memory, tree.get('memory', ()))


def test_steps_left_out_are_plain_ones(tmp_path, monkeypatch):
  run = prepared(
      tmp_path, monkeypatch, epochs=2,
      weight_perturbation='awp(gamma=0.02, start=1, every=2)')
  made, make = [], step_lib.make_train_fn

  def make_train_fn(run, size, factor):
    made.append(factor)
    return make(run, size, factor)

  monkeypatch.setattr(step_lib, 'make_train_fn', make_train_fn)
  train.train(run)
  assert made == [0, 1]  # two compiled steps, for all six
  # Steps 1, 3 and 5 of 0 to 5 perturb: one in the first epoch of three.
  ratios = [
      line['perturbation_ratio']
      for line in metrics_lib.read_metrics(run.workdir)]
  np.testing.assert_allclose(ratios, [0.02 / 3, 0.04 / 3], rtol=1e-3)


@pytest.mark.parametrize('text, shown', [
    ('swap', "'arwp', 'asam', 'awp'"),
    ('sam(rho=-1)', 'rho must be a finite number >= 0, got -1'),
    ('sam(radius=1)', "'rho'"),
    ('sam(0.1)', "got 'sam(0.1)'"),
    ('sam(rho=open)', "got 'sam(rho=open)'"),
    ('', "got ''"),
    ('wt_awp', 'mask'),
])
def test_bad_weight_perturbations(text, shown):
  with pytest.raises(ValueError) as error:
    build.build(train_test.small(weight_perturbation=text))
  assert shown in str(error.value) and '\n' not in str(error.value)


def test_awp_takes_what_it_does_not_name_from_its_group():
  method = build.build(train_test.small(
      weight_perturbation='awp(every=3)', awp__gamma=0.02)
  ).perturbation
  assert (method.ball.size, method.every) == (0.02, 3)
  assert method.update_at == 'perturbed'


def test_awp_with_options_but_no_size_is_an_error():
  # `cifar10_at` with 'awp(every=2)' would train plain AT under another name.
  with pytest.raises(ValueError, match=r'awp\.gamma is 0 in this config'):
    build.build(train_test.small(
        weight_perturbation='awp(every=2)', awp__gamma=0.0))
  plain = build.build(train_test.small(
      weight_perturbation='awp', awp__gamma=0.0))
  assert plain.perturbation.is_off
