"""AutoAttack's verdicts on the small robust networks of docs/results/evidence.

The stored verdicts are those of `evaluate_model.py` on all 3,000 images, with
jax 0.12. The images are read from AWP_TEST_DATA.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import awp_jax
from examples.evaluation import small_networks
from experiments.data import datasets

FOLDER = pathlib.Path(__file__).resolve().parents[3] / 'docs/results/evidence'

#: Images of each kind that are attacked again.
COUNT = 4


@functools.cache
def load(folder):
  data = datasets.load(
      'cifar10', data_dir=str(folder), num_test=3000, image_size=16,
      progress=False)
  assert data.x_test.dtype == np.uint8
  return data.x_test.astype(np.float32) / 255, data.y_test


@pytest.fixture
def images(data_folder):
  return load(data_folder / 'tfds')


def stored(name):
  """The record of the verdicts, with 'robust' as bools [3000]."""
  found = json.loads((FOLDER / f'autoattack_{name}.json').read_text())
  bits = np.frombuffer(bytes.fromhex(found['robust']), np.uint8)
  return found | {'robust': np.unpackbits(bits)[:found['num_examples']] == 1}


@pytest.mark.parametrize('name', ['at', 'awp'])
def test_records_are_consistent(name):
  found = stored(name)
  broken_by = np.array(list(found['broken_by']))
  assert f'{100 * found["robust"].mean():.2f}' == found['autoattack_acc']
  for number, attack in enumerate(found['attacks']):
    assert (broken_by == str(number)).sum() == attack['num_broken']
  assert not np.any(found['robust'] & (broken_by != '-'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['at', 'awp'])
def test_verdicts_of_some_images(name, images):
  """Of images that APGD-CE broke, that only APGD-T broke, and robust ones."""
  found, logits_fn = stored(name), small_networks.load(name)
  broken_by = np.array(list(found['broken_by']))
  rows = np.concatenate([np.flatnonzero(kind)[:COUNT] for kind in (
      broken_by == '0', broken_by == '1', found['robust'])])
  x, y = images[0][rows], images[1][rows]
  result = awp_jax.auto_attack(
      jax.random.key(0), logits_fn, x, y,
      awp_jax.ThreatModel('Linf', 8 / 255), version='fast')
  assert result.natural.all() and len(rows) == 3 * COUNT
  np.testing.assert_array_equal(result.robust, found['robust'][rows])
  predict = jax.jit(
      lambda part: logits_fn(part).argmax(1),
      compiler_options={'xla_backend_optimization_level': 2})
  natural = np.concatenate([
      predict(part) for part in np.split(images[0], 10)]) == images[1]
  assert f'{100 * natural.mean():.2f}' == found['clean_acc']
