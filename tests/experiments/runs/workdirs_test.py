"""Tests of opening, claiming, locking and reading a run's folder."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.config import schema
from experiments.configs import base, digits_awp
from experiments.runs import workdirs
from experiments.util import atomic


def claimed(folder, config):
  path = workdirs.open_workdir(folder, config)
  workdirs.claim(path, config)
  return path


def test_new_folder_holds_the_config(tmp_path):
  config = digits_awp.get_config()
  folder = claimed(tmp_path / 'a/b', config)
  stored = json.loads((folder / 'config.json').read_text())
  assert stored['threat.epsilon'] == config.threat.epsilon
  assert stored['optimizer.decay_at'] == [0.5, 0.75]
  assert stored.keys() == schema.flatten(config).keys()


def test_same_config_is_opened_again(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  (tmp_path / 'metrics.jsonl').write_text('')
  before = (tmp_path / 'config.json').read_bytes()
  assert claimed(tmp_path, digits_awp.get_config()) == tmp_path
  assert (tmp_path / 'config.json').read_bytes() == before


def test_free_fields_may_differ(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  config = digits_awp.get_config()
  config.data_dir, config.log_every_steps = 'elsewhere', 7
  config.checkpoint_every_steps, config.data_on_device_gib = 3, 0.0
  claimed(tmp_path, config)


def test_another_config_is_refused(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  before = (tmp_path / 'config.json').read_bytes()
  config = digits_awp.get_config()
  config.awp.gamma, config.seed = 0.5, 4
  with pytest.raises(ValueError) as error:
    workdirs.open_workdir(tmp_path, config)
  text = str(error.value)
  assert 'awp.gamma (0.01 there, 0.5 now)' in text
  assert 'seed (0 there, 4 now)' in text and 'epochs' not in text
  assert (tmp_path / 'config.json').read_bytes() == before


def edit(folder, **fields):
  """Changes fields of a stored config; None removes one."""
  path = folder / 'config.json'
  stored = json.loads(path.read_text()) | {
      name.replace('__', '.'): value for name, value in fields.items()}
  path.write_text(json.dumps(
      {name: value for name, value in stored.items() if value is not None}))


def test_refusal_advises_another_folder_and_nothing_else(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  config = digits_awp.get_config()
  config.seed = 4
  for attempt in (
      lambda: workdirs.open_workdir(tmp_path, config),
      lambda: workdirs.reader_config(tmp_path, config, None)):
    with pytest.raises(ValueError, match=r'seed \(0 there, 4 now\)') as error:
      attempt()
    assert not re.search('remove|delete|rm ', str(error.value))


def test_fields_of_a_later_version_have_their_defaults(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  edit(tmp_path, guard__factor=None, ema_decay=None)
  workdirs.open_workdir(tmp_path, digits_awp.get_config())
  assert workdirs.stored_config(tmp_path).guard.factor == 0.5
  config = digits_awp.get_config()
  config.ema_decay = 0.9
  with pytest.raises(ValueError, match=r'ema_decay \(0\.0 there, 0\.9 now\)'):
    workdirs.open_workdir(tmp_path, config)


@pytest.mark.parametrize('old, value, default', [
    ('model.normalise', False, True),
    ('awp.decay_at', 'natural', 'perturbed')])
def test_renamed_fields_keep_their_values(tmp_path, old, value, default):
  new = workdirs.RENAMED[old]
  config = digits_awp.get_config()
  config.update_from_flattened_dict({new: value})
  assert schema.flatten(digits_awp.get_config())[new] == default
  claimed(tmp_path, config)
  edit(tmp_path, **{new: None, old: value})
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert old in stored and new not in stored
  fields = workdirs.with_defaults(stored)
  assert fields[new] == value and old not in fields
  assert workdirs.stored_config(tmp_path).to_dict() == config.to_dict()
  assert workdirs.reader_config(
      tmp_path, base.get_config(), {}).to_dict() == config.to_dict()
  workdirs.open_workdir(tmp_path, config)  # resumes
  with pytest.raises(
      ValueError, match=rf'{new} \({value!r} there, {default!r} now\)'):
    workdirs.open_workdir(tmp_path, digits_awp.get_config())


def test_seed_of_an_older_run_chose_its_images(tmp_path):
  config = digits_awp.get_config()
  config.seed = 3
  claimed(tmp_path, config)
  edit(tmp_path, data_seed=None)
  assert workdirs.stored_config(tmp_path).data_seed == 3
  # Runs of several seeds still share a row of a table.
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert workdirs.with_defaults(stored)['data_seed'] == base.get_config(
      ).data_seed


def test_reading_needs_the_folder_only(tmp_path):
  config = digits_awp.get_config()
  config.seed, config.evaluation.attacks = 7, ('fgsm', 'pgd-3')
  claimed(tmp_path, config)
  # A field of an earlier version that does not affect reading.
  edit(tmp_path, awp__of_old=3, num_validation=None)
  before = (tmp_path / 'config.json').read_bytes()
  found = workdirs.reader_config(tmp_path, base.get_config(), {})
  assert found.to_dict() == config.to_dict()
  found = workdirs.reader_config(tmp_path, base.get_config(), {
      'evaluation.num_examples': 5, 'landscape.points': 3, 'data_dir': 'x'})
  assert found.evaluation.attacks == ('fgsm', 'pgd-3') and found.seed == 7
  assert found.evaluation.num_examples == 5 and found.landscape.points == 3
  assert found.data_dir == 'x'
  assert (tmp_path / 'config.json').read_bytes() == before


def test_reading_with_a_config_that_was_named(tmp_path):
  config = digits_awp.get_config()
  claimed(tmp_path, config)
  config.evaluation.attacks = ('fgsm',)
  assert workdirs.reader_config(
      tmp_path, config, None).evaluation.attacks == ('fgsm',)
  for wrong in (
      lambda: workdirs.reader_config(tmp_path, base.get_config(), None),
      lambda: workdirs.reader_config(
          tmp_path, base.get_config(), {'threat.epsilon': 0.5})):
    with pytest.raises(ValueError, match=r'threat\.epsilon \(0\.2 there, '):
      wrong()


def test_second_trainer_is_refused_and_readers_are_not(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  with workdirs.locked(tmp_path):
    with pytest.raises(workdirs.WorkdirBusy, match='another process trains'):
      with workdirs.locked(tmp_path):
        pass
    code = subprocess.run([sys.executable, '-c', (
        'import fcntl, sys\n'
        f'file = open({str(tmp_path / workdirs.LOCK)!r}, "a")\n'
        'try:\n'
        '  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n'
        'except BlockingIOError:\n'
        '  sys.exit(7)\n')], timeout=60, check=False).returncode
    assert code == 7  # the lock holds in another process too
    assert workdirs.stored_config(tmp_path).seed == 0
  with workdirs.locked(tmp_path):
    pass
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'config.json']


def test_folder_that_was_only_opened_is_free(tmp_path):
  workdirs.open_workdir(tmp_path / 'run', digits_awp.get_config())
  config = digits_awp.get_config()
  config.seed = 4
  claimed(tmp_path / 'run', config)


@pytest.mark.parametrize('below', ['run', '.'])
def test_folder_that_cannot_be_written_to(tmp_path, below):
  # Root may write anywhere, but not below a file.
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match=r'cannot be written to .*--workdir'):
    workdirs.open_workdir(tmp_path / 'file' / below, digits_awp.get_config())


def test_foreign_files_are_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  with pytest.raises(ValueError, match=r'holds files but no config\.json'):
    workdirs.open_workdir(tmp_path, digits_awp.get_config())
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_half_written_config_is_written_again(tmp_path):
  (tmp_path / '.config.json.17-9f.tmp').write_text('{"see')
  claimed(tmp_path, digits_awp.get_config())
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 0


@pytest.mark.parametrize('text', ['{"seed": ', '[1]', '3', ''])
def test_config_that_is_none(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match='is not the config of a run'):
    workdirs.open_workdir(tmp_path, digits_awp.get_config())


def test_of_two_that_claim_a_folder_at_once_one_gets_it(tmp_path, monkeypatch):
  """Both open it empty; the second writer must not replace the first."""
  first, second = digits_awp.get_config(), digits_awp.get_config()
  second.seed = 5
  folder = workdirs.open_workdir(tmp_path / 'run', first)
  workdirs.open_workdir(tmp_path / 'run', second)
  with monkeypatch.context() as patch:
    # The second finds no file when it checks.
    workdirs.claim(folder, first)
    before = (folder / 'config.json').read_bytes()
    patch.setattr(pathlib.Path, 'exists', lambda path: False)
    with pytest.raises(ValueError, match=r'seed \(0 there, 5 now\)'):
      workdirs.claim(folder, second)
    workdirs.claim(folder, first)
  assert (folder / 'config.json').read_bytes() == before
  assert {path.name for path in folder.iterdir()} == {'config.json'}


def test_lock_outlives_the_config_file(tmp_path):
  folder = claimed(tmp_path / 'run', digits_awp.get_config())
  with workdirs.locked(folder):
    # A writer that replaces the file must not open the folder to others.
    text = (folder / 'config.json').read_text()
    atomic.write_text(folder / 'config.json', text)
    with pytest.raises(workdirs.WorkdirBusy), workdirs.locked(folder):
      pass
  with workdirs.locked(folder):
    pass
  workdirs.open_workdir(folder, digits_awp.get_config())
