"""Tests of the digits, of arguments, and of subsets of any data set."""

import json

import numpy as np
import pytest

from experiments.data import arrays, datasets
from tests.helpers.dataset_files import assert_same

pytest.importorskip('tensorflow_datasets')


def test_digits():
  first, again = datasets.load('digits'), datasets.load('digits', seed=5)
  assert first.x_train.shape == (1000, 8, 8, 1)
  assert first.x_test.shape == (797, 8, 8, 1)
  assert first.x_train.dtype == np.uint8
  assert (first.x_train.min(), first.x_train.max()) == (0, 255)
  assert_same(first, again)
  for labels, total in ((first.y_train, 1000), (first.y_test, 797)):
    share = np.bincount(labels) / total
    np.testing.assert_allclose(share, 0.1, atol=0.005)


def test_digits_are_those_of_scikit_learn():
  from sklearn.datasets import load_digits
  dataset = datasets.load('digits')
  got = np.concatenate([dataset.x_train, dataset.x_test]).reshape(1797, 64)
  wanted = np.round(load_digits().data * 255 / 16).astype(np.uint8)
  assert sorted(map(bytes, got)) == sorted(map(bytes, wanted))


def test_describe_is_json():
  facts = json.loads(json.dumps(datasets.describe(datasets.load('digits'))))
  assert facts['name'] == 'digits'
  assert (facts['num_train'], facts['num_test']) == (1000, 797)
  assert facts['image_shape'] == [8, 8, 1]
  assert facts['num_classes'] == 10


def test_images_of_averaged_squares():
  """The same examples and normalization; each pixel is a mean, rounded."""
  stored = datasets.load('digits', num_train=30, num_test=20)
  small = datasets.load('digits', num_train=30, num_test=20, image_size=4)
  assert small.x_train.shape == (30, 4, 4, 1)
  assert (small.mean, small.std) == (stored.mean, stored.std)
  for part in ('train', 'test'):
    whole, images = (
        getattr(found, f'x_{part}') for found in (stored, small))
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(
        getattr(stored, f'y_{part}'), getattr(small, f'y_{part}'))
    for n, i, j in np.ndindex(len(images), 4, 4):
      four = whole[n, 2 * i:2 * i + 2, 2 * j:2 * j + 2, 0].tolist()
      assert images[n, i, j, 0] == round(sum(map(sum, four)) / 4)
  np.testing.assert_array_equal(
      datasets.load('digits', num_train=30, image_size=8).x_train,
      stored.x_train)


@pytest.mark.parametrize(('name', 'near'), [
    ('cifar-10', 'cifar10'), ('cifar_100', 'cifar100'), ('digit', 'digits')])
def test_unknown_name(name, near):
  with pytest.raises(ValueError, match=f'{name}.*Did you mean {near!r}'):
    datasets.load(name)


@pytest.mark.parametrize(('options', 'message'), [
    ({'num_train': 0}, 'num_train.*>= 1, got 0'),
    ({'num_train': 1001}, 'num_train must be at most 1000.*1001'),
    ({'num_test': 798}, 'num_test must be at most 797.*798'),
    ({'num_test': 2.5}, r'num_test.*2\.5'),
    ({'seed': -1}, 'seed.*-1'),
    ({'image_size': 0}, 'image_size.*>= 1, got 0'),
    ({'image_size': 3}, r'divide.*got 3 for images of 8 x 8 \(digits\)'),
    ({'image_size': 16}, 'divide.*got 16 for images of 8 x 8'),
    ({'npz_path': 'a.npz'}, r"requires data set 'npz', got 'a\.npz'"),
])
def test_bad_numbers(options, message):
  with pytest.raises(ValueError, match=message):
    datasets.load('digits', **options)


def test_npz_needs_a_path():
  with pytest.raises(datasets.DataError, match='needs npz_path'):
    datasets.load('npz')


def rows(x):
  return {bytes(image) for image in np.ascontiguousarray(x)}


def test_subset_is_deterministic_and_fair():
  whole = datasets.load('digits')
  part = datasets.load('digits', num_train=100, num_test=50)
  assert_same(part, datasets.load('digits', num_train=100, num_test=50))
  assert rows(part.x_train) <= rows(whole.x_train)
  assert rows(part.x_test) <= rows(whole.x_test)
  assert set(np.bincount(part.y_train)) <= {9, 10, 11}
  assert set(np.bincount(part.y_test)) <= {4, 5, 6}
  other = datasets.load('digits', num_train=100, seed=1)
  assert rows(other.x_train) != rows(part.x_train)
  assert len(other.x_test) == 797


@pytest.mark.parametrize('num', [0, 1, 7, 25, 39, 40])
def test_stratified_on_balanced_labels(num):
  labels = np.tile(np.arange(4), 10)
  picked = arrays.stratified(labels, num, np.random.default_rng(0))
  assert len(set(picked)) == len(picked) == num
  assert (np.diff(picked) > 0).all()
  counts = np.bincount(labels[picked], minlength=4)
  assert counts.max() - counts.min() <= 1


def test_stratified_keeps_the_shares():
  labels = np.repeat([0, 1, 2], [600, 300, 100])
  picked = arrays.stratified(labels, 50, np.random.default_rng(0))
  assert np.bincount(labels[picked]).tolist() == [30, 15, 5]


def test_validation_split():
  rng = np.random.default_rng(0)
  dataset = datasets.load('digits')._replace(  # all images different
      x_train=rng.integers(0, 256, (1000, 8, 8, 1), np.uint8))
  rest, x_val, y_val = datasets.split_validation(dataset, 200, seed=3)
  again = datasets.split_validation(dataset, 200, seed=3)
  np.testing.assert_array_equal(x_val, again[1])
  assert_same(rest, again[0])
  assert (len(rest.x_train), len(x_val), len(y_val)) == (800, 200, 200)
  assert not rows(rest.x_train) & rows(x_val)
  assert rows(rest.x_train) | rows(x_val) == rows(dataset.x_train)
  assert set(np.bincount(y_val)) <= {19, 20, 21}
  label_of = dict(zip(map(bytes, dataset.x_train), dataset.y_train,
                      strict=True))
  assert [label_of[bytes(x)] for x in x_val] == y_val.tolist()
  np.testing.assert_array_equal(rest.x_test, dataset.x_test)
  other = datasets.split_validation(dataset, 200, seed=4)
  assert rows(other[1]) != rows(x_val)


def test_validation_split_limits():
  dataset = datasets.load('digits', num_train=20)
  rest, x_val, _ = datasets.split_validation(dataset, 0, seed=0)
  assert (len(rest.x_train), x_val.shape) == (20, (0, 8, 8, 1))
  with pytest.raises(ValueError, match=r'at most 19 of the 20.*got 20'):
    datasets.split_validation(dataset, 20, seed=0)
  with pytest.raises(ValueError, match=r'num_validation.*-1'):
    datasets.split_validation(dataset, -1, seed=0)
