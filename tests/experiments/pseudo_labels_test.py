"""Pseudo-labels: prediction, selection, and the file."""

import json
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pseudo_labels
from experiments.data import extra_images
from experiments.modes import train
from experiments.pseudo_labels import Labeled
from experiments.runs import restore
from experiments.runs import run as run_lib
from tests.experiments.modes import train_test


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run of two epochs on images of four classes."""
  folder = tmp_path_factory.mktemp('pseudo')
  config = train_test.small(
      dataset='npz', npz_path=train_test.write_images(folder / 'images.npz'),
      epochs=2, model__width=1)
  with pytest.MonkeyPatch.context() as monkeypatch:
    train_test.use_tiny_net(monkeypatch)
    run = run_lib.prepare(config, folder / 'run')
    train.train(run)
    yield run


@pytest.fixture(scope='module')
def unlabeled(trained):
  """53 images, not a multiple of the batch size 16."""
  images = np.random.default_rng(5).integers(0, 256, (53, 8, 8, 1), np.uint8)
  path = trained.workdir.parent / 'unlabeled.npz'
  np.savez(path, image=images, label=np.full(53, -1))
  return path, images


def probabilities(run, kind, images):
  """Independent oracle: one batch, softmax in float64."""
  subject = next(s for s in restore.restore_models(run) if s.name == kind)
  logits = np.asarray(subject.logits_fn(images / np.float32(255)), np.float64)
  powers = np.exp(logits - logits.max(axis=1, keepdims=True))
  return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize('kind', ['best', 'last'])
def test_command(trained, unlabeled, kind, tmp_path, capsys):
  path, images = unlabeled
  before = {p: p.stat().st_mtime_ns for p in trained.workdir.rglob('*')
            if p.is_file()}
  output = tmp_path / 'extra.npz'
  code = pseudo_labels.main([
      f'--workdir={trained.workdir}', f'--images={path}', f'--output={output}',
      f'--checkpoint={kind}', '--batch_size=16'])
  out, err = capsys.readouterr()
  assert code == 0, err
  wanted = probabilities(trained, kind, images)
  labels = wanted.argmax(axis=1)
  with np.load(output) as stored:
    np.testing.assert_array_equal(stored['image'], images)
    np.testing.assert_array_equal(stored['label'], labels)
    np.testing.assert_allclose(
        stored['confidence'], wanted.max(axis=1), rtol=1e-5)
    origin = json.loads(str(stored['origin']))
  assert origin['checkpoint'] == kind and origin['images'] == str(path)
  assert origin['judged_by']['precision'] == 'float32'
  extra = extra_images.load(output, image_shape=(8, 8, 1), num_classes=4)
  np.testing.assert_array_equal(extra.labels, labels)
  for label in range(4):
    assert re.search(rf'^{label} +{np.sum(labels == label)} ', out, re.M)
  assert f'53 of 53 images are in {output}' in out
  # No other file is left, and the run is unchanged.
  assert [p.name for p in tmp_path.iterdir()] == ['extra.npz']
  assert before == {p: p.stat().st_mtime_ns for p in trained.workdir.rglob('*')
                    if p.is_file()}


def test_chosen_images(trained, unlabeled, tmp_path, capsys):
  path, images = unlabeled
  with path.with_suffix('.pickle').open('wb') as file:
    pickle.dump({'data': images}, file)
  wanted = probabilities(trained, 'best', images)
  labels, confidence = wanted.argmax(axis=1), wanted.max(axis=1)
  # Between two confidences, and far enough from both for float32.
  low, high = np.sort(confidence)[26:28]
  minimum = (low + high) / 2
  assert high - low > 1e-6
  output = tmp_path / 'extra.npz'
  arguments = [
      f'--workdir={trained.workdir}', f'--images={path.with_suffix(".pickle")}',
      f'--output={output}', '--batch_size=8', '--compress']
  assert pseudo_labels.main(
      [*arguments, f'--min_confidence={minimum}']) == 0
  keep = confidence >= minimum
  assert keep.sum() == 26
  with np.load(output) as stored:
    np.testing.assert_array_equal(stored['image'], images[keep])
    np.testing.assert_array_equal(stored['label'], labels[keep])
  capsys.readouterr()
  written = output.read_bytes()
  for number, shown in (
      (13, r'per_class=13: only \d+ images are labeled [^\n]+'),
      (14, r'per_class=14 of 4 classes are more than the 53 images [^\n]+')):
    assert pseudo_labels.main([*arguments, f'--per_class={number}']) == 2
    assert re.fullmatch(f'error: {shown}\n', capsys.readouterr().err)
  assert output.read_bytes() == written


def test_batches_are_of_one_shape_and_padding_is_dropped():
  shapes = []

  def logits_fn(x):
    shapes.append(x.shape)
    return jnp.stack([x.sum((1, 2, 3)), 4 - x.sum((1, 2, 3))], axis=1)

  images = np.linspace(0, 1, 21 * 4).reshape(21, 2, 2, 1).astype(np.float32)
  labels, confidence = pseudo_labels.predict(logits_fn, images, 16)
  assert shapes == [(2, 2, 2, 1)]  # traced once, two on each of eight devices
  sums = images.sum(axis=(1, 2, 3), dtype=np.float64)
  np.testing.assert_array_equal(labels, sums < 2)
  np.testing.assert_allclose(
      confidence, 1 / (1 + np.exp(-np.abs(2 * sums - 4))), rtol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad):
  images = np.zeros((5, 1, 1, 2), np.float32)
  images[3] = 1
  with pytest.raises(ValueError, match='not finite, first for image 3'):
    pseudo_labels.predict(
        lambda x: jnp.where(x == 1, bad, 0.0)[:, 0, 0].at[:, 0].set(0), images,
        8)


def test_batch_that_does_not_divide():
  assert jax.device_count() == 8
  with pytest.raises(ValueError, match='batch_size=12 does not divide'):
    pseudo_labels.predict(lambda x: x, np.zeros((1, 1, 1, 1), np.uint8), 12)


LABELED = Labeled(
    np.array([1, 0, 1, 1, 0, 0, 1], np.int32),
    np.array([0.9, 0.5, 0.7, 0.9, 0.8, 0.6, 0.7], np.float32))


@pytest.mark.parametrize('options, chosen', [
    ({}, [0, 1, 2, 3, 4, 5, 6]),
    ({'min_confidence': 0.65}, [0, 2, 3, 4, 6]),
    ({'per_class': 1}, [0, 4]),  # the first of two equally confident images
    ({'per_class': 2}, [0, 3, 4, 5]),
    ({'per_class': 3}, [0, 1, 2, 3, 4, 5]),
    ({'per_class': 1, 'min_confidence': 0.75}, [0, 4])])
def test_selection(options, chosen):
  assert pseudo_labels.select(LABELED, 2, **options).tolist() == chosen


@pytest.mark.parametrize('options, shown', [
    ({'min_confidence': 1.5}, r'must be in \[0, 1\], got 1.5'),
    ({'min_confidence': float('nan')}, 'got nan'),
    ({'min_confidence': 0.95}, 'leaves no image; the highest .* 0.9000'),
    ({'per_class': -1}, 'per_class must be'),
    ({'per_class': 4}, 'only 3 images are labeled 0'),
    ({'per_class': 2, 'min_confidence': 0.65}, 'only 1 images are labeled 0')])
def test_impossible_selection(options, shown):
  with pytest.raises(ValueError, match=shown):
    pseudo_labels.select(LABELED, 2, **options)


def test_class_without_images():
  with pytest.raises(ValueError, match='only 0 images are labeled 2'):
    pseudo_labels.select(LABELED, 3, per_class=1)


def test_a_pytorch_file(trained, unlabeled, tmp_path):
  from awp_jax.models import PreActResNet, torch_exchange
  from awp_jax.models.torch_exchange.files import write_state_dict
  images = unlabeled[1]
  model = PreActResNet(4, width=2, mean=(0.0,), std=(1.0,))
  variables = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))
  file = tmp_path / 'net.pt'
  write_state_dict(file, torch_exchange.to_torch(variables, model))
  run = pseudo_labels.prepare(trained.workdir, file)
  subject = pseudo_labels.load_subject(run, 'best')
  assert subject.name == 'torch-net'
  # The file holds no normalization, so that of the data set is used.
  model = PreActResNet(
      4, width=2, mean=tuple(run.dataset.mean), std=tuple(run.dataset.std))
  pixels = images[:4] / np.float32(255)
  np.testing.assert_allclose(
      subject.logits_fn(pixels), jax.jit(model.apply)(variables, pixels),
      rtol=1e-6)


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'extra.npz'
  path.write_bytes(b'old')

  def fail(file, **arrays):
    file.write(b'half')
    raise OSError('No space left on device')

  monkeypatch.setattr(np, 'savez', fail)
  with pytest.raises(OSError, match='No space left'):
    pseudo_labels.save(path, np.zeros((7, 1, 1, 1)), LABELED, {})
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == ['extra.npz']


@pytest.mark.parametrize('changes, shown', [
    ({'workdir': None}, '--workdir'),
    ({'workdir': 'nowhere'}, "'nowhere' holds no config.json"),
    ({'workdir': 'broken'}, 'config.json is not the config of a run'),
    ({'workdir': 'other'}, 'other/config.json is not the config of a run: it '
     'has no field of a config'),
    ({'output': 'extra.pickle'}, 'extra.pickle must end in .npz'),
    ({'output': 'nowhere/extra.npz'}, "there is no folder 'nowhere'"),
    ({'images': 'nowhere.npz'}, 'No such file'),
    ({'checkpoint': 'newest'}, "'newest'"),
    ({'torch_checkpoint': 'nowhere.pt'}, 'there is no such file'),
    ({'batch_size': '9'}, 'batch_size=9 does not divide among 8 devices'),
    ({'batch_size': '0'}, 'batch_size must be'),
    ({'min_confidence': '2'}, 'min_confidence must be'),
    ({'per_klass': '2'}, '--per_klass')])
def test_wrong_arguments(
    trained, unlabeled, changes, shown, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken/config.json').write_text('[1]')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/config.json').write_text('{"a.b": 1}')
  options = {
      'workdir': trained.workdir, 'images': unlabeled[0],
      'output': 'extra.npz', 'batch_size': '64'} | changes
  try:
    code = pseudo_labels.main(
        [f'--{name}={value}' for name, value in options.items() if value])
  except SystemExit as exit_:
    code = exit_.code
  out, err = capsys.readouterr()
  assert code == 2 and out == ''
  assert re.fullmatch(r'error: [^\n]+\n', err) and shown in err, err
  assert not (tmp_path / 'extra.npz').exists()
