"""PyTorch's checkpoint files, read and written without PyTorch.

`torch.save` pickles a dictionary whose tensors point to storages: raw numbers
that lie beside the pickle, in a zip archive since PyTorch 1.6 and in one stream
before. A pickle may name any function and call it, which is how a checkpoint
runs code. The reader here admits the handful of names that a dictionary of
tensors needs, and these only record what the pickle said; a pickle that names
anything else is refused before the name is looked up.

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
import re
from typing import Any, BinaryIO, NamedTuple
import zipfile

import jax.numpy as jnp
import numpy as np

#: Names of storage types -> types of their numbers, little-endian.
_STORAGES: dict[str, np.dtype] = {
    'FloatStorage': np.dtype('<f4'),
    'DoubleStorage': np.dtype('<f8'),
    'HalfStorage': np.dtype('<f2'),
    'BFloat16Storage': jnp.dtype('bfloat16'),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'),
    'CharStorage': np.dtype('i1'),
    'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
}

#: Entries of a training script's checkpoint that may hold the state dict.
_ENTRIES = ('state_dict', 'model_state_dict', 'model', 'net')

#: What wrappers put before a name: DataParallel, torch.compile, RobustBench's
#: and other modules around a network, nn.Sequential(normalisation, network).
_WRAPPERS = re.compile(r'((module|_orig_mod|model|net|1)\.)+')

#: Opens the stream that `torch.save` wrote before PyTorch 1.6.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001

_REMEDY = (
    "If you trust the file, load it with PyTorch and torch.save the model's "
    'state_dict() alone.')


class _StorageType(NamedTuple):
  """A `torch.FloatStorage` or one of its siblings."""

  name: str


class _Storage(NamedTuple):
  """Points to the numbers of a tensor."""

  type: _StorageType
  key: str
  numel: int


class _Tensor(NamedTuple):
  """A view of a storage; offset and strides count elements."""

  storage: _Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _Dict(dict):
  """Stands for an OrderedDict. Attributes set on it (`_metadata`) are lost."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    """Takes what a pickle sets on the dictionary, and forgets it."""


class _Admitted:
  """A callable global as a pickle sees it: to be called and nothing else.

  A pickle can also set attributes on what it has named, so it never gets hold
  of one of our functions or classes themselves.
  """

  __slots__ = ('_make',)

  def __init__(self, make: Callable[..., Any]) -> None:
    self._make = make

  def __call__(self, *args: Any) -> Any:
    return self._make(*args)

  def __setstate__(self, state: Any) -> None:
    """Refuses."""
    raise ValueError('the pickle sets attributes on a global.')


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any,
    hooks: Any, metadata: Any = None) -> _Tensor:
  """Records a tensor, in the arguments of `torch._utils._rebuild_tensor_v2`."""
  del requires_grad, hooks
  numbers = (offset, *size, *stride)
  if (not isinstance(storage, _Storage) or metadata or len(size) != len(stride)
      or any(type(n) is not int or n < 0 for n in numbers)):
    raise ValueError(f'no plain tensor: size {size!r}, stride {stride!r}.')
  return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
  """The tensor inside of a parameter."""
  del requires_grad, hooks
  return data


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ('collections', 'OrderedDict'): _Dict,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _parameter,
}


class _Unpickler(pickle.Unpickler):
  """Builds records, dictionaries and plain values; refuses all else."""

  def find_class(self, module: str, name: str) -> Any:
    """What stands for a global; it is never imported."""
    if module == 'torch' and name in _STORAGES:
      return _StorageType(name)
    if (module, name) not in _GLOBALS:
      raise ValueError(
          f'it names {module}.{name}, which no dictionary of plain tensors '
          f'needs; nothing of it was run. {_REMEDY}')
    return _Admitted(_GLOBALS[module, name])

  def persistent_load(self, pid: Any) -> _Storage:
    """Records a storage: a tag, its type, key, device, elements, maybe a view.

    Only files of before PyTorch 0.4 have views of storages.
    """
    tag, kind, key, _, numel, *view = pid
    if (tag != 'storage' or not isinstance(kind, _StorageType)
        or type(key) is not str or type(numel) is not int or numel < 0
        or any(view)):
      raise ValueError(f'no storage that is known here: {pid!r}.')
    return _Storage(kind, key, numel)


def _array(tensor: _Tensor, raw: bytes) -> np.ndarray:
  """The tensor as an array of its own, of a storage's bytes."""
  storage, offset, size, stride = tensor
  dtype = _STORAGES[storage.type.name]
  if len(raw) != storage.numel * dtype.itemsize:
    raise ValueError(
        f'storage {storage.key} has {len(raw)} bytes, not {storage.numel} '
        f'numbers of type {dtype}.')
  count = math.prod(size)
  if not count:
    return np.zeros(size, dtype)
  last = offset + sum(
      (n - 1) * step for n, step in zip(size, stride, strict=True))
  # Views are made below without a check of their own. More elements than the
  # storage has are a broadcast view, which could be of any size.
  if last >= storage.numel or count > storage.numel:
    raise ValueError(
        f'a tensor of size {size}, stride {stride} and offset {offset} '
        f'overruns its storage of {storage.numel} numbers.')
  view = np.lib.stride_tricks.as_strided(
      np.frombuffer(raw, dtype)[offset:], size,
      [step * dtype.itemsize for step in stride])
  return view.astype(dtype.newbyteorder('='), order='C')


