"""Reads and writes PyTorch checkpoint files without PyTorch.

`torch.save` pickles a dictionary whose tensors point to storages: raw numbers
stored next to the pickle, in a zip archive since PyTorch 1.6 and in one stream
before. Reading never executes code from a file (see `pickle_reader`).

    state_dict = read_state_dict('model_best.pth')
    write_state_dict('copy.pth', state_dict)
    # torch.load('copy.pth', weights_only=True) reads it.
"""

from collections.abc import Callable, Iterable, Mapping
import io
import math
import os
import pathlib
import pickle
from typing import Any, BinaryIO
import zipfile

import numpy as np

from awp_jax.models.torch_exchange import naming, pickle_reader

#: Entries of a training checkpoint that may hold the state dict.
_ENTRIES = ('state_dict', 'model_state_dict', 'model', 'net')

#: Magic number and version of the stream format before PyTorch 1.6.
_STREAM = (0x1950A86A20F9469CFC6C, 1001)

_Fetch = Callable[[pickle_reader.Storage], bytes]


def _open_archive(file: BinaryIO) -> tuple[Any, _Fetch]:
  """Content of a zip file's pickle, and a function that reads a storage."""
  archive = zipfile.ZipFile(file)
  pickles = [name for name in archive.namelist()
             if name.endswith('/data.pkl') and name.count('/') == 1]
  if len(pickles) != 1:
    raise ValueError('it is a zip file without the data.pkl of torch.save.')
  folder = pickles[0].removesuffix('data.pkl')

  def member(name: str) -> bytes:
    info = archive.getinfo(folder + name)
    # torch.save never compresses; a small file could unpack to a huge one.
    if info.compress_type != zipfile.ZIP_STORED:
      raise ValueError(f'its member {info.filename} is compressed.')
    return archive.read(info)

  if f'{folder}byteorder' in archive.namelist():
    order = member('byteorder')
    if order != b'little':
      raise ValueError(f'its numbers are {order!r}-endian.')
  content = pickle_reader.Unpickler(io.BytesIO(member('data.pkl'))).load()
  return content, lambda storage: member(f'data/{storage.key}')


def _open_stream(file: BinaryIO) -> tuple[Any, _Fetch]:
  """As `_open_archive`, for the format before PyTorch 1.6.

  The file has five pickles: magic number, version, machine properties, the
  dictionary, and the keys of the storages. Each storage follows: its number of
  elements in eight bytes, and the elements.
  """
  def load() -> Any:
    return pickle_reader.Unpickler(file).load()

  magic = load()
  if magic != _STREAM[0]:
    raise ValueError(
        'it is a pickle, but not one of torch.save since PyTorch 0.1.10. '
        f'{pickle_reader.REMEDY}')
  version, machine = load(), load()
  if version != _STREAM[1] or not machine['little_endian']:
    raise ValueError(f'its version is {version}, its machine {machine}.')
  unpickler = pickle_reader.Unpickler(file)
  content, keys = unpickler.load(), load()
  storages: dict[str, bytes] = {}
  for key in keys:
    dtype = pickle_reader.STORAGES[unpickler.types[key].name]
    count = file.read(8)
    length = int.from_bytes(count, 'little') * dtype.itemsize
    # Reading allocates first, so check a possibly damaged length before.
    left = os.fstat(file.fileno()).st_size - file.tell()
    if len(count) < 8 or length > left:
      raise ValueError(f'it is truncated in storage {key}.')
    storages[key] = file.read(length)
  return content, lambda storage: storages[storage.key]


def _first(names: Iterable[Any]) -> str:
  """The first few names, for a message."""
  listed = [repr(name) for name in names]
  return ', '.join(listed[:5]) + (', ...' if len(listed) > 5 else '')


def _find_tensors(
    content: Any, key: str | None) -> dict[str, pickle_reader.Tensor]:
  """The dictionary of tensors inside a training checkpoint."""
  if key is not None:
    if not isinstance(content, dict) or key not in content:
      found = content if isinstance(content, dict) else ()
      raise ValueError(f'it has no entry {key!r}, only {_first(found)}.')
    content = content[key]
  # Bounded, because a pickled dictionary may contain itself.
  for _ in range(len(_ENTRIES)):
    inner = [name for name in _ENTRIES
             if isinstance(content, dict)
             and isinstance(content.get(name), dict)]
    if len(inner) > 1:
      raise ValueError(f'select one of its entries by `key`: {_first(inner)}.')
    if inner:
      content = content[inner[0]]
  if not isinstance(content, dict) or not content:
    raise ValueError('it contains no dictionary of tensors.')
  other = [name for name, value in content.items()
           if type(name) is not str
           or not isinstance(value, pickle_reader.Tensor)]
  if other:
    raise ValueError(
        f'these entries are not tensors: {_first(other)}. If one of them is '
        'the state dict, select it by `key`.')
  return content


