"""Reads a pickle of NumPy arrays in plain containers without executing it.

A pickle can name and call any function. This unpickler accepts only the names
that NumPy 1 and 2 write for an array, in every protocol, and maps each to a
stand-in: NumPy's functions are never called with arguments from the pickle. A
pickle with any other name is refused before the name is resolved.

  >>> import io
  >>> load(io.BytesIO(pickle.dumps({'label': np.arange(3)})))
  {'label': array([0, 1, 2])}
"""

from collections.abc import Callable
import math
import pickle
import re
from typing import Any, BinaryIO

import numpy as np

from awp_jax.models.torch_exchange.pickle_reader import Admitted

#: Integers, floats and bools. Objects ('O8') could execute code.
_NUMBERS = re.compile(r'[biuf](1|2|4|8)')


class Refused(ValueError):
  """The pickle contains more than plain arrays."""


class _DType:
  """Stand-in for a `numpy.dtype` of plain numbers."""

  __slots__ = ('_code', '_order')

  def __init__(self, code: Any, *flags: Any) -> None:
    del flags  # align, copy
    if type(code) is not str or not _NUMBERS.fullmatch(code):
      raise Refused(
          f'it holds an array of type {code!r:.40}; only those of plain '
          'numbers are read')
    self._code, self._order = code, '='

  def __setstate__(self, state: Any) -> None:
    """Sets the byte order, the only state of a dtype of plain numbers."""
    _, order, subtype, names, fields, *_ = state
    if order not in ('<', '>', '=', '|') or (subtype, names, fields) != (
        None, None, None):
      raise Refused('it holds an array of compound type')
    self._order = order

  def resolve(self) -> np.dtype:
    """The dtype."""
    return np.dtype(self._order + self._code)


class _Array:
  """Stand-in for an array, a view of the bytes in the pickle."""

  __slots__ = ('array',)

  def __init__(self) -> None:
    self.array: np.ndarray | None = None

  def __setstate__(self, state: Any) -> None:
    """Sets the contents, which NumPy writes after an empty array."""
    _, shape, dtype, is_fortran, raw = state
    self.array = _view(raw, dtype, shape, 'F' if is_fortran else 'C')


def _view(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
  """An array view of the bytes, read-only if they are."""
  if isinstance(raw, str):  # bytes written by Python 2
    raw = raw.encode('latin1')
  if (not isinstance(dtype, _DType) or type(shape) is not tuple
      or not isinstance(raw, bytes | bytearray)
      or any(type(n) is not int or n < 0 for n in shape)):
    raise ValueError('an array lacks its type, shape or bytes')
  kind = dtype.resolve()
  if len(raw) != math.prod(shape) * kind.itemsize:
    raise ValueError(
        f'an array of shape {shape} and type {kind} has {len(raw)} bytes')
  return np.frombuffer(raw, kind).reshape(
      shape, order='F' if order == 'F' else 'C')


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _Array:
  del subtype, shape, code  # always an empty array
  return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
  found = _Array()
  found.array = _view(raw, dtype, shape, order)
  return found


def _scalar(dtype: Any, raw: Any) -> Any:
  return _view(raw, dtype, (), 'C').item()


def _encode(text: Any, encoding: Any = None) -> bytes:
  """Encodes bytes as protocols 0 to 2 write them."""
  if type(text) is not str or encoding not in ('latin1', 'latin-1'):
    raise Refused('it encodes text other than as bytes')
  return text.encode('latin1')


def _empty() -> bytes:
  """Empty bytes as protocols 0 to 2 write them."""
  return b''


def _ndarray(*args: Any) -> None:
  raise Refused('it makes an array in a way that NumPy does not write')


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ('numpy', 'ndarray'): _ndarray,  # named, but not called
    ('numpy', 'dtype'): _DType,
    ('_codecs', 'encode'): _encode,
    ('__builtin__', 'bytes'): _empty,
    **{(f'numpy.{core}.{module}', name): stand_in
       for core in ('core', '_core')
       for module, name, stand_in in (
           ('multiarray', '_reconstruct', _reconstruct),
           ('multiarray', 'scalar', _scalar),
           ('numeric', '_frombuffer', _frombuffer))},
}


class _Unpickler(pickle.Unpickler):
  """Builds stand-ins, containers and plain values; refuses anything else."""

  def find_class(self, module: str, name: str) -> Any:
    """Returns the stand-in of a global; never imports it."""
    if (module, name) not in _GLOBALS:
      raise Refused(
          f'it names {f"{module}.{name}"!r:.80}, which no array needs; nothing '
          'of it was run')
    return Admitted(_GLOBALS[module, name])


def load(file: BinaryIO) -> Any:
  """Reads a pickle.

  Args:
    file: open for reading bytes, at the start of the pickle.

  Returns:
    An array, a plain value, or a dictionary of these. The arrays are views of
    the bytes that were read, without a copy.

  Raises:
    Refused: for a name that no array needs.
    Exception: of various types, for a damaged pickle or another file.
  """
  value = _Unpickler(file, encoding='latin1').load()
  if isinstance(value, dict):
    return {key: _unwrapped(item) for key, item in value.items()}
  return _unwrapped(value)


def _unwrapped(value: Any) -> Any:
  """Replaces a stand-in by its array."""
  if isinstance(value, Admitted | _DType):
    raise Refused('it holds a function or a type where data belong')
  if not isinstance(value, _Array):
    return value
  if value.array is None:
    raise ValueError('an array lacks its type, shape or bytes')
  return value.array
