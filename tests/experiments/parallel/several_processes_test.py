"""Two processes of two devices against one of four: training and evaluation."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.runs import metrics, reading
from tests.experiments.modes import train_test

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(__file__).parents[2] / 'helpers' / 'worker.py'

#: Twenty steps: five epochs of four.
FIELDS = {
    'epochs': 5, 'batch_size': 12, 'attack.num_steps': 2,
    'eval.num_steps': 2, 'eval.batch_size': 24, 'eval.num_train': 16,
    'eval.every_epochs': 1, 'awp.warmup_epochs': 0, 'num_train': 0,
    'num_test': 0, 'log_every_steps': 1, 'evaluation.batch_size': 8,
    'landscape.points': 3, 'landscape.plane_points': 0,
    'landscape.num_directions': 1, 'landscape.num_steps': 1,
    'landscape.adversarial_range': 0.0}

TIMING = (*metrics.TIMING_FIELDS, 'judged_by')


class Team:
  """The processes of one command."""

  def __init__(
      self, images, workdir, count, faults=None, modes='train', **fields):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    flags = os.environ['XLA_FLAGS'].replace(
        'device_count=8', f'device_count={4 // count}')
    self.processes, self.environment = [], os.environ | {'XLA_FLAGS': flags}
    for number in range(count):
      command = [
          sys.executable, str(WORKER), (faults or {}).get(number, 'none'),
          modes, f'--workdir={workdir}', '--config.dataset=npz',
          f'--config.npz_path={images}',
          "--config.evaluation.attacks=('apgd-ce',)",
          *(f'--config.{name}={value}'
            for name, value in (FIELDS | fields).items())]
      if count > 1:
        command += [
            f'--coordinator=localhost:{port}', f'--num_processes={count}',
            f'--process_id={number}']
      self.processes.append(subprocess.Popen(
          command, env=self.environment, text=True,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE))

  def end(self):
    """Waits; exit statuses, and both outputs of each process."""
    try:
      outputs = [p.communicate(timeout=300) for p in self.processes]
    finally:
      for process in self.processes:
        process.kill()
    return [p.returncode for p in self.processes], outputs


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  return train_test.write_images(
      tmp_path_factory.mktemp('images') / 'mine.npz', num_train=48)


@pytest.fixture(scope='module')
def teams(images, tmp_path_factory):
  """Workdirs of one process and of two, after all modes."""
  folder = tmp_path_factory.mktemp('teams')
  modes = 'train,evaluate,landscape'
  for name, count in (('one', 1), ('two', 2)):
    codes, outputs = Team(images, folder / name, count, modes=modes).end()
    assert codes == [0] * count, outputs
    if count == 2:
      assert 'epoch 5/5' in outputs[0][0] and 'epoch' not in outputs[1][0]
  return folder / 'one', folder / 'two'


def lines_of(workdir):
  return [
      {name: value for name, value in line.items() if name not in TIMING}
      for line in metrics.read_metrics(workdir)]


def largest_difference(
    first, second, parts=('params', 'batch_stats', 'opt_state')):
  trees = [reading.Reader(folder, 'last').read().tree
           for folder in (first, second)]
  leaves = [jax.tree.leaves([tree[name] for name in parts]) for tree in trees]
  return max(
      np.max(np.abs(np.asarray(a, np.float64) - b))
      for a, b in zip(*leaves, strict=True))


def check_training(teams):
  one, two = teams
  assert largest_difference(one, two) < 1e-6
  expected, found = lines_of(one), lines_of(two)
  assert len(expected) == len(found) == 5
  for line, other in zip(expected, found, strict=True):
    assert line.keys() == other.keys()
    for name, value in line.items():
      assert other[name] == pytest.approx(value, rel=1e-5), name


def check_evaluation(teams):
  expected, found = (
      json.loads((folder / 'evaluation.json').read_text())['subjects']
      for folder in teams)
  assert expected.keys() == found.keys()
  for kind, subject in expected.items():
    for name, evaluation in subject['evaluations'].items():
      other = found[kind]['evaluations'][name]
      assert other['robust'] == evaluation['robust']
      assert [a['broken'] for a in other['attacks']] == [
          a['broken'] for a in evaluation['attacks']]
  attacked = [path.name for path in teams[1].glob('evaluation/*/*.npz')]
  assert any('process-1' in name for name in attacked)


def check_landscape(teams):
  expected, found = (
      json.loads((folder / 'landscape.json').read_text())['subjects']['last']
      for folder in teams)
  for split in ('train', 'test'):
    np.testing.assert_allclose(
        found['random'][split]['robust_loss']['mean'],
        expected['random'][split]['robust_loss']['mean'], rtol=1e-5)
  assert list(teams[1].glob('landscape/*.process-1.jsonl'))


def attacked_examples(workdir):
  """Evaluation and attack -> whether by process 1, and its examples."""
  found = {}
  for path in workdir.glob('evaluation/*/*.npz'):
    with np.load(path) as record:
      found.setdefault((path.parent.name, str(record['attack'])), []).append(
          ('process-1' in path.name, record['indices']))
  return found


def check_division(teams):
  evaluations = attacked_examples(teams[1])
  for records in evaluations.values():
    indices = np.concatenate([indices for _, indices in records])
    assert len(set(indices)) == len(indices)  # none is attacked twice
    sizes = [sum(len(i) for is_other, i in records if is_other == other)
             for other in (False, True)]
    assert abs(sizes[0] - sizes[1]) <= 1
  for path in teams[1].glob('landscape/*.process-1.jsonl'):
    points = [
        [(line['series'], line['split'], tuple(line['point']))
         for line in map(json.loads, file.read_text().splitlines())
         if 'point' in line]
        for file in (path, path.with_name(
            path.name.replace('.process-1', '')))]
    assert points[0] and points[1] and not set(points[0]) & set(points[1])


def check_lost(images, workdir, fault, reason):
  """Process 1 is lost after step 6; process 0 ends with the reason."""
  codes, outputs = Team(
      images, workdir, 2, {1: f'6:{fault}'}, data_on_device_gib=0).end()
  assert codes[0] == 1 and codes[1] != 0
  assert 'training images stay on the host' in outputs[0][0]
  errors = [
      line for line in outputs[0][1].splitlines() if 'error:' in line]
  assert reason in errors[0]


def check_resumed(teams, images, workdir):
  """The same command goes on to the same end, bit for bit."""
  check_lost(images, workdir, 'SIGKILL', 'process 1 has been silent')
  codes, outputs = Team(images, workdir, 2).end()
  assert codes == [0, 0] and 'resuming from step 4 of 20' in outputs[0][0]
  assert largest_difference(
      teams[1], workdir, ('params', 'opt_state', 'sums')) == 0
  assert lines_of(workdir) == lines_of(teams[1])


def check_signal(teams, images, workdir):
  """A signal to process 1 stops both; one process goes on, and says so."""
  codes, outputs = Team(images, workdir, 2, {1: '5:SIGTERM'}).end()
  assert codes == [0, 0], outputs
  assert 'SIGTERM: saved step' in outputs[0][0]
  saved = reading.Reader(workdir, 'last').read()
  assert 5 <= saved.step < 20 and saved.notes['num_processes'] == 2
  codes, outputs = Team(images, workdir, 1).end()
  assert codes == [0], outputs
  assert 'resuming with 1 processes instead of 2' in outputs[0][0]
  assert largest_difference(teams[1], workdir) < 1e-6


def test_two_processes_are_as_one(teams, images, tmp_path):
  # One test, because pytest-xdist would run the teams once per worker.
  check_training(teams)
  check_evaluation(teams)
  check_landscape(teams)
  check_division(teams)
  check_resumed(teams, images, tmp_path / 'killed')
  check_signal(teams, images, tmp_path / 'stopped')


def test_an_error_in_one_process_ends_the_others(images, tmp_path):
  check_lost(images, tmp_path, 'error',
             'process 1 failed: RuntimeError: a fault of the test')


def test_workdirs_that_are_not_shared_are_refused(images, tmp_path):
  team = Team(images, tmp_path / 'one', 2)
  arguments = [
      argument.replace(f'workdir={tmp_path}/one', f'workdir={tmp_path}/two')
      for argument in team.processes[1].args]
  team.processes[1].kill()
  team.processes[1].communicate()
  team.processes[1] = subprocess.Popen(
      arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=team.environment)
  codes, outputs = team.end()
  assert codes == [2, 2], outputs
  assert 'which they must share' in outputs[0][1]
  assert not list((tmp_path / 'one').iterdir())
