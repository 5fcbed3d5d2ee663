"""Damaged checkpoints: what is lost, cut off or changed is never used."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs import checkpoints, reading, seals

# orbax says so when it reads arrays whose devices it was not told.
pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')

NOTES = {'seconds': 1.5, 'line': {'epoch': 2, 'accuracy': float('nan')}}


def tree(step):
  rng = np.random.default_rng(step)
  return {
      'step': jnp.int32(step), 'row': jnp.ones((1, 2)),
      'params': {'w': jnp.asarray(rng.normal(size=(40, 30)), jnp.float32),
                 'half': jnp.asarray(rng.normal(size=7), jnp.bfloat16)}}


def save(folder, *steps):
  store = checkpoints.Checkpoints(folder, 'last')
  for step in steps:
    store.save(step, tree(step), NOTES | {'of': step})
  store.close()


def load(folder):
  """What a trainer starts from: step, whether its arrays are exact, notes."""
  store = checkpoints.Checkpoints(folder, 'last')
  found, notes = store.load(jax.tree.map(jnp.zeros_like, tree(0)))
  step = store.step()
  store.close()
  for got, wanted in zip(
      jax.tree.leaves(found), jax.tree.leaves(tree(step)), strict=True):
    assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
  assert notes.keys() == (NOTES | {'of': step}).keys()
  assert notes['of'] == step
  return step


def flip(data, place):
  """The data with one bit changed, at a share of their length."""
  changed = bytearray(data)
  changed[int(place * (len(data) - 1))] ^= 0x10
  return bytes(changed)


DAMAGES = {
  'cut': lambda data, place: data[:int(place * len(data))],
  'empty': lambda data, place: b'',
  'flipped': flip}


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Name -> content of all files of a workdir with checkpoints 3 and 6."""
  folder = tmp_path_factory.mktemp('two')
  save(folder, 3, 6)
  return {path.relative_to(folder): path.read_bytes()
          for path in folder.rglob('*') if path.is_file()}


def write(files, folder):
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def of_step(files, step):
  return sorted(name for name in files if f'/last/{step}/' in f'/{name}')


@pytest.mark.parametrize('damage', [*DAMAGES, 'missing'])
def test_training_goes_on_from_a_whole_checkpoint(
    two, damage, tmp_path, capfd):
  """Every file of the newest checkpoint, one after the other."""
  names = of_step(two, 6)
  assert len(names) > 5
  used = []
  for number, name in enumerate(names):
    folder = tmp_path / str(number)
    write(two, folder)
    if damage == 'missing':
      (folder / name).unlink()
    else:
      (folder / name).write_bytes(DAMAGES[damage](two[name], number / 9 % 1))
    step = load(folder)
    used.append(step)
    said = 'checkpoint of step 6' in capfd.readouterr().out
    assert said == (step == 3), name
    if said:
      (aside,) = (folder / 'checkpoints/set_aside').iterdir()
      assert aside.name.startswith('last-6-')
    if number == 0:  # the same step can be written again
      save(folder, 6)
      assert load(folder) == 6
  assert 3 in used


def test_a_reader_names_the_damage(two, tmp_path):
  """Changed values are the worst case: all files can be read."""
  write(two, tmp_path)
  path = tmp_path / 'checkpoints/last/6' / reading.COMPLETE
  assert '"seconds":1.5' in path.read_text().replace(' ', '')
  path.write_text(path.read_text().replace('1.5', '2.5'))
  with pytest.raises(reading.CheckpointError, match=(
      r'of step 6 in .* cannot be read: its content is not what was saved')):
    reading.Reader(tmp_path, 'last').read()
  assert load(tmp_path) == 3
  assert reading.Reader(tmp_path, 'last').read().notes['of'] == 3


def test_a_renamed_field_of_the_notes_is_damage(two, tmp_path):
  """orbax takes it for a checkpoint without notes."""
  for old, new in (('"custom_metadata"', '"custom_metadatA"'),):
    write(two, tmp_path)
    path = tmp_path / 'checkpoints/last/6' / reading.COMPLETE
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert load(tmp_path) == 3


@pytest.mark.parametrize('notes', [None, {}])
def test_lost_notes_are_damage(two, notes, tmp_path):
  write(two, tmp_path)
  path = tmp_path / 'checkpoints/last/6' / reading.COMPLETE
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {'custom_metadata': notes}))
  assert load(tmp_path) == 3


