"""The template project, copied out of the repository, as its README says."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / 'examples' / 'my_project'

#: Shortens the README's commands.
SHORT = {
    'main.py --config': ['--config.epochs=2'],
    '--mode=evaluate': [
        '--config.epochs=2',
        "--config.evaluation.attacks=('my_attack:corner(num_steps=2)',)",
        '--config.evaluation.num_examples=40']}


def commands():
  """The commands of the README that run something, without $AWP_JAX."""
  text = (TEMPLATE / 'README.md').read_text()
  return [line.strip().replace('$AWP_JAX', str(ROOT))
          for line in re.findall(r'^    (.*python.*)', text, re.M)]


def run(command, folder):
  arguments = [part for word, options in SHORT.items() if word in command
               for part in options]
  words = [word for word in command.split() if '=' not in word or (
      word.startswith('--'))]
  assert words[0] == 'python'
  environment = os.environ | dict(
      word.split('=', 1) for word in command.split()
      if re.match('[A-Z]+=', word))
  return subprocess.run(
      [sys.executable, *words[1:], *arguments], cwd=folder, env=environment,
      capture_output=True, text=True, check=False)


def test_the_readme_lists_every_file():
  listed = set(re.findall(
      r'^\| `(\w+\.py)`', (TEMPLATE / 'README.md').read_text(), re.M))
  assert listed == {path.name for path in TEMPLATE.glob('*.py')}


@pytest.mark.slow
def test_a_copy_trains_evaluates_and_passes_its_tests(tmp_path):
  folder = tmp_path / 'my_project'
  shutil.copytree(
      TEMPLATE, folder, ignore=shutil.ignore_patterns('__pycache__'))
  train, evaluate, tests, _ = commands()
  for command in (train, evaluate, tests):
    done = run(command, folder)
    assert done.returncode == 0, done.stderr[-2000:]
  assert '4 passed' in done.stdout
  config = json.loads((folder / 'runs/my_config/config.json').read_text())
  assert config['user.natural_weight'] == 0.5
  assert config['model.kwargs.hidden'] == 16
  summary = json.loads((folder / 'runs/my_config/summary.json').read_text())
  assert summary['best']['natural_accuracy'] > 0.3
  text = (folder / 'runs/my_config/report.html').read_text()
  assert 'my_attack:corner' in text and 'my_data:stripes' in text

  # A value that a part refuses is one line on stderr.
  path = folder / 'my_config.py'
  path.write_text(path.read_text().replace(
      'natural_weight = 0.5', 'natural_weight = 2.0'))
  done = run(f'{train} --workdir=other', folder)
  assert done.returncode == 2
  assert done.stderr.strip().count('\n') == 0, done.stderr
  assert 'user.natural_weight must be in [0, 1], got 2.0' in done.stderr
