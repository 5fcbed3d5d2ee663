"""Rows of a process on its devices."""

import jax
import numpy as np

from experiments.parallel import placement


def test_a_process_places_its_rows_alone(monkeypatch):
  """Devices 2, 3, 6 and 7 of eight belong to this process."""
  whole = np.arange(48.0).reshape(16, 3)
  rows = np.array([4, 5, 6, 7, 12, 13, 14, 15])
  placed = []

  def make(shape, sharding, part):
    assert shape == whole.shape and not sharding.is_fully_replicated
    for begin in (12, 4, 14, 6):
      index = slice(begin, begin + 2)
      np.testing.assert_array_equal(part((index, slice(None))), whole[index])
      placed.append(begin)

  monkeypatch.setattr(jax, 'process_count', lambda *_: 2)
  monkeypatch.setattr(placement, 'local_rows', lambda size: rows)
  monkeypatch.setattr(jax, 'make_array_from_callback', make)
  placement.split_local((whole[rows],), 16)
  assert len(placed) == 4
