"""Tests of data sets prepared by TFDS, and of their cache.

Real prepared data are read only if AWP_TEST_DATA names a folder with `tfds/`.
"""

import io
import json
import os

import numpy as np
from PIL import Image
import pytest

from experiments.data import arrays, datasets, downloads, prepared
from tests.helpers.dataset_files import (
  assert_same,
  left_in,
  official,
  random_images,
)

pytest.importorskip('tensorflow_datasets')


def png(image):
  stream = io.BytesIO()
  Image.fromarray(image).save(stream, 'PNG')
  return stream.getvalue()


def write_records(path, images, labels, has_coarse=False):
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature['id'].bytes_list.value.append(f'{i}'.encode())
    feature['image'].bytes_list.value.append(png(image))
    feature['label'].int64_list.value.append(int(label))
    if has_coarse:
      feature['coarse_label'].int64_list.value.append(int(label) // 5)
    writer.write(example.SerializeToString())
  writer.close()


def label_feature(num_classes):
  return {
      'pythonClassName':
          'tensorflow_datasets.core.features.class_label_feature.ClassLabel',
      'classLabel': {'numClasses': str(num_classes)}}


def prepare(
    place, version='3.0.2', file_format='array_record', name='cifar10',
    module='cifar', num_classes=10):
  """Writes a data set in the layout of TFDS; returns its arrays."""
  folder = place / name / version
  folder.mkdir(parents=True)
  expected = arrays.Arrays(
      *random_images(0, 30, num_classes), *random_images(1, 20, num_classes))
  splits = []
  for split, num in (('train', 30), ('test', 20)):
    write_records(
        folder / f'{name}-{split}.{file_format}-00000-of-00001',
        getattr(expected, f'x_{split}'), getattr(expected, f'y_{split}'),
        has_coarse=num_classes == 100)
    splits.append({
        'name': split, 'numBytes': '1', 'shardLengths': [str(num)],
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'})
  (folder / 'dataset_info.json').write_text(json.dumps({
      'name': name, 'version': version, 'fileFormat': file_format,
      'moduleName': f'tensorflow_datasets.image_classification.{module}',
      'splits': splits}))
  features = 'tensorflow_datasets.core.features.'
  (folder / 'features.json').write_text(json.dumps({
      'pythonClassName': features + 'features_dict.FeaturesDict',
      'featuresDict': {'features': {
          'id': {
              'pythonClassName': features + 'text_feature.Text', 'text': {}},
          'image': {
              'pythonClassName': features + 'image_feature.Image',
              'image': {'dtype': 'uint8',
                        'shape': {'dimensions': ['32', '32', '3']}}},
          'label': label_feature(num_classes)} | (
              {'coarse_label': label_feature(20)} if num_classes == 100
              else {})}}))
  for label, count in (('label', num_classes), ('coarse_label', 20)):
    (folder / f'{label}.labels.txt').write_text(
        '\n'.join(map(str, range(count))))
  return expected


def no_download(monkeypatch):
  def refuse(url):
    raise arrays.DataError(f'{url} is not for tests')
  monkeypatch.setattr(downloads, 'probe', refuse)


@pytest.mark.parametrize('where', ['argument', 'environment', 'home'])
@pytest.mark.parametrize('version', ['3.0.2', '3.0.1'])
def test_prepared(monkeypatch, tmp_path, where, version):
  no_download(monkeypatch)
  place = tmp_path / 'home' / 'tensorflow_datasets'
  place = place if where == 'home' else tmp_path / 'elsewhere'
  expected = prepare(place, version)
  if where == 'environment':
    monkeypatch.setenv('TFDS_DATA_DIR', str(place))
  dataset = datasets.load(
      'cifar10', data_dir=str(place) if where == 'argument' else None,
      progress=False)
  assert_same(dataset, expected)
  assert dataset.y_train.dtype == np.int32
  assert dataset.mean == (0.4914, 0.4822, 0.4465)
  assert f'cifar10/{version}' in dataset.source
  assert '30 of 50,000 training' in dataset.source


@pytest.mark.parametrize('name, tfds_name, module, num_classes', [
    ('cifar100', 'cifar100', 'cifar', 100),
    ('svhn', 'svhn_cropped', 'svhn', 10)])
def test_prepared_cifar100_and_svhn(
    name, tfds_name, module, num_classes, monkeypatch, tmp_path):
  no_download(monkeypatch)
  expected = prepare(
      tmp_path, '3.1.0', name=tfds_name, module=module,
      num_classes=num_classes)
  dataset = datasets.load(name, data_dir=str(tmp_path), progress=False)
  assert_same(dataset, expected)  # with the fine labels
  assert (dataset.name, dataset.num_classes) == (name, num_classes)
  assert f'{tfds_name}/3.1.0' in dataset.source


def test_decoded_once_then_cached(monkeypatch, tmp_path):
  expected = prepare(tmp_path)
  folder = prepared.find('cifar10', tmp_path)
  prepared.read(folder, progress=False)
  cached, = (tmp_path / 'cache').iterdir()

  with monkeypatch.context() as patch:
    patch.setattr(prepared, '_decode', None)
    assert_same(prepared.read(folder), expected)

  cached.write_bytes(cached.read_bytes()[:100])  # damaged: decoded again
  assert_same(prepared.read(folder, progress=False), expected)
  with np.load(cached) as whole:
    assert len(whole['y_train']) == 30

  os.utime(folder / 'dataset_info.json', (1, 1))  # prepared anew
  prepared.read(folder, progress=False)
  assert len(left_in(tmp_path / 'cache')) == 2


@pytest.mark.parametrize('cache', ['', '{tmp}/file/below'])
def test_works_without_a_cache(monkeypatch, tmp_path, cache):
  (tmp_path / 'file').write_text('in the way')
  monkeypatch.setenv('AWP_CACHE_DIR', cache.format(tmp=tmp_path))
  expected = prepare(tmp_path)
  folder = prepared.find('cifar10', tmp_path)
  assert_same(prepared.read(folder, progress=False), expected)
  assert not (tmp_path / 'cache').exists()


def test_newest_version_is_found(tmp_path):
  for version in ('3.0.9', '3.0.10', 'incomplete.abc_3.0.11'):
    (tmp_path / 'cifar10' / version).mkdir(parents=True)
    (tmp_path / 'cifar10' / version / 'dataset_info.json').write_text('{}')
  (tmp_path / 'cifar10' / '4.0.0').mkdir()
  assert prepared.find('cifar10', tmp_path).name == '3.0.10'
  assert prepared.find('cifar100', tmp_path) is None


@pytest.mark.parametrize('damage', ['tfrecord', 'shard', 'info'])
def test_unreadable_prepared_set_is_named(monkeypatch, tmp_path, damage):
  no_download(monkeypatch)
  prepare(tmp_path, file_format=(
      'tfrecord' if damage == 'tfrecord' else 'array_record'))
  folder = prepared.find('cifar10', tmp_path)
  if damage == 'shard':
    (folder / 'cifar10-test.array_record-00000-of-00001').unlink()
  if damage == 'info':
    (folder / 'dataset_info.json').write_text('{')
  with pytest.raises(datasets.DataError, match=f'{folder} cannot be read'):
    datasets.load('cifar10', data_dir=str(tmp_path), progress=False)


def test_unreadable_prepared_set_is_downloaded(shop, monkeypatch, tmp_path):
  _, archive, expected = shop
  prepare(tmp_path, file_format='tfrecord')
  official(monkeypatch, 'cifar10', archive)
  dataset = datasets.load('cifar10', data_dir=str(tmp_path), progress=False)
  assert_same(dataset, expected)


@pytest.mark.slow
def test_real_prepared_cifar10(data_folder):
  dataset = datasets.load(
      'cifar10', data_dir=str(data_folder / 'tfds'), progress=False)
  assert dataset.x_train.shape[1:] == (32, 32, 3)
  assert len(dataset.x_train) > 49_000
  assert len(dataset.x_test) > 9_900
  assert min(np.bincount(dataset.y_test, minlength=10)) > 900
  mean, std = arrays.channel_statistics(dataset.x_train)
  np.testing.assert_allclose(mean, dataset.mean, atol=1e-3)
  np.testing.assert_allclose(std, dataset.std, atol=1e-3)


def test_real_prepared_cifar100(data_folder):
  dataset = datasets.load(
      'cifar100', data_dir=str(data_folder / 'tfds'), progress=False)
  assert dataset.num_classes == 100
  assert set(dataset.y_train) == set(dataset.y_test) == set(range(100))
  mean, std = arrays.channel_statistics(dataset.x_train)
  np.testing.assert_allclose(mean, dataset.mean, atol=5e-3)
  np.testing.assert_allclose(std, dataset.std, atol=5e-3)