@pytest.mark.parametrize('error, is_damage', [
    (ValueError('DATA_LOSS: x'), True), (KeyError('shape'), True),
    (FileNotFoundError(2, 'x'), True), (NotADirectoryError(20, 'x'), True),
    (OSError(5, 'Input/output error'), False), (MemoryError(), False),
    (PermissionError(13, 'x'), False), (AttributeError('orbax'), False),
    (TypeError('orbax'), False), (RuntimeError('503'), False),
    (reading.CheckpointError('x'), False),
    *((ValueError(f'{code}: x'), False) for code in (
        'ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'PERMISSION_DENIED',
        'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED', 'UNAVAILABLE'))])
def test_what_counts_as_damage(error, is_damage):
  assert checkpoints._is_damage(error) == is_damage


def test_all_damaged_is_one_error(two, tmp_path, capfd):
  write(two, tmp_path)
  for step in (3, 6):
    for name in of_step(two, step):
      (tmp_path / name).write_bytes(b'')
  with pytest.raises(
      reading.CheckpointError, match=r'^there is no checkpoint in'):
    load(tmp_path)
  out = capfd.readouterr().out
  assert out.count('is not used') == out.count('was moved to') == 2


def test_another_model_is_not_taken_for_damage(two, tmp_path):
  write(two, tmp_path)
  store = checkpoints.Checkpoints(tmp_path, 'last')
  with pytest.raises(reading.CheckpointError, match='of another model'):
    store.load({'step': jnp.int32(0)})
  assert store.step() == 6
  store.close()


@pytest.mark.parametrize('error', [
    PermissionError(13, 'Permission denied'), OSError(24, 'Too many open'),
    MemoryError('large'), ValueError('UNAVAILABLE: connection reset')])
def test_a_failure_that_may_pass_moves_nothing(
    two, tmp_path, monkeypatch, error):
  write(two, tmp_path)

  def refused(*arguments):
    raise error

  monkeypatch.setattr(seals, 'checked', refused)
  with pytest.raises(reading.CheckpointError, match=(
      rf'of step 6 .* cannot be read: .*{error.args[-1]}')):
    load(tmp_path)
  assert sorted(p.name for p in (tmp_path / 'checkpoints/last').iterdir()) == [
      '3', '6']


def test_a_second_read_may_succeed(two, tmp_path, monkeypatch):
  write(two, tmp_path)
  usual, calls = seals.checked, []

  def once(*arguments):
    calls.append(1)
    if len(calls) == 1:
      raise seals.Damaged('a read that went wrong')
    return usual(*arguments)

  monkeypatch.setattr(seals, 'checked', once)
  assert load(tmp_path) == 6 and len(calls) == 2


def test_another_dtype_is_converted(two, tmp_path):
  """The digest is of what is stored, not of what it is converted to."""
  write(two, tmp_path)
  like = jax.tree.map(jnp.zeros_like, tree(0))
  like['params']['half'] = like['params']['half'].astype(jnp.float32)
  store = checkpoints.Checkpoints(tmp_path, 'last')
  found, _ = store.load(like)
  assert store.step() == 6 and found['params']['half'].dtype == jnp.float32
  store.close()


def test_newer_than_the_state_is_set_aside(two, tmp_path, capfd):
  write(two, tmp_path)
  store = checkpoints.Checkpoints(tmp_path, 'last')
  assert store.drop_unusable(6).step == 6
  assert store.drop_unusable(4).step == 3
  assert 'newer than step 4' in capfd.readouterr().out
  assert store.drop_unusable(0) is None
  store.close()


def test_seals_see_every_change():
  sealed = seals.sealed(tree(1), NOTES)
  assert seals.without_seal(sealed) == NOTES
  # Through JSON, and with containers as a checkpoint returns them.
  stored = json.loads(json.dumps(sealed))
  assert seals.checked(tree(1), stored).keys() == NOTES.keys()
  assert seals.checked(tree(2), NOTES) == NOTES  # of an older version
  changed = [
      (tree(2), stored), (tree(1), stored | {'seconds': 1.6}),
      (tree(1), stored | {'more': 0}), (tree(1), stored | {'sha256': 'x'}),
      (tree(1), NOTES | {'sealed': True}), (tree(1), NOTES | {'sha256': ''})]
  moved = tree(1)
  moved['other'] = moved.pop('row')
  shaped = tree(1)
  shaped['params']['w'] = shaped['params']['w'].T.reshape(40, 30)
  typed = tree(1)
  typed['params']['w'] = typed['params']['w'].view(jnp.int32)
  wide = tree(1)
  wide['row'] = jnp.ones((2, 1))
  for arrays, notes in itertools.chain(
      changed, ((each, stored) for each in (moved, shaped, typed, wide))):
    with pytest.raises(seals.Damaged, match='SHA-256'):
      seals.checked(arrays, notes)