def read_state_dict(
    path: str | os.PathLike[str], *, key: str | None = None
) -> dict[str, np.ndarray]:
  """Reads the tensors of a file of `torch.save` without executing its code.

  Reads both formats, the zip archive and the stream before PyTorch 1.6. In a
  checkpoint such as {'state_dict': ..., 'epoch': 3} the state dict is the entry
  'state_dict', 'model_state_dict', 'model' or 'net'.

  Args:
    path: the .pt or .pth file.
    key: the entry with the state dict, if it has another name: 'last' or 'best'
      in RobustBench's Kireev2021Effectiveness files.

  Returns:
    Names, without 'module.' and prefixes of other wrappers, -> arrays that own
    their memory: float16, bfloat16, float32, float64, integers or bool.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if the file is damaged, is of another kind, has no state dict,
      or names anything but tensors, dictionaries and plain values, as a whole
      pickled module does. The message has the name.
  """
  path = pathlib.Path(path)
  with path.open('rb') as file:
    head = file.read(4)
    file.seek(0)
    try:
      if head == b'PK\x03\x04':
        content, fetch = _open_archive(file)
      elif head.startswith(pickle.PROTO):
        content, fetch = _open_stream(file)
      else:
        raise ValueError('it is neither a zip file nor a pickle.')
      return naming.plain_names({
          name: pickle_reader.as_array(tensor, fetch(tensor.storage))
          for name, tensor in _find_tensors(content, key).items()})
    except OSError:
      raise
    except ValueError as error:
      raise ValueError(f'cannot read {path}: {error}') from error
    except Exception as error:  # a damaged pickle may raise any exception
      raise ValueError(
          f'cannot read {path}: it is damaged ({error!r}).') from error


def _literal(value: Any) -> bytes:
  """Opcodes that push a string, a number or a tuple of numbers."""
  return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def _global(module: str, name: str) -> bytes:
  """Opcodes that push a global, which need not be importable."""
  return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


_EMPTY_DICT = (
    _global('collections', 'OrderedDict') + pickle.EMPTY_TUPLE + pickle.REDUCE)


def _tensor_opcodes(key: str, value: np.ndarray) -> bytes:
  """Opcodes that push a contiguous tensor with its own storage."""
  names = [name for name, dtype in pickle_reader.STORAGES.items()
           if dtype == value.dtype.newbyteorder('<')]
  if not names:
    raise ValueError(f'cannot write an array of type {value.dtype}.')
  strides = tuple(
      math.prod(value.shape[axis + 1:]) for axis in range(value.ndim))
  storage = b''.join([
      pickle.MARK, _literal('storage'), _global('torch', names[0]),
      _literal(key), _literal('cpu'), _literal(value.size), pickle.TUPLE,
      pickle.BINPERSID])
  return b''.join([
      _global('torch._utils', '_rebuild_tensor_v2'), pickle.MARK, storage,
      _literal(0), _literal(value.shape), _literal(strides), pickle.NEWFALSE,
      _EMPTY_DICT, pickle.TUPLE, pickle.REDUCE])


def write_state_dict(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
  """Writes a file that `torch.load(path, weights_only=True)` reads.

  The same arrays give the same bytes. An existing file is replaced once the new
  one is complete.

  Args:
    path: the file to write.
    state_dict: names -> arrays of the types that `read_state_dict` returns.

  Raises:
    OSError: if the file cannot be written.
    ValueError: if an array has another type.
  """
  path = pathlib.Path(path)
  arrays = [np.asarray(value) for value in state_dict.values()]
  # The standard pickler imports a global to write its name, which would need
  # PyTorch, so the few opcodes are assembled here.
  opcodes = b''.join([
      pickle.PROTO, b'\x02', _EMPTY_DICT, pickle.MARK,
      *(_literal(name) + _tensor_opcodes(str(i), array)
        for i, (name, array) in enumerate(
            zip(state_dict, arrays, strict=True))),
      pickle.SETITEMS, pickle.STOP])
  part = path.with_name(f'{path.name}.part')
  try:
    with zipfile.ZipFile(part, 'w') as archive:

      def put(name: str, content: bytes) -> None:
        # A ZipInfo has a fixed date; a plain name would use the current one.
        archive.writestr(zipfile.ZipInfo(f'archive/{name}'), content)

      put('data.pkl', opcodes)
      put('byteorder', b'little')
      for i, array in enumerate(arrays):
        little = array.astype(array.dtype.newbyteorder('<'), copy=False)
        put(f'data/{i}', little.tobytes())
      put('version', b'3\n')
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
