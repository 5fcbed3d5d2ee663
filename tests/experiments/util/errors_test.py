"""Tests of error output: one line for user errors, a traceback for bugs."""

import inspect
import re
import sys

from absl import flags
import jax
import pytest

from experiments import main
from experiments.config import build, help, networks, schema
from experiments.configs import base
from experiments.data import datasets
from experiments.modes import evaluate, landscape, train
from experiments.runs import run as run_lib
from experiments.util import errors
from tests.experiments.modes.train_test import small

#: Raised by ml_collections when it reads configs.
pytestmark = pytest.mark.filterwarnings(
    'ignore:the load_module:DeprecationWarning')


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs `main.py` in this process: (exit code or None, its output)."""
  monkeypatch.setattr(sys, 'argv', sys.argv[:])

  def call(*arguments):
    try:
      main.main(main.parse(['main.py', *arguments]))
    except SystemExit as left:
      return left.code, capsys.readouterr()
    finally:
      flags.FLAGS.unparse_flags()
      flags.FLAGS['debug'].value = False
      flags.FLAGS['mode'].value = 'train'
      flags.FLAGS['compilation_cache'].value = None
    return None, capsys.readouterr()

  return call


def broken(*_, **__):
  raise ValueError('two shapes do not fit')


@pytest.mark.parametrize('mode', ['train', 'evaluate', 'landscape'])
def test_a_bug_keeps_its_traceback(mode, command, monkeypatch, tmp_path):
  monkeypatch.setattr(run_lib, 'prepare', lambda *_: None)
  monkeypatch.setattr(evaluate, 'check', lambda *_: None)
  for owner, name in (
      (evaluate, 'evaluate'), (train, 'train'), (landscape, 'run_all')):
    monkeypatch.setattr(owner, name, broken)
  with pytest.raises(ValueError, match='two shapes do not fit'):
    command(f'--mode={mode}', f'--workdir={tmp_path}')


@pytest.mark.parametrize('raised', [
    errors.UserError('a bad\nvalue'), datasets.DataError('a bad\nvalue'),
    OSError('a bad\nvalue')])
@pytest.mark.parametrize('debug', [False, True])
def test_an_error_of_the_user_is_one_line(
    raised, debug, command, monkeypatch, tmp_path):
  def fail(*_):
    raise raised

  monkeypatch.setattr(run_lib, 'prepare', fail)
  code, shown = command(
      f'--workdir={tmp_path}', *['--debug'] * debug)
  assert code == 2 and shown.out == ''
  *before, last = shown.err.splitlines()
  assert last == 'error: a bad value'
  assert (before[:1] == ['Traceback (most recent call last):']) == debug
  assert bool(before) == debug


@pytest.mark.parametrize('fields', [
    {'threat__epsilon': -1.0}, {'objective': 'PGD'},
    {'weight_perturbation': 'sam(rho=-1)'}, {'optimizer__momentum': 2.0}])
def test_checks_of_configs_raise_errors_of_the_user(fields):
  config = base.get_config()
  config.update_from_flattened_dict(
      {name.replace('__', '.'): value for name, value in fields.items()})
  with pytest.raises(errors.UserError):
    build.build(config)


def test_a_network_that_cannot_be_is_an_error_of_the_user():
  config = small(model__depth=11)
  with pytest.raises(errors.UserError, match='6 n'):
    networks.build(config, datasets.load('digits', num_train=10))


def test_errors_pass_through_once():
  first = errors.UserError('a')
  with pytest.raises(errors.UserError) as caught, errors.user_errors():
    raise first
  assert caught.value is first
  with pytest.raises(KeyError), errors.user_errors():
    raise KeyError('b')
  with pytest.raises(errors.UserError, match='c') as caught:
    with errors.user_errors():
      raise ValueError('c')
  assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull'])
def test_help_shows_flags_and_fields(flag, command):
  code, shown = command(flag)
  assert code == 0 and shown.err == ''
  for name in ('--config', '--workdir', '--mode', '--debug', '--compare_to'):
    assert f'{name}:' in shown.out or f'[no]{name[2:]}:' in shown.out
  assert help.text() in shown.out


def test_help_has_every_field_once_with_its_default_and_comment():
  text = help.text()
  shown = dict(re.findall(r'^  --config\.([\w.]+)=(.*?)(?:  .*)?$', text, re.M))
  fields = schema.flatten(base.get_config())
  assert shown.keys() == fields.keys()
  assert len(re.findall('^  --', text, re.M)) == len(fields)
  for name, value in fields.items():
    assert shown[name].strip('"') == str(value)
  source = inspect.getsource(base)
  comments = [c.strip() for c in re.findall(r'# (.*)', source)]
  assert len(comments) > 80
  for comment in comments:
    assert comment in text, comment
  assert all(len(line) <= 110 for line in text.splitlines())


def test_compilation_cache_is_set_before_anything_runs(
    command, monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(jax.config, 'update', lambda *pair: seen.append(pair))
  monkeypatch.setattr(run_lib, 'prepare', lambda *_: seen.append('prepare'))
  monkeypatch.setattr(train, 'train', lambda run: None)
  command(f'--compilation_cache={tmp_path}/cache', f'--workdir={tmp_path}')
  assert seen == [
      ('jax_compilation_cache_dir', f'{tmp_path}/cache'), 'prepare']
  seen.clear()
  command(f'--workdir={tmp_path}')
  assert seen == ['prepare']