_Fetch = Callable[[_Storage], bytes]


def _open_archive(file: BinaryIO) -> tuple[Any, _Fetch]:
  """The records of a zip file, and what fetches a storage's bytes."""
  archive = zipfile.ZipFile(file)
  pickles = [name for name in archive.namelist()
             if name.endswith('/data.pkl') and name.count('/') == 1]
  if len(pickles) != 1:
    raise ValueError('it is a zip file, but not one of torch.save: no data.pkl.')
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
      raise ValueError(f'its numbers are {order.decode()}-endian.')
  return (_Unpickler(io.BytesIO(member('data.pkl'))).load(),
          lambda storage: member(f'data/{storage.key}'))


def _open_stream(file: BinaryIO) -> tuple[Any, _Fetch]:
  """As `_open_archive`, of a file of before PyTorch 1.6.

  It is five pickles (a magic number, the protocol, facts of the machine, the
  dictionary, the keys of the storages), then each storage: its number of
  elements in eight bytes, and the elements.
  """
  try:
    magic = _Unpickler(file).load()
  except (pickle.UnpicklingError, EOFError, IndexError, KeyError):
    magic = None
  if magic != _STREAM_MAGIC:
    raise ValueError(
        'it is neither a zip file nor a stream of torch.save. Files of before '
        f'PyTorch 0.1.10 cannot be read here. {_REMEDY}')
  protocol, machine = _Unpickler(file).load(), _Unpickler(file).load()
  if protocol != _STREAM_PROTOCOL or not machine['little_endian']:
    raise ValueError(f'its protocol is {protocol}, its machine {machine}.')
  types: dict[str, _StorageType] = {}

  class Unpickler(_Unpickler):

    def persistent_load(self, pid: Any) -> _Storage:
      """Also keeps the type of each storage, which its bytes do not tell."""
      storage = super().persistent_load(pid)
      types[storage.key] = storage.type
      return storage

  tree, keys = Unpickler(file).load(), _Unpickler(file).load()
  storages: dict[str, bytes] = {}
  for key in keys:
    numel = int.from_bytes(file.read(8), 'little')
    length = numel * _STORAGES[types[key].name].itemsize
    # Reading allocates first, so that a damaged length must not get there.
    if length > os.fstat(file.fileno()).st_size - file.tell():
      raise ValueError(f'it is truncated in storage {key}.')
    storages[key] = file.read(length)
  return tree, lambda storage: storages[storage.key]


def _first(names: Iterable[Any]) -> str:
  """The first few names, for a message."""
  listed = [repr(name) for name in names]
  return ', '.join(listed[:5]) + (', ...' if len(listed) > 5 else '')


def _unwrapped(tree: Any, key: str | None) -> dict[str, _Tensor]:
  """The dictionary of tensors within what a training script saved."""
  if key is not None:
    if not isinstance(tree, dict) or key not in tree:
      found = _first(tree) if isinstance(tree, dict) else type(tree).__name__
      raise ValueError(f'it has no entry {key!r}: {found}.')
    tree = tree[key]
  # Bounded, as a pickle may hold a dictionary that holds itself.
  for _ in range(len(_ENTRIES)):
    inner = [name for name in _ENTRIES
             if isinstance(tree, dict) and isinstance(tree.get(name), dict)]
    if len(inner) > 1:
      raise ValueError(f'choose one of its entries by `key`: {_first(inner)}.')
    if not inner:
      break
    tree = tree[inner[0]]
  if not isinstance(tree, dict) or not tree:
    raise ValueError('it holds no dictionary of tensors.')
  other = [name for name, value in tree.items()
           if type(name) is not str or not isinstance(value, _Tensor)]
  if other:
    raise ValueError(
        f'these entries are no tensors: {_first(other)}. If one of them holds '
        'the state dict, choose it by `key`.')
  return tree


