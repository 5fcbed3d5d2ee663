"""Data sets which TFDS has prepared, read without TensorFlow.

`tfds.data_source` reads the records; Pillow decodes the images. That takes some
15 s for the 60,000 images of CIFAR, nearly all of it in Python code per image
(threads make it slower), so the decoded arrays are kept in a cache folder:
`$AWP_CACHE_DIR`, or `~/.cache/awp_jax`. An empty `AWP_CACHE_DIR` keeps none.
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

_BATCH = 500  # records read at a time
_CACHE_FORMAT = 1  # part of the names in the cache; raise it to start afresh

_log = logging.getLogger(__name__)


def places(data_dir: str | None) -> list[pathlib.Path]:
  """Folders that may hold TFDS data, in the order in which they are tried.

  Args:
    data_dir: the folder asked for, or None.

  Returns:
    `data_dir`, `$TFDS_DATA_DIR` and `~/tensorflow_datasets`: those that are
    set, each once.
  """
  wanted = (data_dir, os.environ.get('TFDS_DATA_DIR'), '~/tensorflow_datasets')
  folders = [pathlib.Path(folder).expanduser() for folder in wanted if folder]
  return list(dict.fromkeys(folders))


def find(name: str, place: pathlib.Path) -> pathlib.Path | None:
  """The newest prepared version of a data set in one place, or None.

  Args:
    name: TFDS's name of the data set.
    place: a folder laid out by TFDS, `<place>/<name>/<version>/`.

  Returns:
    The folder of the version.
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
    folder: `<place>/<name>/<version>`, as `find` returns it.
    progress: whether to show a progress bar while images are decoded.

  Returns:
    Images and labels, as uint8 and int32.

  Raises:
    DataError: when TFDS cannot read it: a format without random access (such
      as tfrecord, which takes TensorFlow), missing shards, broken records.
  """
  cached = _cache_file(folder)
  arrays = _load_cached(cached)
  if arrays is not None:
    return arrays
  try:
    arrays = Arrays(
        *_decode(folder, 'train', progress), *_decode(folder, 'test', progress))
  # Many libraries meet here, and each has errors of its own.
  except Exception as error:
    raise DataError(f'{folder} cannot be read ({one_line(error)})') from error
  _save_cached(cached, arrays)
  return arrays


def _decode(
    folder: pathlib.Path, split: str,
    progress: bool) -> tuple[np.ndarray, np.ndarray]:
  import tensorflow_datasets as tfds  # slow to import: only where needed
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
  """Where the decoded arrays belong: named by what the folder holds now."""
  root = os.environ.get('AWP_CACHE_DIR', '~/.cache/awp_jax')
  if not root:
    return None
  key = [str(folder.resolve()), str(_CACHE_FORMAT)]
  for file in sorted(folder.iterdir()):
    stat = file.stat()
    key.append(f'{file.name} {stat.st_size} {stat.st_mtime_ns}')
  digest = hashlib.sha256('\n'.join(key).encode()).hexdigest()[:16]
  name = f'{folder.parent.name}-{folder.name}-{digest}.npz'
  return pathlib.Path(root).expanduser() / name


def _load_cached(file: pathlib.Path | None) -> Arrays | None:
  if file is None or not file.exists():
    return None
  try:
    with file.open('rb') as opened, np.load(opened) as stored:
      return Arrays(**{field: stored[field] for field in Arrays._fields})
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None  # a damaged cache is decoded again, and replaced


def _save_cached(file: pathlib.Path | None, arrays: Arrays) -> None:
  """Writes beside the file and renames: a reader never sees half of it."""
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
    _log.warning('decoded images are not kept in %s: %s', file.parent, error)
