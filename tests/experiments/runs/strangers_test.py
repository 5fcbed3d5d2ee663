"""Reading a run of somebody else runs no code that its files name."""

import json
import sys

import numpy as np
import pytest

from experiments import pseudo_labels
from experiments.config import schema
from experiments.configs import digits_awp
from experiments.modes import evaluate, landscape
from experiments.runs import run as run_lib
from experiments.runs import workdirs
from experiments.util import named, paths
from experiments.util.errors import UserError

FIELDS = schema.flatten(digits_awp.get_config())
#: Every field that holds text, alone or in a tuple.
TEXTS = sorted(
    name for name, value in FIELDS.items()
    if isinstance(value, str) or name == 'evaluation.epsilons' or (
        isinstance(value, tuple) and any(isinstance(v, str) for v in value)))


#: Those that name code which reading a run would import.
PARTS = (
    'dataset', 'augmentation.function', 'model.name', 'objective',
    'attack.name', 'weight_perturbation', 'optimizer.name',
    'evaluation.attacks', 'evaluation.curve_attacks')


def stranger(folder, fields):
  """A folder that looks like a run's."""
  folder.mkdir()
  stored = {name: list(value) if isinstance(value, tuple) else value
            for name, value in FIELDS.items()}
  (folder / 'config.json').write_text(json.dumps(stored | fields))
  (folder / 'checkpoints').mkdir()
  return paths.parse(folder)


def read(folder, **keywords):
  """What the commands do with a run's config before they read its weights."""
  config = workdirs.reader_config(
      folder, digits_awp.get_config(), {}, **keywords)
  evaluate.check(config, folder)
  run_lib.reopen(config, folder)


@pytest.mark.parametrize('field', TEXTS)
def test_no_field_runs_code(field, tmp_path):
  made = tmp_path / 'made'
  text = f'os:system(command="touch {made}")'
  is_many = isinstance(FIELDS[field], tuple)
  folder = stranger(tmp_path / 'run', {field: [text] if is_many else text})
  for reader in (
      read, lambda folder: pseudo_labels.prepare(folder, None),
      lambda folder: workdirs.stored_config(folder, digits_awp.get_config())):
    try:
      reader(folder)
    except UserError as error:
      if field in PARTS:
        assert 'names code of another package' in str(error)
    else:
      assert field not in PARTS or (
          # Comparing landscapes takes these from the first run.
          field.startswith('evaluation.'))
  assert not made.exists()


def test_the_code_would_have_been_run(tmp_path):
  """The check is what prevents it, and --trust_run switches it off."""
  made = tmp_path / 'made'
  folder = stranger(tmp_path / 'run', {
      'objective': f'os:system(command="touch {made}")'})
  with pytest.raises(UserError, match='must return an'):
    read(folder, is_trusted=True)
  assert made.exists()


def test_parts_that_the_user_names_are_read(tmp_path):
  text = 'tests.helpers.named_parts:objective'
  folder = stranger(tmp_path / 'run', {'objective': text})
  default = digits_awp.get_config()
  found = workdirs.reader_config(folder, default, {'objective': text})
  assert found.objective == text
  default.objective = text
  assert workdirs.reader_config(folder, default, None) is default
  assert workdirs.stored_config(folder, default).objective == text
  # Another call of the same part is another config.
  with pytest.raises(UserError, match='differs in objective'):
    workdirs.reader_config(
        folder, digits_awp.get_config(), {'objective': f'{text}(weight=2.0)'})


def test_parts_that_are_replaced_or_not_used_are_no_reason(tmp_path):
  folder = stranger(tmp_path / 'run', {
      'loggers': ['mine:Writer'], 'evaluation.attacks': ['mine:attack']})
  default = digits_awp.get_config()
  with pytest.raises(UserError, match=r'evaluation\.attacks'):
    workdirs.reader_config(folder, default, {})
  attacks = {'evaluation.attacks': ('pgd-10',)}
  found = workdirs.reader_config(folder, default, attacks)
  assert found.evaluation.attacks == ('pgd-10',)


def test_a_name_without_a_colon_is_no_part(tmp_path, monkeypatch):
  """Any module of the current folder could be imported by its name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  (tmp_path / 'a_stranger.py').write_text(
      'open("made", "w").close()\ndef f(key, image): return image')
  named.search_here('')
  assert str(tmp_path) not in sys.path  # until a part is loaded
  folder = stranger(tmp_path / 'run', {'augmentation.function': 'a_stranger'})
  with pytest.raises(UserError):
    read(folder)
  assert not (tmp_path / 'made').exists()
  assert named.load('f', 'a_stranger:f')(1, 2) == 2
  assert (tmp_path / 'made').exists()


@pytest.mark.parametrize('is_trusted', [False, True])
def test_the_command_asks(is_trusted, tmp_path, capsys):
  made = tmp_path / 'made'
  folder = stranger(tmp_path / 'run', {
      'objective': f'os:system(command="touch {made}")'})
  np.savez(tmp_path / 'images.npz', image=np.zeros((2, 8, 8, 1), np.uint8))
  code = pseudo_labels.main([
      f'--workdir={folder}', f'--images={tmp_path}/images.npz',
      f'--output={tmp_path}/out.npz', *(['--trust_run'] if is_trusted else [])])
  assert code == 2 and made.exists() == is_trusted
  assert ('--trust_run' in capsys.readouterr().err) != is_trusted


def test_landscapes_of_compared_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(landscape, 'check', lambda config, folder: None)
  whole = stranger(tmp_path / 'whole', {})
  folder = stranger(tmp_path / 'run', {'model.name': 'os:system'})
  with pytest.raises(UserError, match=r'another package: model\.name'):
    landscape.run_all(digits_awp.get_config(), whole, [str(folder)])
