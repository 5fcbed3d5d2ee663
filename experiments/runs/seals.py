"""Seals of checkpoints: digests of their content, which show any damage.

Storage loses and changes bytes: a copy that was cut off, a disk that filled up,
a bit that flipped. What orbax then reads may look like a checkpoint of another
network, or like a good one. So a digest of all arrays and notes is stored with
the notes, and compared whenever a checkpoint is read.
"""

from collections.abc import Mapping
from concurrent import futures
from typing import Any

import numpy as np

from experiments.util import digests

#: The name of the digest among the notes, and a second one, so that a digest
#: whose name was changed is noticed as missing.
_NAME, _MARK = 'sha256', 'sealed'

#: SHA-256 releases Python's lock.
_THREADS = 4


class Damaged(ValueError):
  """The content of a checkpoint is not what was saved."""


def _digest(tree: Any, notes: Mapping[str, Any]) -> str:
  """The digest of arrays by name, in any container, and of plain values."""

  def line(item: tuple[str, Any]) -> tuple[str, tuple[int, ...], str]:
    name, leaf = item
    return name, np.shape(leaf), digests.whole(leaf)

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    lines = sorted(pool.map(line, digests.named(tree)))
  return digests.of_values([lines, dict(notes)], digits=None)


def sealed(tree: Any, notes: Mapping[str, Any]) -> dict[str, Any]:
  """The notes with the digest of everything that is stored.

  Args:
    tree: any pytree of arrays.
    notes: JSON values stored with it.

  Returns:
    The notes to store.
  """
  return {**notes, _NAME: _digest(tree, notes), _MARK: True}


def without_seal(stored: Mapping[str, Any]) -> dict[str, Any]:
  """The notes that `sealed` was given, unchecked."""
  return {name: value for name, value in stored.items()
          if name not in (_NAME, _MARK)}


def checked(tree: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
  """The notes that `sealed` was given, if tree and notes are as saved.

  Args:
    tree: the arrays as read; the containers may be others.
    stored: the notes as read. Those of older versions have no digest and are
      not checked.

  Returns:
    The notes without the digest.

  Raises:
    Damaged: if arrays or notes differ from those that were saved.
  """
  notes = without_seal(stored)
  is_sealed = _NAME in stored or _MARK in stored
  if is_sealed and stored.get(_NAME) != _digest(tree, notes):
    raise Damaged(
        'its content is not what was saved (the SHA-256 digest differs)')
  return notes
