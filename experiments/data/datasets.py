"""Loads CIFAR-10, CIFAR-100, SVHN, handwritten digits, or your own data.

`load` returns all images as NumPy arrays. CIFAR and SVHN are read from a data
set prepared by TFDS if there is one, else from the official files, which the
first run downloads. `digits` is included in scikit-learn and needs no download.
`npz` is your own file with `x_train`, `y_train`, `x_test` and `y_test`.

  >>> digits = load('digits', num_train=100)
  >>> digits.x_train.shape, digits.x_test.shape, digits.num_classes
  ((100, 8, 8, 1), (797, 8, 8, 1), 10)
"""

from collections.abc import Mapping
import inspect
import pathlib
from typing import Any, NamedTuple
import zipfile
import zlib

import numpy as np

from awp_jax.core import checks
from experiments.data import archives, downloads, prepared
from experiments.data import arrays as arrays_lib
from experiments.data.arrays import Arrays, DataError, one_line
from experiments.util import named
from experiments.util.errors import user_errors

__all__ = [
    'NAMES', 'DataError', 'Dataset', 'describe', 'load', 'split_validation']

NAMES = ('cifar10', 'cifar100', 'svhn', 'digits', 'npz')

_DIGITS_TRAIN = 1000  # of 1,797; the rest are test images


class Dataset(NamedTuple):
  """Training and test images of one data set.

  Attributes:
    name: one of `NAMES`, or that of a function in another package.
    x_train: images [N, H, W, C], uint8 in 0..255 or float32 in [0, 1].
    y_train: labels [N], int32 in 0..num_classes - 1.
    x_test: images [M, H, W, C] of the same type.
    y_test: labels [M].
    num_classes: number of classes.
    mean: subtracted by the model, per channel, in units of [0, 1].
    std: divisor in the model, per channel.
    source: description of where the images were read from.
  """

  name: str
  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  source: str


class _Official(NamedTuple):
  """A published data set with the normalization of the AWP experiments."""

  archive: archives.Archive
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


