"""Digests that identify stored results by content, not by path."""

import hashlib
import json
from typing import Any

import jax
import numpy as np


def of_arrays(tree: Any) -> str:
  """A digest of the names, shapes, dtypes and values of a pytree of arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.ascontiguousarray(leaf)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(array.view(np.uint8).data if array.size else b'')
  return digest.hexdigest()[:16]


def of_values(values: dict[str, Any]) -> str:
  """A digest of plain values, for file names."""
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]
