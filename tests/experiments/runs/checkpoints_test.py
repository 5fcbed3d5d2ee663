"""Tests of checkpoints: exact, atomic, and checked against the model."""

from concurrent import futures
import logging
import multiprocessing
import shutil
import time

from absl import logging as absl_logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from orbax.checkpoint._src.serialization import serialization
import pytest

from experiments.runs import checkpoints, reading
from tests.helpers import checkpoint_writes


def make_tree(width=3, seed=0):
  """Parameters of several dtypes with an optimizer state."""
  keys = jax.random.split(jax.random.key(seed), 3)
  params = nn.Dense(width).init(keys[0], jnp.ones((1, 4)))['params']
  params['half'] = jax.random.normal(keys[1], (2,), jnp.bfloat16)
  tx = optax.chain(
      optax.add_decayed_weights(0.1),
      optax.sgd(optax.constant_schedule(0.1), 0.9))
  state = tx.init(params)
  _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  return {'step': jnp.asarray(7, jnp.int32), 'params': params,
          'opt_state': state, 'batch_stats': {}}


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def third(tmp_path):
  """The folder of a checkpoint of step 3."""
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(), {})
  store.close()
  return tmp_path / 'checkpoints/last'


def test_round_trip_is_exact_and_the_newest_two_are_kept(tmp_path):
  first, second = make_tree(seed=0), make_tree(seed=1)
  store = checkpoints.Checkpoints(tmp_path, 'last')
  assert store.step() is None
  store.save(2, first, {})
  store.save(3, first, {'seconds_training': 0.1, 'name': 'one'})
  store.save(7, second, {'seconds_training': 1.5})
  store.close()
  folders = {p.name for p in (tmp_path / 'checkpoints/last').iterdir()}
  assert folders == {'3', '7'}

  again = checkpoints.Checkpoints(tmp_path, 'last')
  assert again.step() == 7
  tree, notes = again.load(jax.tree.map(jnp.zeros_like, first))
  again.close()
  assert notes == {'seconds_training': 1.5}
  assert_same(tree, second)


def test_arrays_may_be_donated_while_they_are_written(tmp_path, monkeypatch):
  """The files hold the values at the time of the call, whatever comes next."""
  release, written = checkpoint_writes.hold(monkeypatch)
  overwrite = jax.jit(
      lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  tree = {f'w{i}': jnp.full(70_000, float(i)) for i in range(5)}
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, tree, {})
  for _ in range(3):
    tree = overwrite(tree)
  jax.block_until_ready(tree)
  assert not written and reading.Reader(tmp_path, 'last').step() is None
  release.set()
  store.finish()
  assert written and reading.Reader(tmp_path, 'last').step() == 3
  found, _ = store.load(tree)
  store.close()
  for i in range(5):
    np.testing.assert_array_equal(found[f'w{i}'], i)


def test_the_step_and_the_arrays_are_those_on_the_disk(tmp_path, monkeypatch):
  release, _ = checkpoint_writes.hold(monkeypatch)
  for read in (lambda store: store.step(),
               lambda store: int(store.load(make_tree())[0]['step'])):
    release.clear()
    store = checkpoints.Checkpoints(tmp_path / f'{id(read)}', 'last')
    store.save(7, make_tree(), {})
    with futures.ThreadPoolExecutor(1) as pool:
      found = pool.submit(read, store)
      with pytest.raises(futures.TimeoutError):
        found.result(timeout=0.2)
      release.set()
      assert found.result(timeout=60) == 7
    store.close()


@pytest.mark.parametrize('error', [
    OSError(28, 'No space left on device'), ValueError('RESOURCE_EXHAUSTED')])
def test_failure_in_the_background_is_one_error(tmp_path, monkeypatch, error):
  write, refused = serialization.async_serialize_from_host, []

  async def full(*args, **kwargs):
    if refused:
      raise refused.pop()
    return await write(*args, **kwargs)

  monkeypatch.setattr(serialization, 'async_serialize_from_host', full)
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(), {})
  store.finish()
  refused.append(error)
  store.save(5, make_tree(), {})
  with pytest.raises(reading.CheckpointError, match=(
      r'of step 5 could not .*' + error.args[-1])):
    store.save(7, make_tree(), {})
  store.close()
  assert reading.Reader(tmp_path, 'last').step() == 3


@pytest.mark.parametrize('place, level, is_kept', [
    (orbax.checkpoint.__file__.replace('__init__', '_src/x'), 'ERROR', False),
    (orbax.checkpoint.__file__.replace('__init__', '_src/x'), 'WARNING', False),
    (orbax.checkpoint.__file__.replace('__init__', '_src/x'), 'INFO', True),
    ('/home/me/orbax_runs/experiments/x.py', 'ERROR', True)])
def test_only_the_log_of_orbax_is_dropped(place, level, is_kept, tmp_path):
  """It raises its errors as well; ours are one line."""
  store = checkpoints.Checkpoints(tmp_path, 'last')
  logger = absl_logging.get_absl_logger()
  record = logger.makeRecord(
      'absl', logging.getLevelName(level), place, 1, 'text', (), None)
  assert bool(logger.filter(record)) == is_kept
  store.close()


def test_saving_a_step_twice_keeps_the_first(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'best')
  store.save(3, make_tree(seed=0), {'epoch': 1})
  store.save(3, make_tree(seed=1), {'epoch': 2})
  tree, notes = store.load(make_tree(seed=2))
  store.close()
  assert notes == {'epoch': 1}
  assert_same(tree, make_tree(seed=0))


