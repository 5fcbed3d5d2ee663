"""The official files of CIFAR-10, CIFAR-100 and SVHN, and their readers.

An `Archive` holds the URLs and the layout of the files. `read` converts local
files to arrays, with NumPy (CIFAR) or SciPy (SVHN).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import os
import pathlib
import tarfile
from typing import Literal, NamedTuple

import numpy as np

from experiments.data.arrays import Arrays, DataError, one_line


class Checksum(NamedTuple):
  """Size and digest of a complete file.

  Attributes:
    size: in bytes.
    sha256: in hexadecimal.
  """

  size: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Archive:
  """The official files of a data set.

  Attributes:
    name: TFDS's name of the data set.
    urls: URLs of the files.
    layout: 'cifar': one tar archive; each file in it is a sequence of records
      of `label_bytes` bytes (the last one is the label) and 3x32x32 bytes of
      pixels. 'svhn': one .mat file each for training and test; label 10 is
      digit 0.
    train_files: base names of the files with training images.
    test_files: base names of the files with test images.
    num_train: official number of training images.
    num_test: official number of test images.
    label_bytes: see `layout`.
    checksums: checksums by URL; None uses those registered in TFDS.
  """

  name: str
  urls: tuple[str, ...]
  layout: Literal['cifar', 'svhn']
  train_files: tuple[str, ...]
  test_files: tuple[str, ...]
  num_train: int
  num_test: int
  label_bytes: int = 1
  checksums: Mapping[str, Checksum] | None = None

  def checksum(self, url: str) -> Checksum:
    """The expected size and SHA-256 of the file at `url`."""
    if self.checksums is not None:
      return self.checksums[url]
    import tensorflow_datasets as tfds  # lazy: slow to import
    info = tfds.builder_cls(self.name).url_infos[url]
    return Checksum(int(info.size), info.checksum)


_TORONTO = 'https://www.cs.toronto.edu/~kriz/'
_STANFORD = 'http://ufldl.stanford.edu/housenumbers/'

CIFAR10 = Archive(
    'cifar10', (f'{_TORONTO}cifar-10-binary.tar.gz',), 'cifar',
    train_files=tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
    test_files=('test_batch.bin',), num_train=50_000, num_test=10_000)
CIFAR100 = Archive(
    'cifar100', (f'{_TORONTO}cifar-100-binary.tar.gz',), 'cifar',
    train_files=('train.bin',), test_files=('test.bin',),
    num_train=50_000, num_test=10_000, label_bytes=2)
SVHN = Archive(
    'svhn_cropped',
    (f'{_STANFORD}train_32x32.mat', f'{_STANFORD}test_32x32.mat'), 'svhn',
    train_files=('train_32x32.mat',), test_files=('test_32x32.mat',),
    num_train=73_257, num_test=26_032)


def read(archive: Archive, paths: Sequence[pathlib.Path]) -> Arrays:
  """Reads a data set from its official files.

  Args:
    archive: the data set.
    paths: its files, in the order of its URLs.

  Returns:
    Images as uint8 and labels as integers.

  Raises:
    DataError: if a file is unreadable.
  """
  reader = _read_cifar if archive.layout == 'cifar' else _read_svhn
  try:
    return reader(archive, paths)
  # Each layer (tar, gzip, SciPy) raises its own errors for a damaged file.
  except Exception as error:
    named = ', '.join(map(str, paths))
    raise DataError(
        f'{named} cannot be read ({one_line(error)}): delete it '
        'and run again') from error


def _read_cifar(archive: Archive, paths: Sequence[pathlib.Path]) -> Arrays:
  """Reads the binary version of CIFAR from its tar archive.

  Args:
    archive: a data set of layout 'cifar'.
    paths: the path of the archive.

  Returns:
    Images [N, 32, 32, 3] and labels [N], both uint8, in the official order.

  Raises:
    ValueError: if a file is missing or is not a whole number of records.
  """
  found: dict[str, bytes] = {}
  with tarfile.open(paths[0], 'r:gz') as tar:
    for member in tar:
      content = tar.extractfile(member)
      if content is not None:
        found[os.path.basename(member.name)] = content.read()
  length = archive.label_bytes + 3 * 32 * 32

  def records(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for name in names:
      if name not in found or len(found[name]) % length:
        raise ValueError(
            f'{name} is not in it as a whole number of {length}-byte records')
      parts.append(np.frombuffer(found[name], np.uint8).reshape(-1, length))
    rows = np.concatenate(parts)
    pixels = rows[:, archive.label_bytes:].reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    return images, rows[:, archive.label_bytes - 1].copy()

  return Arrays(*records(archive.train_files), *records(archive.test_files))


def _read_svhn(archive: Archive, paths: Sequence[pathlib.Path]) -> Arrays:
  """Reads the two MATLAB files of SVHN's cropped digits.

  Args:
    archive: a data set of layout 'svhn'.
    paths: training file, test file.

  Returns:
    Images [N, 32, 32, 3] as uint8 and labels [N] in 0..9. The files use label
    10 for digit 0.

  Raises:
    KeyError: if `X` or `y` is missing from a file.
    ValueError: if a file is not in MATLAB's format.
  """
  from scipy.io import loadmat

  def split(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    content = loadmat(io.BytesIO(path.read_bytes()))
    images = np.ascontiguousarray(content['X'].transpose(3, 0, 1, 2))
    return images, content['y'].reshape(-1).astype(np.int64) % 10

  return Arrays(*split(paths[0]), *split(paths[1]))
