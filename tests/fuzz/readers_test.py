"""Files from anywhere: one clear error or the data, nothing is executed."""

import json
import pickle
import resource

from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

import awp_jax
from awp_jax.models import torch_exchange
from experiments.config import schema
from experiments.configs import base
from experiments.data import datasets, extra_images
from experiments.runs import metrics, workdirs
from experiments.util import paths
from experiments.util.errors import UserError
from tests.helpers import fuzzing
from tests.helpers.fuzzing import broken, fuzzed

IMAGES = np.arange(3 * 48, dtype=np.uint8).reshape(3, 4, 4, 3)
LABELS = np.array([0, 1, 2])
NPZ = fuzzing.npz(image=IMAGES, label=LABELS)
OWN = fuzzing.npz(x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS)
PICKLES = [pickle.dumps({'data': IMAGES, 'labels': LABELS}, protocol)
           for protocol in (0, 2, 4)]


def only(errors, read, *arguments, **keywords):
  """Reads, and returns the result or None after one of the errors."""
  try:
    return read(*arguments, **keywords)
  except errors as error:
    assert str(error).strip()
    return None


def extra(path):
  return extra_images.load(path, image_shape=(4, 4, 3), num_classes=3)


def check_images(x, y):
  assert x.shape[1:] == (4, 4, 3) and len(x) == len(y)
  assert x.dtype == np.uint8 or ((x >= 0).all() and (x <= 1).all())
  assert (y >= 0).all() and (y < 3).all()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('fuzz')


@pytest.mark.parametrize('file', [NPZ, *PICKLES, fuzzing.npz(
    compressed=True, images=IMAGES / np.float32(255), y=LABELS)])
def test_extra_images(file, folder):
  path, escaped = folder / 'extra.bin', folder / 'escaped'

  @fuzzed()
  @given(broken(file))
  def run(data):
    path.write_bytes(data)
    found = only(UserError, extra, path)
    if found is not None:
      check_images(np.asarray(found.images), found.labels)

  run()
  assert not escaped.exists() and not (folder.parent / 'escaped').exists()


def test_own_data_sets(folder):
  path = folder / 'mine.npz'

  @fuzzed()
  @given(broken(OWN))
  def run(data):
    path.write_bytes(data)
    found = only(UserError, datasets.load, 'npz', npz_path=str(path))
    if found is not None:
      assert found.x_train.shape[1:] == found.x_test.shape[1:]
      assert len(found.x_train) == len(found.y_train) > 0
      assert found.y_train.max() < found.num_classes

  run()


@pytest.fixture(scope='module')
def torch_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('torch') / 'model.pt'
  torch_exchange.write_state_dict(path, {
      'conv1.weight': np.ones((2, 3, 3, 3), np.float32),
      'fc.bias': np.zeros(4, np.float32)})
  return path.read_bytes()


def test_pytorch_files(torch_file, folder):
  path = folder / 'model.pt'

  @fuzzed()
  @given(broken(torch_file))
  def run(data):
    path.write_bytes(data)
    found = only(ValueError, torch_exchange.read_state_dict, path)
    for array in (found or {}).values():
      assert isinstance(array, np.ndarray) and array.nbytes < 2**20

  run()


def test_adversarial_examples(folder):
  path = folder / 'examples.npz'
  threat = awp_jax.ThreatModel('Linf', 0.1)
  x = IMAGES / np.float32(255)
  awp_jax.save_examples(path, awp_jax.auto_attack(
      jax.random.key(0), lambda x: x.reshape(len(x), -1)[:, :3], x, LABELS,
      threat, attacks=('apgd-ce',)))
  @fuzzed()
  @given(broken(path.read_bytes()))
  def run(data):
    path.write_bytes(data)
    only(ValueError, awp_jax.load_examples, path)

  run()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=8), inner, max_size=3), max_leaves=8)


def test_stored_configs(folder):
  place = paths.parse(folder / 'run')
  place.mkdir()
  defaults = json.loads(json.dumps(schema.flatten(base.get_config())))

  @fuzzed()
  @given(JSON | st.dictionaries(
      st.sampled_from(sorted(defaults)), JSON, max_size=4).map(
          lambda changed: defaults | changed),
         st.booleans(), st.data())
  def run(value, is_broken, data):
    text = json.dumps(value).encode()
    if is_broken:
      text = data.draw(broken(text))
    (place / 'config.json').write_bytes(text)
    only(UserError, workdirs.stored_config, place)

  run()


def test_metrics(folder):
  place = paths.parse(folder)
  lines = ''.join(json.dumps({'epoch': n, 'loss': 1.0}) + '\n'
                 for n in (1, 2, 3)).encode()

  @fuzzed()
  @given(st.lists(JSON, max_size=3), broken(lines))
  def run(values, data):
    (place / 'metrics.jsonl').write_bytes(
        data + b''.join(json.dumps(value).encode() + b'\n' for value in values))
    for line in metrics.read_metrics(place):
      assert isinstance(line, dict) and isinstance(line['epoch'], int)

  run()


@pytest.mark.parametrize('read, name, error', [
    (extra, 'image', UserError),
    (lambda path: datasets.load(
        'npz', npz_path=str(path)), 'x_train', UserError),
    (awp_jax.load_examples, 'adversarial', ValueError)],
    ids=['extra', 'own', 'examples'])
def test_a_promised_terabyte_takes_no_memory(read, name, error, tmp_path):
  """A header alone, and a zip file that expands a thousandfold."""
  path = tmp_path / 'large.npz'
  for shape, zeros in (((10**12, 4, 4, 3), 0), ((10**6, 4, 4, 3), 2**25)):
    path.write_bytes(fuzzing.npz_of_header(name, shape, zeros=zeros))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error):
      read(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 2**18  # KiB


def test_nothing_is_executed(tmp_path):
  made = tmp_path / 'made'
  (tmp_path / 'extra.pickle').write_bytes(fuzzing.hostile_pickle(made))
  with pytest.raises(UserError):
    extra(tmp_path / 'extra.pickle')
  objects = fuzzing.npz(image=IMAGES, label=np.array(
      [fuzzing.Touch(made)] * 3, dtype=object))
  (tmp_path / 'extra.npz').write_bytes(objects)
  with pytest.raises(UserError):
    extra(tmp_path / 'extra.npz')
  with pytest.raises(ValueError):
    torch_exchange.read_state_dict(tmp_path / 'extra.pickle')
  assert not made.exists()
  pickle.loads(fuzzing.hostile_pickle(made))  # it would have been
  assert made.exists()