def contents(folder):
  """The files in a folder, with their times."""
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_reader_changes_nothing_beside_a_save_under_way(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(), {'epoch': 1})
  store.close()
  folder = tmp_path / 'checkpoints/last'
  for part in ('9.orbax-checkpoint-tmp/state', '2/state'):
    (folder / part).mkdir(parents=True)
    (folder / part / 'd').write_bytes(b'half')
  before = contents(tmp_path)
  reader = reading.Reader(tmp_path, 'last')
  assert reader.step() == 3 and reader.notes() == {'epoch': 1}
  found = reader.read()
  assert (found.step, found.notes) == (3, {'epoch': 1})
  assert_same(found.tree['params'], make_tree()['params'])
  read = reading.read_variables(tmp_path, 'last')
  assert read.tree.keys() == {'params', 'batch_stats'}
  assert contents(tmp_path) == before


def test_newest_of_two_and_none_of_a_half(tmp_path, third):
  reader = reading.Reader(tmp_path, 'last')
  shutil.copytree(third / '3', third / '10')
  assert reader.step() == 10
  for step in ('3', '10'):  # half deleted
    (third / step / reading.COMPLETE).unlink()
  assert reader.step() is None


def test_reader_makes_no_folder(tmp_path):
  reader = reading.Reader(tmp_path / 'run', 'best')
  assert reader.step() is None and reader.notes() == {}
  with pytest.raises(reading.CheckpointError, match='no checkpoint in'):
    reader.read()
  assert not list(tmp_path.iterdir())


def test_damaged_checkpoint_is_named(tmp_path, third):
  shutil.rmtree(third / '3/state')
  with pytest.raises(
      reading.CheckpointError, match=r'of step 3 in .* cannot be read'):
    reading.Reader(tmp_path, 'last').read()


def replace(folder, was_read):
  """Saves twelve checkpoints, and waits for a read after every third."""
  store = checkpoints.Checkpoints(folder, 'last')
  for n in range(1, 13):
    store.save(n, {'step': np.array(n), 'w': np.full(50, n)}, {'n': n})
    if n % 3 == 0:  # else all of them may fall into one slow read
      was_read.clear()
      assert was_read.wait(timeout=60)
  store.close()


def test_reading_while_a_trainer_replaces(tmp_path):
  """Every read returns one complete checkpoint; no save fails."""
  context = multiprocessing.get_context('spawn')
  was_read = context.Event()
  trainer = context.Process(
      target=replace, args=(tmp_path, was_read), daemon=True)
  trainer.start()
  reader, steps = reading.Reader(tmp_path, 'last'), []
  while trainer.is_alive():
    if reader.step() is None:
      time.sleep(0.01)
      continue
    found = reader.read()
    assert found.notes == {'n': found.step} and found.tree['step'] == found.step
    np.testing.assert_array_equal(found.tree['w'], np.full(50, found.step))
    steps.append(found.step)
    was_read.set()
  trainer.join()
  assert trainer.exitcode == 0 and reader.read().step == 12
  assert steps == sorted(steps) and len(set(steps)) > 2


def test_all_listed_steps_are_replaced_meanwhile(tmp_path, third, monkeypatch):
  """A step removed between the listing and the check is no empty folder."""
  is_complete = reading.is_complete

  def late(step):
    if step.name == '3' and step.exists():
      (third / '3').rename(third / '4')
    return is_complete(step)

  monkeypatch.setattr(reading, 'is_complete', late)
  assert reading.Reader(tmp_path, 'last').step() == 4


def test_half_written_checkpoint_is_ignored(tmp_path, third):
  # Left by a killed process: a temporary folder of a later step.
  part = third / '9.orbax-checkpoint-tmp'
  (part / 'state').mkdir(parents=True)
  (part / 'state/d').write_bytes(b'half')
  again = checkpoints.Checkpoints(tmp_path, 'last')
  assert again.step() == 3
  assert_same(again.load(make_tree(seed=2))[0], make_tree())
  again.save(9, make_tree(seed=1), {})
  assert again.step() == 9
  again.close()
  assert {p.name for p in third.iterdir()} == {'3', '9'}


def test_half_deleted_checkpoint_is_ignored(tmp_path, third, caplog):
  # Left by a process killed while it removed an older step.
  (third / '2/state').mkdir(parents=True)
  (third / '2/state/d').write_bytes(b'half')
  again = checkpoints.Checkpoints(tmp_path, 'last')
  assert again.step() == 3
  assert_same(again.load(make_tree(seed=2))[0], make_tree())
  again.close()
  assert [p.name for p in third.iterdir()] == ['3']
  assert not [r for r in caplog.records if r.levelname == 'WARNING']


def test_checkpoint_of_another_model(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(width=3), {})
  with pytest.raises(reading.CheckpointError) as error:
    store.load(make_tree(width=5))
  text = str(error.value)
  assert 'another model' in text and "bias' has shape (3,)" in text
  assert '(5,)' in text and str(tmp_path) in text

  more = make_tree()
  more['params']['extra'] = jnp.ones(2)
  with pytest.raises(ValueError, match=r"extra' has shape \(absent\)"):
    store.load(more)
  store.close()


def test_no_checkpoint(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'last')
  with pytest.raises(reading.CheckpointError, match='no checkpoint in'):
    store.load(make_tree())
  store.close()
