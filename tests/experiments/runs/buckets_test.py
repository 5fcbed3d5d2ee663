"""Tests of workdirs and checkpoints in buckets."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import base
from experiments.parallel import processes
from experiments.runs import checkpoints, reading, warm_start, workdirs
from experiments.util.errors import UserError
from tests.helpers import fake_buckets

LIKE = {'params': {'w': jnp.zeros(3)}}


@pytest.fixture
def systems():
  with fake_buckets.served() as found:
    yield found


@pytest.fixture(params=['gs', 's3'])
def workdir(request, systems):
  return fake_buckets.root(request.param) / 'run'


@pytest.fixture
def objects(workdir, systems):
  return systems[str(workdir)[:2]].objects


def tree(value):
  return {'params': {'w': jnp.full(3, value)}}


def save(workdir, *steps):
  store = checkpoints.Checkpoints(workdir, 'last')
  for step in steps:
    store.save(step, tree(1.0 * step), {'of': step})
  store.close()


def load(workdir):
  store = checkpoints.Checkpoints(workdir, 'last')
  found, notes = store.load(LIKE)
  store.close()
  return store.step(), np.asarray(found['params']['w']).tolist(), notes


def test_the_newest_checkpoints_replace_the_old_ones(workdir, objects):
  save(workdir, 1, 3, 7)
  assert {name.split('/')[4] for name in objects} == {'3', '7'}
  assert load(workdir) == (7, [7.0] * 3, {'of': 7})
  stored = reading.read_variables(workdir, 'last')
  assert stored.step == 7 and stored.notes == {'of': 7}
  np.testing.assert_array_equal(stored.tree['params']['w'], [7.0] * 3)


def test_a_killed_writer_leaves_the_checkpoint_before(workdir, objects):
  save(workdir, 3)
  before = dict(objects)
  save(workdir, 7)
  part = {
      name: data for name, data in objects.items()
      if not name.endswith('last/7/commit_success.txt')}
  objects.clear()
  objects.update(before | part)
  reader = reading.Reader(workdir, 'last')
  assert reader.step() == 3 and reader.notes() == {'of': 3}
  # Readers change nothing; the trainer removes the part.
  assert objects == before | part
  assert load(workdir) == (3, [3.0] * 3, {'of': 3})
  assert {name.split('/')[4] for name in objects} == {'3'}


def test_a_damaged_checkpoint_is_named_and_kept(workdir, objects):
  """Nothing can be moved in a bucket, and nothing is removed."""
  save(workdir, 3, 7)
  for name in objects:  # the values, wherever orbax puts them
    if '/7/' in name and '/d/' in name:
      objects[name] = objects[name][:20]
  before = dict(objects)
  with pytest.raises(
      reading.CheckpointError, match=r'step 7 .*Remove .*last/7 to go on'):
    load(workdir)
  assert objects == before
  for name in before:
    if '/7/' in name:
      del objects[name]
  assert load(workdir) == (3, [3.0] * 3, {'of': 3})
  save(workdir, 7)
  assert load(workdir) == (7, [7.0] * 3, {'of': 7})


def test_a_failed_write_is_one_error_and_keeps_the_old(
    workdir, objects, systems):
  store = checkpoints.Checkpoints(workdir, 'last')
  store.save(3, tree(3.0), {})
  store.finish()
  systems[str(workdir)[:2]].failing = RuntimeError('quota exceeded')
  with pytest.raises(
      reading.CheckpointError, match=f'{workdir}.* quota exceeded'):
    store.save(7, tree(7.0), {})
    store.finish()
  store.close()
  systems[str(workdir)[:2]].failing = None
  assert load(workdir)[0] == 3


def test_several_processes_need_another_folder_than_s3(systems, monkeypatch):
  monkeypatch.setattr(processes, 'count', lambda: 2)
  with pytest.raises(UserError, match=r's3://bucket/run.* 2 processes'):
    checkpoints.Checkpoints(fake_buckets.root('s3') / 'run', 'last')


def test_weights_come_from_a_run_in_a_bucket(workdir):
  with pytest.raises(UserError, match=f"init_from='{workdir}' is not"):
    warm_start.check(str(workdir))
  store = checkpoints.Checkpoints(workdir, 'best')
  store.save(3, tree(3.0), {})
  store.close()
  np.testing.assert_array_equal(
      warm_start.read(str(workdir))['params']['w'], [3.0] * 3)


def test_a_workdir_is_claimed_by_one_config(workdir, objects, monkeypatch):
  first, second = base.get_config(), base.get_config()
  second.seed = 5
  for config in (first, second):  # both find it free
    assert workdirs.open_workdir(str(workdir), config) == workdir
  assert objects == {}
  workdirs.claim(workdir, first)
  with monkeypatch.context() as patch:
    # The second finds no object when it checks.
    patch.setattr(type(workdir), 'exists', lambda path: False)
    patch.setattr(type(workdir), 'is_file', lambda path: True)
    with pytest.raises(UserError, match='differs in seed'):
      workdirs.claim(workdir, second)
  workdirs.claim(workdirs.open_workdir(workdir, first), first)
  assert workdirs.stored_config(workdir) == first
  with workdirs.locked(workdir), workdirs.locked(workdir):  # no locks there
    assert set(objects) == {'bucket/run/config.json'}


def test_a_foreign_folder_is_refused(workdir, objects):
  objects['bucket/run/notes.txt'] = b''
  with pytest.raises(UserError, match=f"'{workdir}' holds files"):
    workdirs.open_workdir(workdir, base.get_config())


def test_an_absent_bucket_is_one_error(workdir):
  missing = str(workdir).replace('bucket', 'typo')
  with pytest.raises(UserError, match=f'{missing}.*bucket does not exist'):
    workdirs.open_workdir(missing, base.get_config())
  with pytest.raises(UserError, match=f"'{missing}' holds no config.json"):
    workdirs.stored_fields(workdir.parents[1] / 'typo' / 'run')
