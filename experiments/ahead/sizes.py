"""Data sets of the right sizes without their images.

Programs depend on the number and the shape of the images only. The arrays here
are views of a single zero and take no memory.
"""

import pathlib
from typing import Any
import zipfile

import ml_collections
import numpy as np

from experiments.data import archives, arrays, datasets, extra_images
from experiments.data.arrays import DataError

_ARCHIVES = {
    'cifar10': (archives.CIFAR10, 10), 'cifar100': (archives.CIFAR100, 100),
    'svhn': (archives.SVHN, 10)}
_SHAPE = (32, 32, 3)  # of the images in `_ARCHIVES`


def dataset(config: ml_collections.ConfigDict) -> datasets.Dataset:
  """The data set of a config, validation images removed.

  Args:
    config: a checked config.

  Returns:
    Zeros of the shapes and dtypes that the run would load. Digits, which need
    no file, are loaded; of an .npz only the headers and the training labels.

  Raises:
    DataError: for a missing or unreadable .npz, and too large subsets.
  """
  if config.dataset == 'digits':
    found = datasets.load('digits')
  elif config.dataset == 'npz':
    found = _npz(pathlib.Path(config.npz_path).expanduser())
  else:
    archive, num_classes = _ARCHIVES[config.dataset]
    found = _dataset(
        config.dataset, archive.num_train, archive.num_test, _SHAPE, np.uint8,
        num_classes)
  num_train, num_test = len(found.x_train), len(found.x_test)
  for name, number, most in (
      ('num_train', config.num_train, num_train),
      ('num_test', config.num_test, num_test),
      ('num_validation', config.num_validation,
       (config.num_train or num_train) - 1)):
    if number > most:
      raise DataError(
          f'{name} must be at most {most} for {config.dataset!r}, got '
          f'{number}.')
  height, width, channels = found.x_train.shape[1:]
  if config.image_size:
    block = arrays.block_of(
        found.x_train.shape, config.image_size, config.dataset)
    height, width = height // block, width // block
  return _dataset(
      config.dataset, (config.num_train or num_train) - config.num_validation,
      config.num_test or num_test, (height, width, channels),
      found.x_train.dtype, found.num_classes)


def validation(
    config: ml_collections.ConfigDict, found: datasets.Dataset
) -> tuple[np.ndarray, np.ndarray]:
  """Validation images and labels, as in `dataset`."""
  return (
      _zeros((config.num_validation, *found.x_train.shape[1:]),
             found.x_train.dtype),
      _zeros((config.num_validation,), np.int32))


def extra(
    config: ml_collections.ConfigDict, found: datasets.Dataset
) -> extra_images.ExtraData | None:
  """The extra images of a config, from the headers of their files.

  Args:
    config: a checked config.
    found: from `dataset`.

  Returns:
    Zeros, or None if the config has no extra images.

  Raises:
    DataError: for another kind of file, and for images of another shape.
  """
  if not config.extra.path:
    return None
  path = pathlib.Path(config.extra.path).expanduser()
  stored = {
      part.stem: (array.shape, array.dtype) for part in path.glob('*.npy')
      for array in [np.load(part, mmap_mode='r')]
  } if path.is_dir() else headers(path)
  keys = [key for key in extra_images.IMAGE_KEYS if key in stored]
  if len(keys) != 1:
    raise DataError(
        f'{path} must hold images under one of '
        f'{", ".join(extra_images.IMAGE_KEYS)}, got {", ".join(stored)}.')
  shape, dtype = stored[keys[0]]
  if shape[1:] != found.x_train.shape[1:]:
    raise DataError(
        f"{path}: images must have the data set's shape "
        f'{found.x_train.shape[1:]}, got {shape[1:]}.')
  return extra_images.ExtraData(
      _zeros(shape, dtype), _zeros(shape[:1], np.int32), str(path))


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  return np.broadcast_to(np.zeros((), dtype), shape)


def _dataset(
    name: str, num_train: int, num_test: int, shape: tuple[int, ...],
    dtype: Any, num_classes: int) -> datasets.Dataset:
  # The normalization is a constant of the programs; its values do not matter.
  channels = (0.5,) * shape[-1]
  return datasets.Dataset(
      name, _zeros((num_train, *shape), dtype), _zeros((num_train,), np.int32),
      _zeros((num_test, *shape), dtype), _zeros((num_test,), np.int32),
      num_classes, channels, channels, 'sizes only')


def _npz(path: pathlib.Path) -> datasets.Dataset:
  stored = headers(path)
  missing = [key for key in arrays.Arrays._fields if key not in stored]
  if missing:
    raise DataError(
        f'{path} must hold x_train, y_train, x_test and y_test: '
        f'{", ".join(missing)} missing among {", ".join(stored)}.')
  shape, dtype = stored['x_train']
  if len(shape) != 4:
    raise DataError(
        f'{path}: x_train must be images of shape [N, H, W, C], got shape '
        f'{shape}.')
  with np.load(path, allow_pickle=False) as opened:
    labels = opened['y_train']
  arrays.check_label_form(f'{path}: y_train', labels, shape[0])
  return _dataset(
      'npz', shape[0], stored['x_test'][0][0], shape[1:],
      np.uint8 if dtype == np.uint8 else np.float32,
      arrays.count_classes(labels, str(path)))


def headers(
    path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of each array of an .npz."""
  if not path.is_file():
    raise DataError(
        f'the number of images is read from {path}, which does not exist.')
  found = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for name in archive.namelist():
        with archive.open(name) as member:
          version = np.lib.format.read_magic(member)
          read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                  else np.lib.format.read_array_header_2_0)
          shape, _, dtype = read(member)
          found[name.removesuffix('.npy')] = (shape, dtype)
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    raise DataError(
        f'{path} is not a readable .npz file of plain arrays '
        f'({arrays.one_line(error)}); other kinds of files do not tell the '
        'number of images without being loaded.') from error
  return found
