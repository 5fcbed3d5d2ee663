"""Checks of images and labels as NumPy arrays, and stratified subsets.

All data pass these checks before anything is compiled. Images are [N, H, W, C],
either uint8 in 0..255 or floating point in [0, 1]; labels are [N], integers in
0..K-1.

  >>> labels = np.array([0, 1, 1, 0, 1, 1])
  >>> len(stratified(labels, 3, np.random.default_rng(0)))
  3
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.util.errors import UserError

_CHUNK = 1024  # images per float64 copy, or per read from a memory map
_CONSTANT = 1e-6  # smaller standard deviations are rounding errors


class DataError(UserError):
  """Data that cannot be found, fetched or used."""


def one_line(error: BaseException) -> str:
  """Type and text of an error, shortened to quote in another error."""
  return f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'


class Arrays(NamedTuple):
  """Training and test images with their labels.

  Attributes:
    x_train: images [N, H, W, C].
    y_train: labels [N].
    x_test: images [M, H, W, C].
    y_test: labels [M].
  """

  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray


def checked(arrays: Arrays, num_classes: int | None, where: str) -> Arrays:
  """Checks images and labels and converts them to standard dtypes.

  Args:
    arrays: images and labels as read.
    num_classes: K, or None to infer it from the training labels, which must
      then contain each of 0..K-1.
    where: name of the source in errors, such as a path.

  Returns:
    The arrays with uint8 or float32 images and int32 labels.

  Raises:
    DataError: for a wrong rank, dtype or length, an empty set, NaN or infinity,
      images outside of [0, 1], labels out of range, or training and test
      images that differ in shape or dtype.
  """
  x_train, y_train, x_test, y_test = arrays
  for part, x, y in (('train', x_train, y_train), ('test', x_test, y_test)):
    check_images(f'{where}: x_{part}', x)
    check_label_form(f'{where}: y_{part}', y, len(x))
  if x_train.shape[1:] != x_test.shape[1:] or (
      (x_train.dtype == np.uint8) != (x_test.dtype == np.uint8)):
    raise DataError(
        f'{where}: x_train and x_test must agree in image shape and type, got '
        f'{x_train.shape[1:]} {x_train.dtype} and {x_test.shape[1:]} '
        f'{x_test.dtype}.')
  if num_classes is None:
    num_classes = count_classes(y_train, where)
  check_label_range(f'{where}: y_train', y_train, num_classes)
  check_label_range(f'{where}: y_test', y_test, num_classes)
  return Arrays(
      as_images(x_train), y_train.astype(np.int32, copy=False),
      as_images(x_test), y_test.astype(np.int32, copy=False))


def as_images(x: np.ndarray) -> np.ndarray:
  """Checked images as uint8 or float32, copied only if necessary."""
  return x if x.dtype == np.uint8 else x.astype(np.float32, copy=False)


def check_images(name: str, x: np.ndarray) -> None:
  """Raises DataError unless `x` is [N, H, W, C], uint8 or within [0, 1]."""
  if x.ndim != 4:
    raise DataError(
        f'{name} must be images of shape [N, H, W, C] (C = 1 for grayscale), '
        f'got shape {x.shape}.')
  if 0 in x.shape:
    raise DataError(f'{name} is empty: shape {x.shape}.')
  if x.shape[1] in (1, 3) and x.shape[3] > 4:
    raise DataError(
        f'{name} must be [N, H, W, C], but the shape {x.shape} looks like '
        '[N, C, H, W]: save x.transpose(0, 2, 3, 1).')
  if x.dtype == np.uint8:
    return
  if x.dtype.kind != 'f':
    raise DataError(
        f'{name} must be uint8 in 0..255 or floating point in [0, 1], got '
        f'{x.dtype}.')
  low, high = _range(x)
  if not (np.isfinite(low) and np.isfinite(high)):
    bad = next(i for i, image in enumerate(x) if not np.isfinite(image).all())
    raise DataError(
        f'{name} holds NaN or infinity, first in image {bad}: repair or drop '
        'such images.')
  if low < 0 or high > 1:
    raise DataError(
        f'{name} is floating point and must lie in [0, 1], got values from '
        f'{low:g} to {high:g}: divide by 255, or save uint8.')


def _range(x: np.ndarray) -> tuple[float, float]:
  """Minimum and maximum; NaN if x contains NaN."""
  low, high = np.inf, -np.inf
  for chunk in chunks(x):
    low = np.minimum(low, np.min(chunk))  # unlike min(), keeps NaN
    high = np.maximum(high, np.max(chunk))
  return float(low), float(high)


def chunks(x: np.ndarray) -> Iterator[np.ndarray]:
  """Successive parts of an array, so that a memory map is not read whole."""
  for start in range(0, len(x), _CHUNK):
    yield x[start:start + _CHUNK]


def check_label_form(name: str, y: np.ndarray, length: int) -> None:
  """Raises DataError unless `y` is [length] with an integer dtype."""
  if y.shape != (length,):
    raise DataError(
        f'{name} must hold one label per image, shape ({length},), got shape '
        f'{y.shape}.')
  if y.dtype.kind not in 'iu':
    raise DataError(
        f'{name} must hold whole numbers of an integer type, got {y.dtype}.')


def check_label_range(name: str, y: np.ndarray, num_classes: int) -> None:
  """Raises DataError unless all labels are in 0..num_classes - 1."""
  low, high = int(y.min()), int(y.max())
  if low < 0 or high >= num_classes:
    raise DataError(
        f'{name} must lie in 0..{num_classes - 1} ({num_classes} classes), got '
        f'labels from {low} to {high}.')


def count_classes(y_train: np.ndarray, where: str) -> int:
  """Number of classes K of training labels that contain each of 0..K-1.

  Args:
    y_train: integers [N].
    where: name of the source in errors.

  Returns:
    K, at least 2.

  Raises:
    DataError: for a negative label, a class without an image (otherwise a stray
      label 255 would imply 256 classes), or a single class.
  """
  present = np.unique(y_train)
  low, high = int(present[0]), int(present[-1])
  if low < 0:
    raise DataError(
        f'{where}: y_train must be labels 0..K-1, got labels from {low} to '
        f'{high}.')
  if len(present) != high + 1:
    missing = next(i for i, label in enumerate(present) if i != label)
    raise DataError(
        f'{where}: y_train must use every label in 0..K-1, got {len(present)} '
        f'different labels from {low} to {high}, but no image of class '
        f'{missing}.')
  if high == 0:
    raise DataError(f'{where}: y_train must name 2 or more classes, got 1.')
  return high + 1


def stratified(
    labels: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
  """Selects a random stratified subset of `num` examples.

  Class c gets num * N_c / N examples, rounded to the exact total: on balanced
  data no two classes differ by more than one. Proportional sizes make the
  accuracy on the subset an estimate of that on all examples, also for
  unbalanced classes (SVHN).

  Args:
    labels: integers >= 0, [N].
    num: size of the subset, 0..N.
    rng: random generator.

  Returns:
    Indices in ascending order.
  """
  classes, counts = np.unique(labels, return_counts=True)
  shares = num * counts / len(labels)
  quotas = np.floor(shares).astype(np.int64)
  # Assign the rest to the classes with the largest remainders.
  rest = num - int(quotas.sum())
  quotas[np.argsort(quotas - shares, kind='stable')[:rest]] += 1
  picked = [
      rng.permutation(np.flatnonzero(labels == label))[:quota]
      for label, quota in zip(classes, quotas, strict=True)]
  return np.sort(np.concatenate(picked))


def block_of(
    shape: tuple[int, ...], image_size: int, source: str) -> int:
  """The number of pixels along each side of a square that becomes one pixel.

  Args:
    shape: [..., H, W, C] of the images.
    image_size: height and width after it.
    source: description used in errors.

  Returns:
    H / image_size.

  Raises:
    DataError: unless the images are square and `image_size` divides H.
  """
  height, width = shape[-3:-1]
  if height != width or height % image_size:
    raise DataError(
        'image_size must divide the side of square images, got '
        f'{image_size} for images of {height} x {width} ({source}).')
  return height // image_size


def averaged(x: np.ndarray, block: int) -> np.ndarray:
  """Images of means over squares of pixels.

  Args:
    x: images [N, H, W, C], uint8 or floating point.
    block: pixels along each side of a square; it divides H and W.

  Returns:
    [N, H / block, W / block, C] of the same type. Means of uint8 pixels are
    rounded to the nearest whole number, halves to the even one.
  """
  num, height, width, channels = x.shape
  small = np.empty((num, height // block, width // block, channels), x.dtype)
  start = 0
  for chunk in chunks(x):
    means = chunk.reshape(
        len(chunk), height // block, block, width // block, block, channels
    ).mean(axis=(2, 4), dtype=np.float64)
    small[start:start + len(chunk)] = (
        np.rint(means) if x.dtype == np.uint8 else means)
    start += len(chunk)
  return small


def channel_statistics(
    x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation per channel, in units of [0, 1].

  Args:
    x: images [N, H, W, C], uint8 in 0..255 or floating point in [0, 1].

  Returns:
    (mean, std). A constant channel has std 1, so division by it is safe.
  """
  unit = 255.0 if x.dtype == np.uint8 else 1.0
  size = x[..., 0].size
  mean = np.zeros(x.shape[-1])
  for chunk in chunks(x):
    mean += chunk.sum(axis=(0, 1, 2), dtype=np.float64) / size
  variance = np.zeros(x.shape[-1])
  for chunk in chunks(x):
    variance += np.square(chunk - mean).sum(axis=(0, 1, 2)) / size
  std = np.sqrt(variance) / unit
  std = np.where(std > _CONSTANT, std, 1)
  return tuple((mean / unit).tolist()), tuple(std.tolist())
