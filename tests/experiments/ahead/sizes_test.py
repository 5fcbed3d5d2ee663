"""Sizes of data sets without their images, against the loaded ones."""

import numpy as np
import pytest

from experiments.ahead import sizes
from experiments.configs import base
from experiments.data import arrays, datasets
from tests.experiments.modes import train_test


def config(**fields):
  found = base.get_config()
  found.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in fields.items()})
  return found


@pytest.mark.parametrize('name, train, test, classes', [
    ('cifar10', 50_000, 10_000, 10), ('cifar100', 50_000, 10_000, 100),
    ('svhn', 73_257, 26_032, 10)])
def test_official(name, train, test, classes):
  found = sizes.dataset(config(dataset=name))
  assert found.x_train.shape == (train, 32, 32, 3)
  assert found.x_test.shape == (test, 32, 32, 3)
  assert found.num_classes == classes
  assert found.x_train.strides == (0, 0, 0, 0)  # takes no memory


@pytest.mark.parametrize('fields', [
    {'dataset': 'digits'},
    {'dataset': 'digits', 'num_train': 100, 'num_test': 50},
    {'dataset': 'digits', 'image_size': 4},
    {'dataset': 'npz', 'num_validation': 5}])
def test_is_what_loading_finds(tmp_path, fields):
  path = ''
  if fields['dataset'] == 'npz':
    path = train_test.write_images(tmp_path / 'images.npz')
  run = config(npz_path=path, **fields)
  found = sizes.dataset(run)
  wanted = datasets.load(
      run.dataset, npz_path=path or None, num_train=run.num_train or None,
      num_test=run.num_test or None, image_size=run.image_size or None)
  held_out = [np.zeros(0)] * 2
  if run.num_validation:
    wanted, *held_out = datasets.split_validation(
        wanted, run.num_validation, 0)
  for field in arrays.Arrays._fields:
    ours, theirs = getattr(found, field), getattr(wanted, field)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field
  assert found.num_classes == wanted.num_classes
  assert len(sizes.validation(run, found)[0]) == len(held_out[0])


def test_extra_images(tmp_path):
  path = tmp_path / 'extra.npz'
  np.savez(path, data=np.zeros((7, 32, 32, 3), np.uint8), y=np.zeros(7, int))
  run = config(extra__path=str(path), extra__fraction=0.5)
  found = sizes.extra(run, sizes.dataset(run))
  assert found.images.shape == (7, 32, 32, 3) and found.labels.shape == (7,)
  assert sizes.extra(config(), sizes.dataset(run)) is None
  folder = tmp_path / 'folder'
  folder.mkdir()
  np.save(folder / 'images.npy', np.zeros((5, 32, 32, 3), np.uint8))
  np.save(folder / 'labels.npy', np.zeros(5, int))
  run = config(extra__path=str(folder), extra__fraction=0.5)
  assert sizes.extra(run, sizes.dataset(run)).images.shape == (5, 32, 32, 3)


@pytest.mark.parametrize('fields, message', [
    ({'num_train': 60_000}, 'num_train must be at most 50000'),
    ({'num_test': 10_001}, 'num_test must be at most 10000'),
    ({'num_train': 50, 'num_validation': 50}, 'at most 49'),
    ({'dataset': 'digits', 'image_size': 3}, 'divide.*got 3 for .*8 x 8'),
    ({'dataset': 'npz', 'npz_path': '/nowhere.npz'}, 'does not exist'),
    ({'dataset': 'npz', 'npz_path': __file__}, 'not a readable .npz')])
def test_errors(fields, message):
  with pytest.raises(arrays.DataError, match=message):
    sizes.dataset(config(**fields))


def test_incomplete_files(tmp_path):
  path = tmp_path / 'a.npz'
  np.savez(path, x_train=np.zeros((4, 8, 8, 1)), y=np.zeros(4, int))
  with pytest.raises(arrays.DataError, match='x_test, y_test missing'):
    sizes.dataset(config(dataset='npz', npz_path=str(path)))
  run = config(extra__path=str(path), extra__fraction=0.5)
  with pytest.raises(arrays.DataError, match='images under one of'):
    sizes.extra(run, sizes.dataset(run))
