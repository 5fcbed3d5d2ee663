"""Tests of checkpoints: exact, atomic, and of this model only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import checkpoints


def make_tree(width=3, seed=0):
  """Parameters of several types with the state of an optimizer."""
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


def test_round_trip_is_exact_and_newest_replaces(tmp_path):
  first, second = make_tree(seed=0), make_tree(seed=1)
  store = checkpoints.Checkpoints(tmp_path, 'last')
  assert store.step() is None
  store.save(3, first, {'seconds_training': 0.1, 'name': 'one'})
  store.save(7, second, {'seconds_training': 1.5})
  store.close()
  folders = [p.name for p in (tmp_path / 'checkpoints/last').iterdir()]
  assert folders == ['7']

  again = checkpoints.Checkpoints(tmp_path, 'last')
  assert again.step() == 7
  tree, notes = again.load(jax.tree.map(jnp.zeros_like, first))
  again.close()
  assert notes == {'seconds_training': 1.5}
  assert_same(tree, second)


def test_saving_a_step_twice_keeps_it(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'best')
  store.save(3, make_tree(), {'epoch': 1})
  store.save(3, make_tree(), {'epoch': 1})
  assert store.step() == 3
  store.close()


def test_half_written_checkpoint_is_ignored(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(), {})
  store.close()
  # What a killed process leaves: a temporary folder of a later step.
  folder = tmp_path / 'checkpoints/last'
  part = folder / '9.orbax-checkpoint-tmp'
  (part / 'state').mkdir(parents=True)
  (part / 'state/d').write_bytes(b'half')
  again = checkpoints.Checkpoints(tmp_path, 'last')
  assert again.step() == 3
  assert_same(again.load(make_tree(seed=2))[0], make_tree())
  again.save(9, make_tree(seed=1), {})
  assert again.step() == 9
  again.close()
  assert [p.name for p in folder.iterdir()] == ['9']


def test_half_deleted_checkpoint_is_ignored(tmp_path, caplog):
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(), {})
  store.close()
  # What a process leaves that was killed while it removed an older step.
  folder = tmp_path / 'checkpoints/last'
  (folder / '2/state').mkdir(parents=True)
  (folder / '2/state/d').write_bytes(b'half')
  again = checkpoints.Checkpoints(tmp_path, 'last')
  assert again.step() == 3
  assert_same(again.load(make_tree(seed=2))[0], make_tree())
  again.close()
  assert [p.name for p in folder.iterdir()] == ['3']
  assert not [r for r in caplog.records if r.levelname == 'WARNING']


def test_checkpoint_of_another_model(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'last')
  store.save(3, make_tree(width=3), {})
  with pytest.raises(checkpoints.CheckpointError) as error:
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
  with pytest.raises(checkpoints.CheckpointError, match='no checkpoint in'):
    store.load(make_tree())
  store.close()