def plain_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The same entries without what wrappers put before their names.

  Args:
    state_dict: names like 'module.conv1.weight', 'model.conv1.weight' (and
      'conv1.weight', which stays).

  Returns:
    A dictionary in the same order.

  Raises:
    ValueError: if two names become the same.
  """
  plain: dict[str, Any] = {}
  for name, value in state_dict.items():
    short = _WRAPPERS.sub('', name, count=1) if _WRAPPERS.match(name) else name
    if short in plain:
      raise ValueError(f'the state dict has two entries for {short!r}.')
    plain[short] = value
  return plain


def read_state_dict(
    path: str | os.PathLike[str], *, key: str | None = None
) -> dict[str, np.ndarray]:
  """Reads the tensors of a file of `torch.save`, and runs nothing of it.

  Both formats are read, the zip archive and the stream of before PyTorch 1.6.
  A dictionary around the state dict is looked through for 'state_dict',
  'model_state_dict', 'model' and 'net', as in {'state_dict': ..., 'epoch': 3}.

  Args:
    path: the .pt or .pth file.
    key: the entry that holds the state dict, where it has another name: 'last'
      or 'best' in RobustBench's Kireev2021Effectiveness files.

  Returns:
    Names, without 'module.' and other wrappers' prefixes, -> arrays on their
    own memory: float16, bfloat16, float32, float64, integers or bool.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if it is damaged, is no such file, holds no state dict, or names
      anything but tensors, dictionaries and plain values; the message has the
      name. A whole pickled module is of that kind.
  """
  path = pathlib.Path(path)
  with path.open('rb') as file:
    is_archive = file.read(4) == b'PK\x03\x04'
    file.seek(0)
    try:
      tree, fetch = (_open_archive if is_archive else _open_stream)(file)
      return plain_names({
          name: _array(tensor, fetch(tensor.storage))
          for name, tensor in _unwrapped(tree, key).items()})
    except OSError:
      raise
    except ValueError as error:
      raise ValueError(f'cannot read {path}: {error}') from error
    except Exception as error:  # a damaged pickle may raise anything
      raise ValueError(f'cannot read {path}: it is damaged ({error!r}).'
                       ) from error


def _literal(value: Any) -> bytes:
  """Opcodes that push a string, a number or a tuple of numbers."""
  return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def _global(module: str, name: str) -> bytes:
  """Opcodes that push a global, which need not exist here."""
  return pickle.GLOBAL + f'{module}\n{name}\n'.encode()


_EMPTY_DICT = (
    _global('collections', 'OrderedDict') + pickle.EMPTY_TUPLE + pickle.REDUCE)


def _tensor_opcodes(key: str, value: np.ndarray) -> bytes:
  """Opcodes that push a contiguous tensor with its own storage."""
  for name, dtype in _STORAGES.items():
    if dtype == value.dtype:
      break
  else:
    raise ValueError(f'cannot write an array of type {value.dtype}.')
  strides = tuple(
      math.prod(value.shape[axis + 1:]) for axis in range(value.ndim))
  storage = b''.join([
      pickle.MARK, _literal('storage'), _global('torch', name), _literal(key),
      _literal('cpu'), _literal(value.size), pickle.TUPLE, pickle.BINPERSID])
  return b''.join([
      _global('torch._utils', '_rebuild_tensor_v2'), pickle.MARK, storage,
      _literal(0), _literal(value.shape), _literal(strides), pickle.NEWFALSE,
      _EMPTY_DICT, pickle.TUPLE, pickle.REDUCE])


def write_state_dict(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
  """Writes a file that `torch.load(path, weights_only=True)` reads.

  The same arrays give the same bytes. A file that stood there before is
  replaced once the new one is complete.

  Args:
    path: where to.
    state_dict: names -> arrays of the types that `read_state_dict` returns.

  Raises:
    OSError: if the file cannot be written.
    ValueError: if an array has another type.
  """
  path = pathlib.Path(path)
  arrays = [np.asarray(value) for value in state_dict.values()]
  # The standard pickler imports a global to write its name, so that it would
  # need PyTorch; the few opcodes are put together here instead.
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
        # Through ZipInfo, as a name alone would stamp the time into the file.
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
