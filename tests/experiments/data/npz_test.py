"""Tests of images from an .npz file: valid and invalid content."""

import numpy as np
import pytest

from experiments.data import arrays, datasets
from tests.helpers.dataset_files import assert_same

pytest.importorskip('tensorflow_datasets')


def good_npz():
  rng = np.random.default_rng(0)
  return {
      'x_train': rng.integers(0, 256, (40, 5, 4, 3), np.uint8),
      'y_train': np.arange(40) % 4,
      'x_test': rng.integers(0, 256, (20, 5, 4, 3), np.uint8),
      'y_test': np.arange(20) % 4,
  }


def load_npz(tmp_path, content, **options):
  path = tmp_path / 'images.npz'
  np.savez(path, **content)
  return datasets.load('npz', npz_path=str(path), **options)


def test_npz_uint8(tmp_path):
  content = good_npz()
  dataset = load_npz(tmp_path, content)
  assert_same(dataset, arrays.Arrays(**content))
  assert dataset.num_classes == 4
  assert dataset.y_train.dtype == dataset.y_test.dtype == np.int32
  pixels = content['x_train'] / 255
  np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)))
  np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)))
  assert str(tmp_path) in dataset.source


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_npz_float(tmp_path, dtype):
  content = good_npz()
  for part in ('x_train', 'x_test'):
    content[part] = (content[part] / 255).astype(dtype)
  dataset = load_npz(tmp_path, content)
  assert dataset.x_train.dtype == dataset.x_test.dtype == np.float32
  np.testing.assert_allclose(dataset.x_train, content['x_train'], rtol=1e-6)
  wide = content['x_train'].astype(np.float64)
  np.testing.assert_allclose(dataset.mean, wide.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(dataset.std, wide.std((0, 1, 2)), rtol=1e-6)


def test_npz_statistics_do_not_depend_on_the_part(tmp_path):
  whole = load_npz(tmp_path, good_npz())
  part = load_npz(tmp_path, good_npz(), num_train=8)
  assert (whole.mean, whole.std) == (part.mean, part.std)


@pytest.mark.parametrize('value', [77, 0.3])
def test_constant_channel_has_unit_std(tmp_path, value):
  content = good_npz()
  for part in ('x_train', 'x_test'):
    content[part] = np.full_like(
        content[part], value, dtype=np.uint8 if value == 77 else np.float32)
  assert load_npz(tmp_path, content).std == (1.0, 1.0, 1.0)


def with_value(x, value):
  x = x / 255
  x[7, 0, 0, 0] = value
  return x


BAD = {
    'rank': ({'x_train': lambda x: x[..., 0]}, r'x_train.*N, H, W, C.*40, 5'),
    'channels first': (
        {'x_train': lambda x: np.zeros((40, 3, 32, 32), np.uint8)},
        r'x_train.*looks like.*transpose'),
    'empty': ({'x_test': lambda x: x[:0], 'y_test': lambda y: y[:0]},
              r'x_test is empty.*\(0, 5'),
    'image type': ({'x_train': lambda x: x.astype(np.int64)},
                   'x_train must be uint8.*int64'),
    'text': ({'x_train': lambda x: x.astype(str)}, 'x_train must be uint8'),
    'NaN': ({'x_train': lambda x: with_value(x, np.nan)},
            'x_train holds NaN or infinity.*image 7'),
    'infinity': ({'x_test': lambda x: with_value(x, -np.inf)},
                 'x_test holds NaN or infinity.*image 7'),
    'too large': ({'x_train': lambda x: x.astype(np.float32)},
                  r'x_train.*in \[0, 1\], got values from 0 to 255.*divide'),
    'too small': ({'x_test': lambda x: with_value(x, -0.25)},
                  r'x_test.*in \[0, 1\], got values from -0\.25'),
    'shapes': ({'x_test': lambda x: x[:, 1:]},
               r'agree.*\(5, 4, 3\).*\(4, 4, 3\)'),
    'types': ({'x_test': lambda x: x / 255}, 'agree.*uint8.*float64'),
    'label length': ({'y_train': lambda y: y[1:]}, r'y_train.*\(40,\).*\(39,'),
    'label column': ({'y_train': lambda y: y[:, None]}, r'y_train.*\(40, 1\)'),
    'label type': ({'y_test': lambda y: y + 0.5}, 'y_test.*whole.*float64'),
    'negative': ({'y_train': lambda y: y - 1}, 'y_train.*from -1 to 2'),
    'stray label': ({'y_train': lambda y: np.where(y == 3, 255, y)},
                    'y_train.*0 to 255.*no image of class 3'),
    'test label': ({'y_test': lambda y: y + 1},
                   r'y_test must lie in 0\.\.3.*from 1 to 4'),
    'one class': ({'y_train': lambda y: y * 0}, 'y_train.*2 or more classes'),
}


@pytest.mark.parametrize('case', BAD)
def test_npz_bad_content(tmp_path, case):
  changes, message = BAD[case]
  content = good_npz()
  for key, change in changes.items():
    content[key] = change(content[key])
  with pytest.raises(datasets.DataError, match=message) as caught:
    load_npz(tmp_path, content)
  assert 'images.npz' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_npz_missing_key(tmp_path):
  content = good_npz()
  content['labels'] = content.pop('y_test')
  with pytest.raises(datasets.DataError, match=r'y_test missing among.*labels'):
    load_npz(tmp_path, content)


def test_npz_of_objects(tmp_path):
  content = good_npz()
  content['x_train'] = content['x_train'].astype(object)
  with pytest.raises(datasets.DataError, match='plain arrays'):
    load_npz(tmp_path, content)


def test_npz_not_an_archive(tmp_path):
  path = tmp_path / 'a.npz'
  with pytest.raises(datasets.DataError, match=r'there is none at .*a\.npz'):
    datasets.load('npz', npz_path=str(path))
  np.savez(path, **good_npz())
  for content in (b'', b'text', path.read_bytes()[:3000]):
    path.write_bytes(content)
    with pytest.raises(datasets.DataError, match=r'not a readable \.npz'):
      datasets.load('npz', npz_path=str(path))
  with path.open('wb') as file:
    np.save(file, np.zeros(3))
  with pytest.raises(datasets.DataError, match=r'not a readable \.npz'):
    datasets.load('npz', npz_path=str(path))


def test_averaged_squares_of_floats_in_any_number_of_chunks(
    tmp_path, monkeypatch):
  content = good_npz()
  for part in ('x_train', 'x_test'):
    content[part] = np.random.default_rng(1).random(
        (40, 6, 6, 2), np.float32)[:len(content[part])]
  monkeypatch.setattr(arrays, '_CHUNK', 7)
  dataset = load_npz(tmp_path, content, image_size=2)
  assert dataset.x_train.dtype == np.float32
  np.testing.assert_allclose(
      dataset.x_train[9, 1, 0], content['x_train'][9, 3:, :3].mean((0, 1)),
      rtol=1e-6)
  np.testing.assert_allclose(
      dataset.x_test.mean((1, 2)), content['x_test'].mean((1, 2)), rtol=1e-6)
  with pytest.raises(
      arrays.DataError, match=r'square images, got 1 for images of 5 x 4'):
    load_npz(tmp_path, good_npz(), image_size=1)


def test_means_of_whole_pixels_are_rounded_to_even():
  pairs = np.array([[0, 1], [1, 2], [254, 255]], np.uint8)
  small = arrays.averaged(np.stack([pairs] * 2, 1)[..., None], 2)
  assert small.ravel().tolist() == [0, 2, 254]


def test_means_are_those_in_double_precision():
  x = np.random.default_rng(0).random((2, 96, 96, 1), np.float32)
  np.testing.assert_array_equal(
      arrays.averaged(x, 96).ravel(),
      x.mean((1, 2, 3), dtype=np.float64).astype(np.float32))
