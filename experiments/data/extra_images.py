"""Loads extra images with labels, for robust self-training (RST).

Carmon et al., "Unlabeled Data Improves Adversarial Robustness", NeurIPS 2019,
also train on images with pseudo-labels of a naturally trained network, or on
generated images. The file is an .npz, or the pickle of 500,000 images published
with that paper, which is read without executing its code. Millions of images
come as a folder with `images.npy` and `labels.npy`: the images are mapped into
memory and read when they are needed.

    extra = extra_images.load('ti_500K_pseudo_labeled.pickle',
                              image_shape=(32, 32, 3), num_classes=10)
"""

from collections.abc import Iterator, Mapping
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.data import arrays, safe_pickle
from experiments.data.arrays import DataError, one_line

#: Accepted keys of images and labels.
IMAGE_KEYS = ('image', 'images', 'x', 'data')
LABEL_KEYS = ('label', 'labels', 'y', 'extrapolated_targets')

_ZIP = b'PK\x03\x04'


class _Folder(Mapping[str, np.ndarray]):
  """The .npy files of a folder by name, opened as memory maps."""

  def __init__(self, path: pathlib.Path) -> None:
    """Opens nothing.

    Args:
      path: the folder.
    """
    self._files = {file.stem: file for file in sorted(path.glob('*.npy'))}

  def __getitem__(self, name: str) -> np.ndarray:
    return np.load(self._files[name], mmap_mode='r', allow_pickle=False)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


class ExtraData(NamedTuple):
  """Images from outside the data set, with labels.

  Attributes:
    images: [N, H, W, C], uint8 in 0..255 or float32 in [0, 1]; of a folder, a
      read-only memory map.
    labels: [N], int32 in 0..num_classes - 1.
    source: description of where they were read from.
  """

  images: np.ndarray
  labels: np.ndarray
  source: str


def load(
    path: str | os.PathLike[str], *, image_shape: tuple[int, ...],
    num_classes: int) -> ExtraData:
  """Reads extra images and their labels.

  Args:
    path: an .npz or a pickle of a dictionary, with images under one of
      `IMAGE_KEYS` and labels under one of `LABEL_KEYS`; or a folder with .npy
      files of these names.
    image_shape: (H, W, C) of the data set.
    num_classes: number of classes of the data set.

  Returns:
    The images and labels, in memory once; images of a folder are not loaded.

  Raises:
    DataError: (a UserError) for an unreadable file, a pickle of other objects
      than arrays, and invalid images or labels.
  """
  place = pathlib.Path(path).expanduser()
  found = _read(place, {'images': IMAGE_KEYS, 'labels': LABEL_KEYS})
  images = _checked_images(place, found['images'], image_shape)
  labels = _as_labels(place, found['labels'])
  name = f'{place}: labels'
  arrays.check_label_form(name, labels, len(images))
  if labels.min() == -1:
    raise DataError(
        f'{name} hold -1 for {int(np.sum(labels == -1))} of {len(labels)} '
        'images, which are unlabeled: label them with a naturally trained '
        f'network by experiments/pseudo_labels.py --images={place}.')
  arrays.check_label_range(name, labels, num_classes)
  return ExtraData(
      images, labels.astype(np.int32, copy=False),
      f'{place}, {len(labels):,} images')


def load_images(
    path: str | os.PathLike[str], *,
    image_shape: tuple[int, ...]) -> np.ndarray:
  """Reads images only; labels in the same file are ignored.

  Args:
    path: as for `load`.
    image_shape: the required (H, W, C).

  Returns:
    [N, H, W, C], uint8 or float32 in [0, 1].

  Raises:
    DataError: as for `load`.
  """
  place = pathlib.Path(path).expanduser()
  found = _read(place, {'images': IMAGE_KEYS})
  return _checked_images(place, found['images'], image_shape)


def _checked_images(
    path: pathlib.Path, images: Any, image_shape: tuple[int, ...]
) -> np.ndarray:
  name = f'{path}: images'
  if not isinstance(images, np.ndarray):
    raise DataError(
        f'{name} must be one NumPy array [N, H, W, C], got '
        f'{type(images).__name__}.')
  arrays.check_images(name, images)
  if images.shape[1:] != tuple(image_shape):
    raise DataError(
        f"{name} must have the data set's shape {tuple(image_shape)}, got "
        f'{images.shape[1:]}.')
  if isinstance(images, np.memmap):
    _check_mapped(name, images)
  return np.ascontiguousarray(arrays.as_images(images))


def _check_mapped(name: str, images: np.memmap) -> None:
  """Raises DataError if the images would have to be loaded whole."""
  if images.dtype not in (np.uint8, np.float32):
    raise DataError(
        f'{name} of a folder must be uint8 or float32 in the byte order of '
        f'this machine, got {images.dtype.str}.')
  if not images.flags.c_contiguous:
    raise DataError(
        f'{name} of a folder must be saved in C order, got Fortran order.')


def _as_labels(path: pathlib.Path, labels: Any) -> np.ndarray:
  """Labels as an array; accepts a list of integers."""
  if isinstance(labels, list | tuple):
    if not all(type(label) is int for label in labels):
      raise DataError(f'{path}: labels must be whole numbers.')
    labels = np.array(labels, np.int64)
  if not isinstance(labels, np.ndarray):
    raise DataError(
        f'{path}: labels must be an array or a list of whole numbers, got '
        f'{type(labels).__name__}.')
  return labels


def _read(
    path: pathlib.Path, wanted: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
  """Reads the value of the one key of each group that is in the file."""
  try:
    if path.is_dir():
      return _picked(path, _Folder(path), wanted)
    with path.open('rb') as file:
      is_zip = file.read(len(_ZIP)) == _ZIP
    if is_zip:
      with np.load(path, allow_pickle=False) as archive:
        return _picked(path, archive, wanted)
    with path.open('rb') as file:
      content = safe_pickle.load(file)
  except DataError:
    raise
  except safe_pickle.Refused as error:
    raise DataError(
        f'{path} is an unsupported pickle: {error}. If you trust it, load it '
        'yourself and save images and labels with numpy.savez.') from error
  # Each layer (zip, NumPy, pickle) raises its own errors for a damaged file.
  except Exception as error:
    raise DataError(
        f'{path} is neither a readable .npz file of plain arrays, nor a pickle '
        f'or a folder of them ({one_line(error)}).') from error
  if not isinstance(content, dict):
    raise DataError(
        f'{path} is a pickle of {type(content).__name__}; it must be a '
        f'dictionary with {_allowed(wanted)}.')
  return _picked(path, content, wanted)


def _picked(
    path: pathlib.Path, content: Mapping[str, Any],
    wanted: dict[str, tuple[str, ...]]) -> dict[str, Any]:
  """Selects the one key of each group; reads only these .npz members."""
  found = {}
  for what, keys in wanted.items():
    present = [key for key in keys if key in content]
    if len(present) != 1:
      names = ', '.join(sorted(map(str, content))) or 'nothing'
      raise DataError(
          f'{path} must hold {_allowed(wanted)}; for {what} it has '
          f'{" and ".join(present) or "none"} among {names:.200}.')
    found[what] = content[present[0]]
  return found


def _allowed(wanted: dict[str, tuple[str, ...]]) -> str:
  return ' and '.join(
      f'{what} under one of {", ".join(keys)}' for what, keys in wanted.items())
