"""Argument checks. Errors show the value and the allowed range."""

from collections.abc import Iterable
import difflib
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

#: The largest count: step numbers are int32 on devices.
LARGEST_COUNT = 2**31 - 1


def _is_finite(value: Any) -> bool:
  try:
    return math.isfinite(value)
  except TypeError:
    return False
  except OverflowError:  # an integer beyond float64
    return True


def _in_float32(name: str, value: Any) -> None:
  """Raises ValueError for a number that devices replace by 0 or infinity."""
  if getattr(jax.config, 'jax_enable_x64', False):
    return
  smallest, largest = jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max
  if value > float(largest) or 0 < value < float(smallest):
    raise ValueError(
        f'{name} must be 0 or in the range of float32, from {smallest:.2g} to '
        f'{largest:.2g}, got {value!r}.')


def positive(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is finite and > 0; tracers pass."""
  if isinstance(value, jax.core.Tracer):
    return
  if not (_is_finite(value) and value > 0):
    raise ValueError(f'{name} must be a finite number > 0, got {value!r}.')
  _in_float32(name, value)


def not_negative(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is finite and >= 0; tracers pass."""
  if isinstance(value, jax.core.Tracer):
    return
  if not (_is_finite(value) and value >= 0):
    raise ValueError(f'{name} must be a finite number >= 0, got {value!r}.')
  _in_float32(name, value)


def floating(name: str, array: Any) -> None:
  """Raises ValueError unless the array holds floating-point numbers."""
  dtype = jnp.result_type(array)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
        f'{name} must be floating, with bytes divided by 255, got dtype '
        f'{dtype}.')


def count(
    name: str, value: Any, minimum: int = 1,
    maximum: int | None = LARGEST_COUNT) -> None:
  """Raises ValueError unless `value` is a whole number in these bounds."""
  if not isinstance(value, numbers.Integral) or isinstance(
      value, bool) or value < minimum:
    raise ValueError(
        f'{name} must be a whole number >= {minimum}, got {value!r}.')
  if maximum is not None and int(value) > maximum:
    raise ValueError(f'{name} must be at most {maximum:,}, got {value!r}.')


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
  """Raises ValueError unless `value` is in `allowed`; suggests the nearest."""
  allowed = list(allowed)
  if value in allowed:
    return
  by_lower = {name.lower(): name for name in allowed}
  near = difflib.get_close_matches(
      str(value).lower(), by_lower, n=1, cutoff=0.5)
  hint = f' Did you mean {by_lower[near[0]]!r}?' if near else ''
  raise ValueError(
      f'{name} must be one of {", ".join(map(repr, allowed))}, got {value!r}.'
      f'{hint}')
