"""Tests of the command in real processes, some of which are killed."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from experiments.runs import metrics
from tests.experiments.modes import train_test
from tests.helpers import command_server

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAIN = ROOT / 'experiments/main.py'
CONFIGS = ROOT / 'experiments/configs'

#: Four steps per epoch; also saved at steps three, six and nine.
TINY = [f'--config.{field}' for field in (
    'model.depth=10', 'model.width=1',
    'num_train=64', 'num_test=32', 'batch_size=16', 'epochs=3',
    'attack.num_steps=1', 'eval.num_steps=1', 'eval.batch_size=32',
    'eval.num_train=32', 'eval.every_epochs=1', 'log_every_steps=2',
    'checkpoint_every_steps=3',
    'awp.gamma=0.01')]

#: Everything that a run may print.
OWN_LINES = re.compile(
    r'compiling the step for \d+ images, with AWP'
    r'|step \d+/12  \d+ images/s  \d:\d\d:\d\d left  loss \d\.\d{4}'
    r'|epoch \d/3  loss \d\.\d{4}  train: natural .* images/s'
    r'|robust accuracy: best 0\.\d{4} \(epoch \d\), last 0\.\d{4}; results in '
    r'\S+')


class Command:
  """Starts `main.py` with one device, the tests' cache, and no terminal."""

  def __init__(self, folder):
    self.folder = folder
    self.environment = os.environ | {
        'PYTHONUNBUFFERED': '1', 'TF_CPP_MIN_LOG_LEVEL': '3',
        'XLA_FLAGS': os.environ['XLA_FLAGS'].replace(
            '--xla_force_host_platform_device_count=8', '')}

  def start(self, *arguments):
    return subprocess.Popen(
        [sys.executable, str(MAIN), *arguments], cwd=self.folder, text=True,
        env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def finish(self, *arguments):
    process = self.start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  return Command(tmp_path_factory.mktemp('main'))


@pytest.fixture(scope='module')
def forked(tmp_path_factory):
  """Starts `main.py` without the time of its imports."""
  command = Command(tmp_path_factory.mktemp('forked'))
  server = command_server.Server(command.folder, command.environment)
  yield server
  server.close()


@pytest.fixture(scope='module')
def uninterrupted(command):
  """(folder, stdout, stderr) of an uninterrupted run."""
  code, out, err = command.finish(*TINY)
  assert code == 0, err
  return command.folder / 'runs/digits_awp', out, err


def saved_steps(folder, kind):
  """Steps of the complete checkpoints."""
  place = folder / 'checkpoints' / kind
  if not place.is_dir():
    return []
  return [int(path.name) for path in place.iterdir() if path.name.isdecimal()]


def wait_for(condition, process):
  """Waits for `condition()`; fails if the process ends first."""
  end = time.monotonic() + 100
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end
    time.sleep(0.005)


def arrays_of(folder, kind):
  """{path: array} of the newest checkpoint."""
  step = max(saved_steps(folder, kind))
  tree = ocp.load(folder / 'checkpoints' / kind / str(step))

  def flatten(tree, prefix=''):
    if isinstance(tree, dict):
      items = tree.items()
    elif isinstance(tree, list | tuple):
      items = enumerate(tree)
    else:
      return {} if tree is None else {prefix: np.asarray(tree)}
    return {
        path: leaf for name, part in items
        for path, leaf in flatten(part, f'{prefix}/{name}').items()}

  return step, flatten(tree)


def without_times(folder):
  return [
      {name: value for name, value in line.items()
       if name not in metrics.TIMING_FIELDS}
      for line in metrics.read_metrics(folder)]


def assert_same_run(folder, wanted):
  """Asserts bitwise equal states, and equal metrics and summaries."""
  for kind in ('last', 'best'):
    step, arrays = arrays_of(folder, kind)
    wanted_step, wanted_arrays = arrays_of(wanted, kind)
    assert step == wanted_step and arrays.keys() == wanted_arrays.keys()
    assert len(arrays) > 50
    for path, array in arrays.items():
      assert array.dtype == wanted_arrays[path].dtype
      assert array.tobytes() == wanted_arrays[path].tobytes(), path
  assert without_times(folder) == without_times(wanted)
  summaries = [
      json.loads((place / 'summary.json').read_text())
      for place in (folder, wanted)]
  for name in ('best', 'last', 'robust_generalisation_gap', 'dataset'):
    assert summaries[0][name] == summaries[1][name]


@pytest.mark.slow
def test_run_prints_its_own_lines_only(uninterrupted):
  folder, out, err = uninterrupted
  assert err == ''
  for line in out.splitlines():
    assert OWN_LINES.fullmatch(line), line
  assert len(re.findall('^epoch ', out, re.M)) == 3
  assert 'results in runs/digits_awp' in out
  # The default folder has the name of the config.
  assert sorted(saved_steps(folder, 'last')) == [9, 12]
  stored = json.loads((folder / 'config.json').read_text())
  assert (stored['num_train'], stored['awp.gamma']) == (64, 0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Sharding info not provided')
def test_killed_and_stopped_run_ends_bit_identical(command, uninterrupted):
  folder = command.folder / 'killed'
  arguments = [*TINY, f'--workdir={folder}']

  # Killed before there is a checkpoint.
  process = command.start(*arguments)
  assert process.stdout.readline().startswith('compiling')
  process.kill()
  process.communicate()
  assert (folder / 'config.json').exists() and not saved_steps(folder, 'last')

  # Killed in the middle of the second epoch.
  process = command.start(*arguments)
  wait_for(lambda: 6 in saved_steps(folder, 'last'), process)
  process.kill()
  out, _ = process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert max(saved_steps(folder, 'last')) == 6
  assert 'resuming' not in out and 'epoch 1/3' in out

  # Stopped in the third.
  process = command.start(*arguments)
  # Training goes on while a checkpoint is written.
  wait_for(lambda: max(saved_steps(folder, 'last')) > 6, process)
  process.terminate()
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0 and err == ''
  assert 'resuming from step 6 of 12' in out and 'epoch 1/3' not in out
  saved = re.search(r'^SIGTERM: saved step (\d+) of 12 in (\S+);', out, re.M)
  assert saved and saved[2] == str(folder)
  step = max(saved_steps(folder, 'last'))
  assert 6 < step == int(saved[1]) <= 12
  assert not (folder / 'summary.json').exists()

  code, out, err = command.finish(*arguments)
  assert code == 0, err
  assert f'resuming from step {step} of 12' in out
  assert_same_run(folder, uninterrupted[0])


def test_config_with_an_argument(command):
  images = train_test.write_images(command.folder / 'images.npz')
  path = ROOT / 'experiments/configs/cifar10_awp.py'
  process = command.start(f'--config={path}:L2', *(f'--config.{f}' for f in (
      'dataset=npz', f'npz_path={images}', 'model.width=1', 'model.depth=10',
      'batch_size=16', 'eval.batch_size=16')))
  assert process.stdout.readline().startswith('compiling')
  process.kill()
  process.communicate()
  stored = json.loads(
      (command.folder / 'runs/cifar10_awp+L2/config.json').read_text())
  assert stored['threat.norm'] == 'L2'
  assert stored['threat.epsilon'] == 128 / 255
  assert (stored['model.width'], stored['batch_size']) == (1, 16)


def without_seconds(value):
  """The contents of evaluation.json without times."""
  if isinstance(value, dict):
    return {
        name: without_seconds(part) for name, part in value.items()
        if name != 'seconds'}
  if isinstance(value, list):
    return [without_seconds(part) for part in value]
  return value


@pytest.mark.slow
def test_killed_evaluation_ends_with_the_same_result(command, uninterrupted):
  copies = []
  for name in ('evaluated', 'evaluated-and-killed'):
    copies.append(command.folder / name)
    shutil.copytree(uninterrupted[0], copies[-1])
  whole, killed = copies
  # The config is read from the folder.
  arguments = [
      '--mode=evaluate', '--config.evaluation.batch_size=8',
      "--config.evaluation.attacks=('fgsm', 'apgd-ce')"]
  code, out, err = command.finish(*arguments, f'--workdir={whole}')
  assert code == 0, err
  records = len(list((whole / 'evaluation').rglob('*.npz')))

  process = command.start(*arguments, f'--workdir={killed}')

  def written():
    return len(list((killed / 'evaluation').rglob('[0-9]*.npz')))

  wait_for(lambda: written() >= 2, process)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert 2 <= written() < records
  assert not (killed / 'evaluation.json').exists()
  before = {
      path: path.stat().st_mtime_ns
      for path in (killed / 'evaluation').rglob('[0-9]*[0-9].npz')}

  code, again, err = command.finish(*arguments, f'--workdir={killed}')
  assert code == 0, err
  # Existing records are read, not written again.
  assert all(
      path.stat().st_mtime_ns == when for path, when in before.items())
  results_of = [
      json.loads((folder / 'evaluation.json').read_text())
      for folder in (whole, killed)]
  assert without_seconds(results_of[0]) == without_seconds(results_of[1])
  for text in (out, again):
    assert 'apgd-ce' in text and 'results: ' in text


@pytest.mark.parametrize('arguments, shown', [
    (['--config.gama=1'], "unknown field 'gama'. Did you mean 'awp.gamma'?"),
    (['--config.awp.gama=1'], "'awp.gama'. Did you mean 'awp.gamma'?"),
    (['--config.epochs=abc'], "--config.epochs=abc: invalid literal"),
    (['--config=nowhere.py'], 'nowhere.py: there is no such file'),
    ([f'--config={CONFIGS}/digits_at.py:L2'],
     "digits_at.py:L2: this config takes no argument after ':'."),
    ([f'--config={CONFIGS}/cifar10_awp.py:L3'],
     "cifar10_awp.py:L3: ValueError: the argument of a config may name Linf"),
    (['--config.threat.epsilon=-1'], 'threat.epsilon must be a finite number'),
    (['--config.dataset=cifr10'], "Did you mean 'cifar10'?"),
    (['--mode=evaluate', '--workdir=new'],
     'holds no checkpoints: train there first'),
    (['--mode=landscape', '--workdir=new'],
     'holds no checkpoints: train there first'),
    (['--mode=landscape', '--config.landscape.points=4'],
     'landscape.points must be an odd number >= 3'),
    (['--compare_to=a,b'], '--compare_to requires --mode=landscape'),
    (['--mode=trian'], 'one of <train|evaluate|landscape|compile>'),
    (['--mode=compile'], '--mode=compile and --target require each other'),
    (['--target=h100:8'], '--mode=compile and --target require each other'),
    (['--mode=compile', '--target=v5e:3x3'], 'the slices of v5e are 1x1, 2x2'),
    (['--workdir='], '--workdir= is empty'),
    (['--trust_run'], '--trust_run requires --mode=evaluate'),
    (['--config.epochs=2147483647'], 'are more than 2,147,483,647 steps'),
    (['--config.seed=4294967296'], 'seed must be a whole number in [0, 2^32)'),
    (['--wrkdir=x'], "'wrkdir'. Did you mean: workdir"),
    (['--workdir=file/run'], "'file/run' cannot be written to"),
    (['cifar10_awp'], 'unknown arguments: cifar10_awp'),
], ids=lambda value: value[0] if isinstance(value, list) else '')
def test_wrong_flags(forked, arguments, shown):
  (forked.folder / 'file').write_text('')
  code, out, err = forked.finish(*arguments)
  assert code == 2 and out == ''
  assert re.fullmatch(r'error: [^\n]+\n', err) and shown in err, err


@pytest.mark.slow
def test_workdir_of_another_config(forked, uninterrupted):
  folder = uninterrupted[0]
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  code, out, err = forked.finish(
      *TINY, '--config.seed=5', f'--workdir={folder}')
  assert code == 2 and out == ''
  assert re.fullmatch(r'error: [^\n]+\n', err)
  assert 'another config' in err and 'seed (0 there, 5 now)' in err
  # No file is touched.
  after = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  assert before == after
