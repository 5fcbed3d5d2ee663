"""A safe unpickler for `torch.save`'s dictionaries of tensors.

A pickle may name any function and call it, so a checkpoint can execute code.
This unpickler allows only the few names that a dictionary of tensors needs, and
maps them to records. Any other name raises an error before it is imported.
"""

from collections.abc import Callable
import math
import pickle
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

#: Names of PyTorch's storage types -> types of their numbers, little-endian.
STORAGES: dict[str, np.dtype] = {
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

#: Advice for a rejected file, in error messages.
REMEDY = (
    "If you trust the file, load it with PyTorch and torch.save the model's "
    'state_dict() alone.')


class StorageType(NamedTuple):
  """A `torch.FloatStorage` or one of its siblings."""

  name: str


class Storage(NamedTuple):
  """A reference to the numbers of a tensor."""

  type: StorageType
  key: str
  numel: int


class Tensor(NamedTuple):
  """A view of a storage; offset and strides count elements."""

  storage: Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _Dict(dict):
  """Replaces OrderedDict. Attributes set on it (`_metadata`) are dropped."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    """Ignores attributes that a pickle sets on the dictionary."""


class Admitted:
  """Wraps a function so that a pickle can only call it.

  A pickle can also set attributes on a global, so it never gets one of our
  functions or classes itself.
  """

  __slots__ = ('_make',)

  def __init__(self, make: Callable[..., Any]) -> None:
    self._make = make

  def __call__(self, *args: Any) -> Any:
    """Calls the wrapped function."""
    return self._make(*args)

  def __setstate__(self, state: Any) -> None:
    """Raises ValueError."""
    raise ValueError('the pickle sets attributes on a global.')


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any,
    hooks: Any, metadata: Any = None) -> Tensor:
  """Records a tensor; takes the arguments of `_rebuild_tensor_v2`."""
  del requires_grad, hooks
  numbers = (offset, *size, *stride)
  if (not isinstance(storage, Storage) or metadata or len(size) != len(stride)
      or any(type(n) is not int or n < 0 for n in numbers)):
    raise ValueError(f'not a plain tensor: size {size!r}, stride {stride!r}.')
  return Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
  """The tensor inside a parameter."""
  del requires_grad, hooks
  return data


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ('collections', 'OrderedDict'): _Dict,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _parameter,
}


class Unpickler(pickle.Unpickler):
  """Builds records, dictionaries and plain values; rejects all else.

  Attributes:
    types: the types of the storages seen, by key.
  """

  def __init__(self, file: BinaryIO) -> None:
    super().__init__(file, encoding='utf-8')
    self.types: dict[str, StorageType] = {}

  def find_class(self, module: str, name: str) -> Any:
    """The replacement of a global, which is never imported."""
    if module == 'torch' and name in STORAGES:
      return StorageType(name)
    if (module, name) not in _GLOBALS:
      raise ValueError(
          f'it names {module}.{name}, which no dictionary of plain tensors '
          f'needs; none of its code was executed. {REMEDY}')
    return Admitted(_GLOBALS[module, name])

  def persistent_load(self, pid: Any) -> Storage:
    """Records a storage from (tag, type, key, device, elements[, view]).

    Only files from before PyTorch 0.4 have views of storages.
    """
    tag, kind, key, _, numel, *view = pid
    if (tag != 'storage' or not isinstance(kind, StorageType)
        or type(key) is not str or type(numel) is not int or numel < 0
        or any(view)):
      raise ValueError(f'unsupported storage: {pid!r}.')
    self.types.setdefault(key, kind)
    return Storage(kind, key, numel)


def as_array(tensor: Tensor, raw: bytes) -> np.ndarray:
  """The array of a record, in its own memory.

  Args:
    tensor: the record.
    raw: all bytes of its storage.

  Returns:
    A contiguous array.

  Raises:
    ValueError: if the storage differs in size from the pickle's record, or the
      tensor exceeds it.
  """
  storage, offset, size, stride = tensor
  dtype = STORAGES[storage.type.name]
  if len(raw) != storage.numel * dtype.itemsize:
    raise ValueError(
        f'storage {storage.key} has {len(raw)} bytes, not {storage.numel} '
        f'numbers of type {dtype}.')
  count = math.prod(size)
  if not count:
    return np.zeros(size, dtype)
  last = offset + sum(
      (n - 1) * step for n, step in zip(size, stride, strict=True))
  # `as_strided` does not check bounds. More elements than the storage has mean
  # a broadcast view, which could be of any size.
  if last >= storage.numel or count > storage.numel:
    raise ValueError(
        f'a tensor of size {size}, stride {stride} and offset {offset} '
        f'overruns its storage of {storage.numel} numbers.')
  view = np.lib.stride_tricks.as_strided(
      np.frombuffer(raw, dtype)[offset:], size,
      [step * dtype.itemsize for step in stride])
  return view.astype(dtype.newbyteorder('='), order='C')
