"""The Makefile: its choice of Python, and the commands of its demo."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from absl.testing import flagsaver
from flax import linen as nn
import pytest

from experiments import compare, main
from experiments.config import networks
from experiments.reports import page as page_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAKE = shutil.which('make')
NAMES = ('python3.13', 'python3.12', 'python3', 'python3.11')


def make(*arguments, path):
  """Runs make with `path` as the search path."""
  return subprocess.run(
      [MAKE, '--directory', str(ROOT), *arguments], text=True, check=False,
      capture_output=True, env={'PATH': str(path)})


@pytest.fixture
def path(tmp_path):
  """A folder of commands in which each Python runs or is an inactive shim."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def fill(working):
    for name in NAMES:
      status = 0 if name in working else 127
      (folder / name).write_text(f'#!/bin/sh\nexit {status}\n')
      (folder / name).chmod(0o755)
    (folder / 'sh').symlink_to(shutil.which('sh'))
    return folder

  return fill


@pytest.mark.parametrize('working, wanted', [
    (NAMES, 'python3.13'), (NAMES[1:], 'python3.12'), (NAMES[2:], 'python3'),
    (NAMES[3:], 'python3.11')])
def test_the_newest_python_that_runs_is_taken(path, tmp_path, working, wanted):
  venv = tmp_path / 'venv'
  done = make('--dry-run', 'test', f'VENV={venv}', path=path(working))
  assert f'\n{wanted} -m venv {venv}\n' in done.stdout, done.stderr
  named = make('--dry-run', 'test', f'VENV={venv}', 'PYTHON=mine',
               path=tmp_path / 'bin')
  assert f'\nmine -m venv {venv}\n' in named.stdout


def test_missing_python_is_one_line_of_error(path, tmp_path):
  done = make('test', f'VENV={tmp_path}/venv', path=path(()))
  assert done.returncode != 0
  assert 'No Python 3.11 or later that can make environments' in done.stderr
  assert not (tmp_path / 'venv').exists()


def test_old_pythons_are_skipped(path, tmp_path):
  folder = path(())
  # Runs the check on this test's Python with an older version number.
  (folder / 'python3').write_text(
      f'#!/bin/sh\nexec {sys.executable} -c "import sys; '
      'sys.version_info = (3, 10); exec(sys.argv[1])" "$2"\n')
  done = make('--dry-run', 'test', f'VENV={tmp_path}/venv', path=folder)
  assert 'python3 -m venv' not in done.stdout
  text = (folder / 'python3').read_text().replace('(3, 10)', '(3, 11)')
  (folder / 'python3').write_text(text)
  done = make('--dry-run', 'test', f'VENV={tmp_path}/venv', path=folder)
  assert 'python3 -m venv' in done.stdout


def test_ci_runs_the_slow_tests_too():
  listed = make('--dry-run', 'test', 'VENV=venv', path=os.environ['PATH'])
  assert "-m 'not slow'" in listed.stdout
  lines = (ROOT / '.ci/run').read_text().splitlines()
  assert [line for line in lines if line.startswith('make test')] == [
      'make test MARKERS="$selected"']
  # No selection leaves them out, and an empty one is that of all tests.
  values = [match[1] for line in lines if (
      match := re.fullmatch(" *selected='(.*)'", line))]
  assert values == ['not torch', '']
  everything = make(
      '--dry-run', 'test', 'VENV=venv', 'MARKERS=', path=os.environ['PATH'])
  assert "-m ''" in everything.stdout


class TinyNet(nn.Module):
  """Replaces the demo's network, which takes a minute to compile and run."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1))
    return nn.Dense(10)(nn.relu(nn.Dense(8)(x)))


TINY = [f'--config.{field}' for field in (
    'num_train=32', 'num_test=32', 'batch_size=16', 'epochs=1',
    'attack.num_steps=1', 'eval.num_steps=1', 'eval.batch_size=16',
    'eval.num_train=16', 'landscape.num_train=16', 'landscape.num_test=16',
    'landscape.batch_size=16', 'landscape.num_steps=1', 'landscape.points=3',
    'landscape.num_directions=1')]


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
  """The recipe's commands, with few images and a tiny network."""
  listed = make('--dry-run', 'demo', 'VENV=venv', path=os.environ['PATH'])
  commands = [
      shlex.split(line)[1:] for line in listed.stdout.replace(
          '\\\n', ' ').splitlines() if line.startswith('venv/bin/python ')]
  names = [command[0] for command in commands]
  assert names == 3 * ['experiments/main.py'] + ['experiments/compare.py']
  (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['main.py'])  # main.parse modifies it.
  monkeypatch.setattr(networks, 'build', lambda config, dataset: TinyNet())
  monkeypatch.setattr(page_lib, 'write_or_warn', lambda run, mode: None)
  for script, *arguments in commands:
    if script == 'experiments/compare.py':
      compare.main(arguments)
    else:
      with flagsaver.flagsaver():
        main.main(main.parse([script, *arguments, *TINY]))
  printed = capsys.readouterr().out
  demo = tmp_path / 'runs/demo'
  gammas = {
      path.parent.name: json.loads(path.read_text())['awp.gamma']
      for path in demo.glob('*/config.json')}
  assert gammas == {'AT': 0, 'AT-AWP': 0.01}
  for name in gammas:  # The second run also measures the first.
    landscape = json.loads((demo / name / 'landscape.json').read_text())
    for entry in landscape['subjects'].values():
      assert {'random', 'adversarial'} <= set(entry)
      assert not entry.get('plane')
  page = (demo / 'comparison.html').read_text()
  assert (demo / 'comparison.png').stat().st_size > 1000
  for name in gammas:
    assert re.search(rf'\b{name}\b', printed) and name in page
  assert 'flat' in page
