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

from experiments.runs import checkpoints, metrics
from tests.experiments.modes import train_test

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(__file__).parents[2] / 'helpers' / 'worker.py'

#: Twenty steps: five epochs of four.
FIELDS = {
    'epochs': 5, 'batch_size': 12, 'attack.num_steps': 2,
    'eval.num_steps': 2, 'eval.batch_size': 24, 'eval.num_train': 16,
    'eval.every_epochs': 1, 'awp.warmup_epochs': 1, 'num_train': 0,
    'num_test': 0, 'log_every_steps': 1, 'evaluation.batch_size': 8,
    'landscape.points': 3, 'landscape.plane_points': 0,
    'landscape.num_directions': 1, 'landscape.num_steps': 1,
    'landscape.adversarial_range': 0.0}

TIMING = (*metrics.TIMING_FIELDS, 'judged_by')


class Team:
  """The processes of one command."""

  def __init__(self, images, workdir, count, faults=None, modes='train'):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    flags = os.environ['XLA_FLAGS'].replace(
        'device_count=8', f'device_count={4 // count}')
    self.processes = []
    for number in range(count):
      command = [
          sys.executable, str(WORKER), (faults or {}).get(number, 'none'),
          modes, f'--workdir={workdir}', '--config.dataset=npz',
          f'--config.npz_path={images}',
          "--config.evaluation.attacks=('pgd-2', 'apgd-ce')",
          *(f'--config.{name}={value}' for name, value in FIELDS.items())]
      if count > 1:
        command += [
            f'--coordinator=localhost:{port}', f'--num_processes={count}',
            f'--process_id={number}']
      self.processes.append(subprocess.Popen(
          command, env=os.environ | {'XLA_FLAGS': flags}, text=True,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE))

  def end(self):
    """Waits; exit statuses, and both outputs of each process."""
    outputs = [p.communicate(timeout=150) for p in self.processes]
    return [p.returncode for p in self.processes], outputs


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  return train_test.write_images(
      tmp_path_factory.mktemp('images') / 'mine.npz', num_train=44)


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
  trees = [checkpoints.Reader(folder, 'last').read().tree
           for folder in (first, second)]
  leaves = [jax.tree.leaves([tree[name] for name in parts]) for tree in trees]
  return max(
      np.max(np.abs(np.asarray(a, np.float64) - b))
      for a, b in zip(*leaves, strict=True))


def test_training_does_not_depend_on_the_processes(teams):
  one, two = teams
  assert largest_difference(one, two) < 1e-6
  expected, found = lines_of(one), lines_of(two)
  assert len(expected) == len(found) == 5
  for line, other in zip(expected, found, strict=True):
    assert line.keys() == other.keys()
    for name, value in line.items():
      assert other[name] == pytest.approx(value, rel=1e-5), name


def test_evaluation_does_not_depend_on_the_processes(teams):
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


def test_landscape_does_not_depend_on_the_processes(teams):
  expected, found = (
      json.loads((folder / 'landscape.json').read_text())['subjects']['last']
      for folder in teams)
  for split in ('train', 'test'):
    np.testing.assert_allclose(
        found['random'][split]['robust_loss']['mean'],
        expected['random'][split]['robust_loss']['mean'], rtol=1e-5)
  assert list(teams[1].glob('landscape/*.process-1.jsonl'))


@pytest.mark.parametrize('fault, reason', [
    ('SIGKILL', 'process 1 has been silent'),
    ('error', 'process 1 failed: RuntimeError: a fault of the test')])
def test_a_lost_process_ends_the_others_and_the_run_goes_on(
    fault, reason, teams, images, tmp_path):
  codes, outputs = Team(images, tmp_path, 2, {1: f'6:{fault}'}).end()
  assert codes[0] == 1 and codes[1] != 0
  errors = [
      line for line in outputs[0][1].splitlines() if 'error:' in line]
  assert reason in errors[0]
  codes, outputs = Team(images, tmp_path, 2).end()
  assert codes == [0, 0] and 'resuming from step 4 of 20' in outputs[0][0]
  assert largest_difference(
      teams[1], tmp_path, ('params', 'opt_state', 'sums')) == 0
  assert lines_of(tmp_path) == lines_of(teams[1])


def test_a_signal_to_one_process_stops_all_at_the_same_step(
    teams, images, tmp_path):
  codes, outputs = Team(images, tmp_path, 2, {1: '5:SIGTERM'}).end()
  assert codes == [0, 0], outputs
  assert 'SIGTERM: saved step' in outputs[0][0]
  saved = checkpoints.Reader(tmp_path, 'last').read()
  assert 5 <= saved.step < 20 and saved.notes['num_processes'] == 2
  codes, outputs = Team(images, tmp_path, 1).end()
  assert codes == [0], outputs
  assert 'resuming with 1 processes instead of 2' in outputs[0][0]
  assert largest_difference(teams[1], tmp_path) < 1e-6


def test_processes_with_different_settings_are_refused(images, tmp_path):
  team = Team(images, tmp_path, 2)
  other = team.processes[1]
  arguments = [*other.args, '--config.seed=7']
  other.kill()
  other.communicate()
  team.processes[1] = subprocess.Popen(
      arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace(
          'device_count=8', 'device_count=2')})
  codes, outputs = team.end()
  assert codes == [2, 2]
  assert 'the processes differ in the config: seed is' in outputs[0][1]
