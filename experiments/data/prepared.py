"""Reads data sets prepared by TFDS, without TensorFlow.

`tfds.data_source` reads the records and Pillow decodes the images. This takes
about 15 s for the 60,000 images of CIFAR, mostly in Python code per image
(threads are slower), so the decoded arrays are cached in `$AWP_CACHE_DIR`, by
default `~/.cache/awp_jax`. An empty `AWP_CACHE_DIR` disables the cache.
"""

from collections.abc import Sequence
import hashlib
import io
import logging
import os
import pathlib
import tempfile
from typing import Any
import zipfile

import numpy as np

from experiments.data.arrays import Arrays, DataError, one_line
from experiments.util import paths

_BATCH = 500  # records per read
_CACHE_FORMAT = 1  # part of cache file names; increment to invalidate

_log = logging.getLogger(__name__)


def places(data_dir: str | None) -> list[pathlib.Path]:
  """Folders that may contain TFDS data, in search order.

  Args:
    data_dir: the requested folder, or None.

  Returns:
    `data_dir`, `$TFDS_DATA_DIR` and `~/tensorflow_datasets`, without unset ones
    and duplicates.
  """
  names = (data_dir, os.environ.get('TFDS_DATA_DIR'), '~/tensorflow_datasets')
  folders = [pathlib.Path(name).expanduser() for name in names if name]
  return list(dict.fromkeys(folders))


def find(name: str, place: pathlib.Path) -> pathlib.Path | None:
  """Finds the newest prepared version of a data set in one place.

  Args:
    name: TFDS's name of the data set.
    place: a TFDS folder, `<place>/<name>/<version>/`.

  Returns:
    The folder of the version, or None.
  """
  def version(folder: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split('.'))

  found = [
      info.parent for info in place.glob(f'{name}/*/dataset_info.json')
      if info.parent.name.replace('.', '').isdigit()]
  return max(found, key=version, default=None)


def read(folder: pathlib.Path, progress: bool = True) -> Arrays:
  """Reads both splits of a prepared data set.

  Args:
    folder: `<place>/<name>/<version>`, from `find`.
    progress: whether to show a progress bar while decoding.

  Returns:
    Images and labels, as uint8 and int32.

  Raises:
    DataError: if TFDS cannot read it: a format without random access (such as
      tfrecord, which requires TensorFlow), missing shards, damaged records.
  """
  cached = _cache_file(folder)
  arrays = _load_cached(cached)
  if arrays is not None:
    return arrays
  try:
    arrays = Arrays(
        *_decode(folder, 'train', progress), *_decode(folder, 'test', progress))
  # Several libraries are involved, each with its own errors.
  except Exception as error:
    raise DataError(f'{folder} cannot be read ({one_line(error)})') from error
  _save_cached(cached, arrays)
  return arrays


def _decode(
    folder: pathlib.Path, split: str,
    progress: bool) -> tuple[np.ndarray, np.ndarray]:
  import tensorflow_datasets as tfds  # lazy: slow to import
  from tqdm.auto import tqdm

  source: Any = tfds.data_source(
      f'{folder.parent.name}:{folder.name}', split=split,
      data_dir=folder.parent.parent, download=False,
      decoders={'image': tfds.decode.SkipDecoding()})
  labels = np.empty(len(source), np.int32)
  images = np.empty(0, np.uint8)
  with tqdm(total=len(source), desc=f'Decoding {folder.parent.name} {split}',
            unit=' images', mininterval=1, disable=not progress) as bar:
    for start in range(0, len(source), _BATCH):
      keys = list(range(start, min(start + _BATCH, len(source))))
      examples = source.__getitems__(keys)
      pixels = _pixels([example['image'] for example in examples])
      if start == 0:
        images = np.empty((len(source), *pixels.shape[1:]), np.uint8)
      images[start:start + len(keys)] = pixels
      labels[start:start + len(keys)] = [e['label'] for e in examples]
      bar.update(len(keys))
  return images, labels


def _pixels(encoded: Sequence[bytes]) -> np.ndarray:
  from PIL import Image
  return np.stack([np.asarray(Image.open(io.BytesIO(e))) for e in encoded])


def _cache_file(folder: pathlib.Path) -> pathlib.Path | None:
  """Path of the cached arrays, derived from the contents of the folder."""
  root = paths.caches()
  if root is None:
    return None
  key = [str(folder.resolve()), str(_CACHE_FORMAT)]
  for file in sorted(folder.iterdir()):
    stat = file.stat()
    key.append(f'{file.name} {stat.st_size} {stat.st_mtime_ns}')
  digest = hashlib.sha256('\n'.join(key).encode()).hexdigest()[:16]
  name = f'{folder.parent.name}-{folder.name}-{digest}.npz'
  return root / name


def _load_cached(file: pathlib.Path | None) -> Arrays | None:
  if file is None or not file.exists():
    return None
  try:
    with file.open('rb') as opened, np.load(opened) as stored:
      return Arrays(**{field: stored[field] for field in Arrays._fields})
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None  # decode again and replace the damaged cache


def _save_cached(file: pathlib.Path | None, arrays: Arrays) -> None:
  """Writes a temporary file and renames it, so readers see no partial one."""
  if file is None:
    return
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix='incomplete-', dir=file.parent) as scratch:
      whole = pathlib.Path(scratch) / file.name
      np.savez(whole, **arrays._asdict())
      whole.replace(file)
  except OSError as error:
    _log.warning('decoded images are not cached in %s: %s', file.parent, error)
