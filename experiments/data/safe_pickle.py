"""Reads a pickle of NumPy arrays in plain containers, and runs nothing of it.

A pickle may name any function and call it. This unpickler admits the names with
which NumPy 1 and 2 write an array, in every protocol, and gives each a stand-in
of its own: NumPy's functions are never called with what the pickle says. A
pickle that names anything else is refused before the name is looked up.

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

#: Whole numbers, floats and truth values. Objects ('O8') are the gate to code.
_NUMBERS = re.compile(r'[biuf](1|2|4|8)')


class Refused(ValueError):
  """The pickle names something that no array needs."""


class _DType:
  """Stands for a `numpy.dtype` of plain numbers."""

  __slots__ = ('_code', '_order')

  def __init__(self, code: Any, *flags: Any) -> None:
    del flags  # whether to align and to copy
    if type(code) is not str or not _NUMBERS.fullmatch(code):
      raise Refused(
          f'it holds an array of type {code!r:.40}; only those of plain '
          'numbers are read')
    self._code, self._order = code, '='

  def __setstate__(self, state: Any) -> None:
    """Takes the byte order; there is nothing else to plain numbers."""
    _, order, subtype, names, fields, *_ = state
    if order not in ('<', '>', '=', '|') or (subtype, names, fields) != (
        None, None, None):
      raise Refused('it holds an array of compound type')
    self._order = order

  def resolve(self) -> np.dtype:
    """The type itself."""
    return np.dtype(self._order + self._code)


class _Array:
  """Stands for an array, which it views in the pickle's own bytes."""

  __slots__ = ('array',)

  def __init__(self) -> None:
    self.array: np.ndarray | None = None

  def __setstate__(self, state: Any) -> None:
    """Takes what NumPy writes behind an empty array: all that there is."""
    _, shape, dtype, is_fortran, raw = state
    self.array = _view(raw, dtype, shape, 'F' if is_fortran else 'C')


def _view(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
  """The array of these bytes, read-only where they are."""
  if isinstance(raw, str):  # bytes, if it was Python 2 that wrote them
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
  """How protocols 0 to 2 write bytes."""
  if type(text) is not str or encoding not in ('latin1', 'latin-1'):
    raise Refused('it encodes text other than as bytes')
  return text.encode('latin1')


def _empty() -> bytes:
  """How they write no bytes at all."""
  return b''


def _ndarray(*args: Any) -> None:
  raise Refused('it makes an array in a way that NumPy does not write')


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ('numpy', 'ndarray'): _ndarray,  # is named, but not called
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
  """Builds stand-ins, containers and plain values; refuses all else."""

  def find_class(self, module: str, name: str) -> Any:
    """What stands for a global; it is never imported."""
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
    Its value, if that is an array, a plain value, or a dictionary of such. The
    arrays are views of the bytes as they were read, without a copy of them.

  Raises:
    Refused: for a name that no array needs.
    Exception: of many a kind, for what is no pickle or only part of one.
  """
  value = _Unpickler(file, encoding='latin1').load()
  if isinstance(value, dict):
    return {key: _unwrapped(item) for key, item in value.items()}
  return _unwrapped(value)


def _unwrapped(value: Any) -> Any:
  """An array in place of its stand-in."""
  if isinstance(value, Admitted | _DType):
    raise Refused('it holds a function or a type where data belong')
  if not isinstance(value, _Array):
    return value
  if value.array is None:
    raise ValueError('an array lacks its type, shape or bytes')
  return value.array
