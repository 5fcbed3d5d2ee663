"""Digests that identify stored results by content, not by path."""

import hashlib
import json
from typing import Any

import jax
import numpy as np


def named(tree: Any) -> list[tuple[str, Any]]:
  """The leaves of a pytree with names that do not depend on its containers."""
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf)
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def whole(tree: Any) -> str:
  """The SHA-256 of names, shapes, dtypes and values of a pytree of arrays."""
  digest = hashlib.sha256()
  for name, leaf in named(tree):
    array = np.ascontiguousarray(leaf)
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(array.view(np.uint8).data if array.size else b'')
  return digest.hexdigest()


def of_arrays(tree: Any) -> str:
  """The start of `whole`, for file names and records."""
  return whole(tree)[:16]


def of_values(values: Any, digits: int | None = 12) -> str:
  """The SHA-256 of plain values; its start is enough for file names."""
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:digits]
