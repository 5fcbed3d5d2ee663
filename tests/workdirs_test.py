"""Tests of a run's folder: made, recognised, or refused."""

import json

import pytest

from experiments import setup, workdirs
from experiments.configs import digits_awp


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
  assert stored.keys() == dict(setup.flatten(config)).keys()


def test_same_config_is_taken_up(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  (tmp_path / 'metrics.jsonl').write_text('')
  before = (tmp_path / 'config.json').read_bytes()
  assert claimed(tmp_path, digits_awp.get_config()) == tmp_path
  assert (tmp_path / 'config.json').read_bytes() == before


def test_free_fields_may_differ(tmp_path):
  claimed(tmp_path, digits_awp.get_config())
  config = digits_awp.get_config()
  config.data_dir, config.log_every_steps = 'elsewhere', 7
  config.checkpoint_every_steps = 3
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
  (tmp_path / 'config.json.tmp').write_text('{"see')
  claimed(tmp_path, digits_awp.get_config())
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 0


@pytest.mark.parametrize('text', ['{"seed": ', '[1]', '3', ''])
def test_config_that_is_none(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match='is not the config of a run'):
    workdirs.open_workdir(tmp_path, digits_awp.get_config())
