"""The order in which the last and the best checkpoint are written."""

import threading
import types

import jax.numpy as jnp
from orbax.checkpoint._src.serialization import serialization
import pytest

from experiments.runs import reading
from experiments.training import saving as saving_lib
from experiments.training import step as step_lib
from tests.helpers import checkpoint_writes


@pytest.fixture
def saving(tmp_path, monkeypatch):
  monkeypatch.setattr(
      step_lib, 'to_tree', lambda state, sums: {'state': state, 'sums': sums})
  run = types.SimpleNamespace(
      workdir=tmp_path, order={'order': 'abc'}, num_devices=1)
  return saving_lib.Saving(run)


def save_last(saving, step):
  saving.save_last(
      step, jnp.full(3, step), jnp.zeros(1), seconds=1.0, is_suspicious=False,
      checksums={})


def steps(tmp_path):
  return [reading.Reader(tmp_path, kind).step() for kind in (
      'last', 'best')]


def test_best_follows_last_and_is_complete(saving, tmp_path, monkeypatch):
  """A kill at any time leaves no best checkpoint newer than the last one."""
  seen = []

  def look(is_released):
    if not is_released:
      seen.append(steps(tmp_path))

  release, _ = checkpoint_writes.hold(monkeypatch, look)
  save_last(saving, 4)
  timer = threading.Timer(0.3, release.set)
  timer.start()
  saving.save_best(4, jnp.full(3, 4), jnp.zeros(1), {'epoch': 2})
  # Until `last` was released, `best` had not begun.
  assert seen and all(pair == [None, None] for pair in seen)
  assert len(seen) <= 2 and steps(tmp_path) == [4, 4]
  saving.close()


def test_failures_at_the_end(saving, monkeypatch):
  """Both checkpoints are closed."""
  async def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(serialization, 'async_serialize_from_host', full)
  closed = []
  close = saving.best.close
  monkeypatch.setattr(
      saving.best, 'close', lambda: (closed.append('best'), close()))
  save_last(saving, 4)
  with pytest.raises(reading.CheckpointError, match='No space left'):
    saving.close()
  assert closed == ['best']


def test_the_description_of_a_failed_write(saving, monkeypatch):
  assert saving.describe_last() == 'No state was saved before.'
  save_last(saving, 4)
  assert 'The state of step 4 is in' in saving.describe_last()

  def full():
    raise reading.CheckpointError('step 8 could not be written')

  monkeypatch.setattr(saving.last, 'finish', full)
  assert saving.describe_last() == 'step 8 could not be written'
  monkeypatch.undo()
  saving.close()
