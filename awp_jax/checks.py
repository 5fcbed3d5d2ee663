"""Checks of arguments: one error each, with the value and what is allowed."""

from collections.abc import Iterable
import difflib
import math
from typing import Any

import jax


def positive(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is finite and > 0; tracers pass."""
  if isinstance(value, jax.core.Tracer):
    return
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f'{name} must be a finite number > 0, got {value!r}.')


def not_negative(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is finite and >= 0; tracers pass."""
  if isinstance(value, jax.core.Tracer):
    return
  if not (math.isfinite(value) and value >= 0):
    raise ValueError(f'{name} must be a finite number >= 0, got {value!r}.')


def count(name: str, value: Any, minimum: int = 1) -> None:
  """Raises ValueError unless `value` is a whole number >= `minimum`."""
  if isinstance(value, bool) or int(value) != value or value < minimum:
    raise ValueError(
        f'{name} must be a whole number >= {minimum}, got {value!r}.')


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
  """Raises ValueError unless `value` is among `allowed`; names the nearest."""
  allowed = list(allowed)
  if value in allowed:
    return
  near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  raise ValueError(
      f'{name} must be one of {", ".join(map(repr, allowed))}, got {value!r}.'
      f'{hint}')