_OFFICIAL = {
    'cifar10': _Official(
        archives.CIFAR10, 10,
        (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    'cifar100': _Official(
        archives.CIFAR100, 100,
        (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        (0.2673342858792401, 0.2564384629170883, 0.27615047132568404)),
    'svhn': _Official(archives.SVHN, 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def load(
    name: str, *, data_dir: str | None = None, npz_path: str | None = None,
    num_train: int | None = None, num_test: int | None = None, seed: int = 0,
    image_size: int | None = None, progress: bool = True) -> Dataset:
  """Loads a data set, or a stratified subset of it.

  CIFAR and SVHN are searched in `data_dir`, `$TFDS_DATA_DIR` and
  `~/tensorflow_datasets`. Missing data are downloaded into the first of these
  that is set.

  Args:
    name: one of `NAMES`, or 'package.module:load' with options in parentheses:
      a function that returns a mapping with x_train, y_train, x_test and
      y_test, and maybe num_classes, mean and std. It may have an argument
      data_dir.
    data_dir: a TFDS folder, which contains for instance `cifar10/3.0.2/`.
    npz_path: the file to read, for `npz` only.
    num_train: size of a stratified subset of the training images; None keeps
      all.
    num_test: the same for the test images.
    seed: selects the subsets.
    image_size: height and width of images averaged over squares of pixels, as
      in `arrays.averaged`; None keeps the stored pixels.
    progress: whether to show progress bars.

  Returns:
    The data set. Except for CIFAR and SVHN, mean and std are by default those
    of all stored training images regardless of `num_train` and `image_size`, so
    models trained on different subsets share the normalization.

  Raises:
    UserError: for an unknown name, or numbers out of range.
    DataError: (a UserError) if the data cannot be obtained or are invalid; see
      `arrays.checked`.
  """
  with user_errors():
    if not named.is_external(name):
      checks.one_of('data set', name, NAMES)
    checks.count('seed', seed, minimum=0)
  if name == 'npz' and not npz_path:
    raise DataError(
        "data set 'npz' needs npz_path, a file with x_train, y_train, x_test "
        'and y_test.')
  if name != 'npz' and npz_path:
    raise DataError(
        f"npz_path requires data set 'npz', got {npz_path!r} for {name!r}.")
  if name == 'npz':
    dataset = _npz(pathlib.Path(str(npz_path)).expanduser())
  elif name == 'digits':
    dataset = _digits()
  elif named.is_external(name):
    dataset = _external(name, data_dir)
  else:
    dataset = _official(name, data_dir, progress)
  dataset = dataset._replace(
      **_part(dataset, 'train', num_train, seed),
      **_part(dataset, 'test', num_test, seed))
  if image_size is None:
    return dataset
  with user_errors():
    checks.count('image_size', image_size)
  block = arrays_lib.block_of(
      dataset.x_train.shape, int(image_size), dataset.name)
  return dataset._replace(
      x_train=arrays_lib.averaged(dataset.x_train, block),
      x_test=arrays_lib.averaged(dataset.x_test, block))


def split_validation(
    dataset: Dataset, num_validation: int,
    seed: int) -> tuple[Dataset, np.ndarray, np.ndarray]:
  """Holds out a stratified subset of the training images for validation.

  Args:
    dataset: the data set; not modified.
    num_validation: number of images, from 0 to all but one.
    seed: selects the images.

  Returns:
    (the data set without these training images, the images, their labels).

  Raises:
    UserError: if `num_validation` is out of range.
  """
  with user_errors():
    checks.count('num_validation', num_validation, minimum=0)
    checks.count('seed', seed, minimum=0)
  total = len(dataset.y_train)
  if num_validation >= total:
    raise DataError(
        f'num_validation must leave a training image: at most {total - 1} of '
        f'the {total} of {dataset.name!r}, got {num_validation}.')
  rng = np.random.default_rng((int(seed), 2))  # `load` uses 0 and 1
  held_out = np.zeros(total, bool)
  held_out[arrays_lib.stratified(
      dataset.y_train, int(num_validation), rng)] = True
  rest = dataset._replace(
      x_train=dataset.x_train[~held_out], y_train=dataset.y_train[~held_out])
  return rest, dataset.x_train[held_out], dataset.y_train[held_out]


def describe(dataset: Dataset) -> dict[str, Any]:
  """Describes a data set as plain JSON values, for the record of a run."""
  return {
      'name': dataset.name,
      'source': dataset.source,
      'num_train': len(dataset.x_train),
      'num_test': len(dataset.x_test),
      'num_classes': dataset.num_classes,
      'image_shape': list(dataset.x_train.shape[1:]),
      'dtype': str(dataset.x_train.dtype),
      'mean': list(dataset.mean),
      'std': list(dataset.std),
  }


def _part(
    dataset: Dataset, part: str, num: int | None,
    seed: int) -> dict[str, Any]:
  """The fields of one part, reduced to `num` images."""
  images = getattr(dataset, f'x_{part}')
  labels = getattr(dataset, f'y_{part}')
  if num is None:
    return {}
  with user_errors():
    checks.count(f'num_{part}', num)
  if num > len(labels):
    raise DataError(
        f'num_{part} must be at most {len(labels)}, all {part} images of '
        f'{dataset.name!r} ({dataset.source}), got {num}.')
  rng = np.random.default_rng((int(seed), ('train', 'test').index(part)))
  keep = arrays_lib.stratified(labels, int(num), rng)
  return {f'x_{part}': images[keep], f'y_{part}': labels[keep]}


def _with_own_statistics(
    name: str, arrays: Arrays, num_classes: int, source: str) -> Dataset:
  mean, std = arrays_lib.channel_statistics(arrays.x_train)
  return Dataset(name, *arrays, num_classes, mean, std, source)


def _digits() -> Dataset:
  """Scikit-learn's digits, 8x8: 0..16 is scaled to 0..255; fixed split."""
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  is_train = np.zeros(len(labels), bool)
  is_train[arrays_lib.stratified(
      labels, _DIGITS_TRAIN, np.random.default_rng(0))] = True
  arrays = Arrays(
      images[is_train], labels[is_train], images[~is_train], labels[~is_train])
  arrays = arrays_lib.checked(arrays, 10, 'digits')
  return _with_own_statistics('digits', arrays, 10, 'scikit-learn')


def _npz(path: pathlib.Path) -> Dataset:
  if not path.is_file():
    raise DataError(f'npz_path must be a file, and there is none at {path}.')
  try:
    # Given a path, NumPy would leave the file open if it is not an archive.
    with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
      names = stored.files
      missing = [key for key in Arrays._fields if key not in names]
      if missing:
        raise DataError(
            f'{path} must hold x_train, y_train, x_test and y_test: '
            f'{", ".join(missing)} missing among {names}.')
      arrays = Arrays(**{key: stored[key] for key in Arrays._fields})
  except DataError:
    raise
  except (OSError, EOFError, ValueError, AttributeError, TypeError,
          zipfile.BadZipFile, zlib.error) as error:
    raise DataError(
        f'{path} is not a readable .npz file of plain arrays '
        f'({one_line(error)}): write it with numpy.savez.') from error
  arrays = arrays_lib.checked(arrays, None, str(path))
  num_classes = arrays_lib.count_classes(arrays.y_train, str(path))
  return _with_own_statistics('npz', arrays, num_classes, str(path))


def _external(text: str, data_dir: str | None) -> Dataset:
  """The data set of a function in another package."""
  name, options = named.parse_call(text, 'dataset')
  found = named.load('dataset', name)
  made = named.call(
      'dataset', found, name, options=options, offered={'data_dir': data_dir})
  optional = ('num_classes', 'mean', 'std')
  if not isinstance(made, Mapping) or not (
      {*Arrays._fields} <= made.keys() <= {*Arrays._fields, *optional}):
    got = (f'the keys {", ".join(map(str, made))}'
           if isinstance(made, Mapping) else type(made).__name__)
    raise DataError(
        f'dataset={text!r} must return a mapping with '
        f'{", ".join(Arrays._fields)}, and maybe {", ".join(optional)}, got '
        f'{got}.')
  arrays = arrays_lib.checked(
      Arrays(*(np.asarray(made[key]) for key in Arrays._fields)),
      made.get('num_classes'), text)
  num_classes = made.get('num_classes') or arrays_lib.count_classes(
      arrays.y_train, text)
  own = _with_own_statistics(
      text, arrays, int(num_classes), inspect.getsourcefile(
          inspect.unwrap(found)) or name)
  mean, std = (
      tuple(float(part) for part in made.get(key, getattr(own, key)))
      for key in ('mean', 'std'))
  channels = arrays.x_train.shape[-1]
  if {len(mean), len(std)} - {1, channels} or not all(s > 0 for s in std):
    raise DataError(
        f'dataset={text!r}: mean and std must have a value for each of '
        f'{channels} channels, and std > 0, got {mean} and {std}.')
  return own._replace(mean=mean, std=std)


def _official(name: str, data_dir: str | None, progress: bool) -> Dataset:
  """Reads a prepared data set, or else the official files."""
  archive, num_classes, mean, std = _OFFICIAL[name]
  places = prepared.places(data_dir)
  arrays, source = _prepared(archive.name, places, progress)
  if arrays is None:
    looked = source
    try:
      arrays, paths = downloads.load(archive, places, progress)
    except DataError as error:
      raise DataError(_nothing(name, archive, places, looked, error)) from error
    source = f'official files, {paths}'
  arrays = arrays_lib.checked(arrays, num_classes, source)
  sizes = len(arrays.x_train), len(arrays.x_test)
  if sizes != (archive.num_train, archive.num_test):
    source += (
        f'; holds {sizes[0]:,} of {archive.num_train:,} training images and '
        f'{sizes[1]:,} of {archive.num_test:,} test images')
  return Dataset(name, *arrays, num_classes, mean, std, source)


def _prepared(
    name: str, places: list[pathlib.Path],
    progress: bool) -> tuple[Arrays | None, str]:
  """(arrays, source), or (None, what was found in each place)."""
  seen = []
  for place in places:
    folder = prepared.find(name, place)
    if folder is None:
      seen.append(f'{place / name} (not there)')
      continue
    try:
      return prepared.read(folder, progress), f'prepared by TFDS, {folder}'
    except DataError as error:
      seen.append(str(error))
  return None, ', '.join(seen)


def _nothing(
    name: str, archive: archives.Archive, places: list[pathlib.Path],
    looked: str, error: DataError) -> str:
  """The error message for data neither on disk nor downloadable."""
  manual = places[0] / 'downloads' / 'manual'
  return (
      f'data set {name!r} was not found. Searched for a prepared TFDS set: '
      f'{looked}. Searched for official files: '
      f'{", ".join(str(place / "downloads") for place in places)}. Download: '
      f'{error}. What to do: connect to the network (a proxy is taken from '
      'http_proxy and https_proxy) and run again; or save '
      f'{" and ".join(archive.urls)} in {manual}; or set data_dir or '
      f'TFDS_DATA_DIR to a folder that contains {archive.name}/ as '
      "array_record; or use the data set 'digits', which needs no download.")
