"""Runs whose newest checkpoints are damaged go on, and say so."""

import json
import shutil

import pytest

from experiments.modes import train
from experiments.runs import metrics, reading
from experiments.runs import run as run_lib
from experiments.training import loop
from experiments.training import step as step_lib
from tests.experiments.training.resume_test import (
    arrays_of,
    assert_same,
    config_of,
    images,
    one_network,
    stop_after,
    without_times,
)

__all__ = ['images', 'one_network']

# orbax says so when it reads arrays whose devices it was not told.
pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
  run = run_lib.prepare(
      config_of(images), tmp_path_factory.mktemp('undamaged'))
  train.train(run)
  return run


def best_steps(run):
  """The steps at which the run's best checkpoint was replaced."""
  found, best = [], -1.0
  for line in metrics.read_metrics(run.workdir):
    if line['test_robust_accuracy'] > best:
      best = line['test_robust_accuracy']
      found.append(2 * line['epoch'])
  return found


def damage(run, kind, step):
  """Changes one byte of the values of a checkpoint."""
  folder = run.workdir / 'checkpoints' / kind / str(step)
  path = max(
      (path for path in folder.rglob('*') if path.is_file()),
      key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def stopped(images, folder, step):
  run = run_lib.prepare(config_of(images), folder)
  with pytest.MonkeyPatch.context() as patch:
    stop_after(patch, step)
    assert train.train(run) is None
  return run


def test_the_newest_state_is_damaged(images, whole, tmp_path, capfd):
  """The run repeats an epoch, and ends bit for bit like the whole one."""
  run = stopped(images, tmp_path, 5)
  damage(run, 'last', 5)
  assert train.train(run)['last']['epoch'] == 3
  out = capfd.readouterr().out
  assert 'checkpoint of step 5' in out and 'resuming from step 4 of 6' in out
  assert_same(run, whole)


def test_every_state_is_damaged(images, tmp_path, capfd):
  """Nothing is trained, and no line is lost, until the user decides."""
  run = stopped(images, tmp_path, 5)
  for step in (4, 5):
    damage(run, 'last', step)
  before = metrics.read_metrics(tmp_path)
  for _ in range(2):
    with pytest.raises(reading.CheckpointError, match=(
        r'last checkpoints .* were lost: .* Remove the folder')):
      train.train(run)
    assert metrics.read_metrics(tmp_path) == before != []
  assert checkpoints_of(run, 'best')
  assert 'newer' not in capfd.readouterr().out


@pytest.mark.parametrize('lost', ['markers', 'folders', 'all but lines'])
def test_every_state_is_gone(lost, images, tmp_path):
  """A run that had a state does not start again from nothing."""
  run = stopped(images, tmp_path, 5)
  before = metrics.read_metrics(tmp_path)
  for step in checkpoints_of(run, 'last'):
    place = run.workdir / f'checkpoints/last/{step}'
    if lost == 'markers':
      (place / reading.COMPLETE).unlink()
    else:
      shutil.rmtree(place)
  if lost == 'all but lines':
    shutil.rmtree(run.workdir / 'checkpoints')
  with pytest.raises(reading.CheckpointError, match='were lost'):
    train.train(run)
  assert metrics.read_metrics(tmp_path) == before != []
  if lost == 'markers':
    assert len(list((run.workdir / 'checkpoints/set_aside').iterdir())) == 2


def test_checkpoints_of_another_run_are_refused(images, whole, tmp_path):
  """Whole in themselves, and of the same network."""
  other = run_lib.prepare(config_of(images, seed=7), tmp_path / 'other')
  train.train(other)
  for kind in reading.KINDS:
    folder = tmp_path / kind
    shutil.copytree(whole.workdir, folder)
    shutil.rmtree(folder / 'checkpoints' / kind)
    shutil.copytree(
        other.workdir / 'checkpoints' / kind, folder / 'checkpoints' / kind)
    run = run_lib.prepare(config_of(images), folder)
    for act in (lambda run=run: train.train(run), lambda kind=kind, f=folder: (
        reading.read_variables(f, kind))):
      with pytest.raises(
          reading.CheckpointError, match='not of the run whose config'):
        act()
  stored = json.loads((tmp_path / 'best/config.json').read_text())
  stored['threat.epsilon'] = 0.5
  (tmp_path / 'last/config.json').write_text(json.dumps(stored))
  with pytest.raises(reading.CheckpointError, match='not of the run whose'):
    reading.Reader(tmp_path / 'best', 'last').notes()
    reading.Reader(tmp_path / 'last', 'best').read()


def test_an_ended_run_knows_its_last_line(images, whole, tmp_path):
  """It is newer than the checkpoint; the summary has its checksum."""
  folder = tmp_path / 'run'
  shutil.copytree(whole.workdir, folder)
  path = folder / 'metrics.jsonl'
  lines = metrics.read_metrics(folder)
  lines[-1]['test_robust_accuracy'] = 0.987
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  summary = json.loads((folder / 'summary.json').read_text())
  assert metrics.changed_epochs(lines, summary) == [lines[-1]['epoch']]
  train.train(run_lib.prepare(config_of(images), folder))
  assert without_times(run_lib.prepare(config_of(images), folder)) == (
      without_times(whole))
  summary = json.loads((folder / 'summary.json').read_text())
  assert metrics.changed_epochs(metrics.read_metrics(folder), summary) == []


def test_a_run_that_goes_on_has_no_summary(
    images, whole, tmp_path, monkeypatch):
  """One that had ended, and lost its last state."""
  folder = tmp_path / 'run'
  shutil.copytree(whole.workdir, folder)
  run = run_lib.prepare(config_of(images), folder)
  damage(run, 'last', max(checkpoints_of(run, 'last')))

  def stop(self, position):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop.Loop, 'step_fn', stop)
    patch.setattr(loop.Loop, 'end_epoch', lambda self: stop(self, 0))
    with pytest.raises(KeyboardInterrupt):
      train.train(run)
  assert not (folder / 'summary.json').exists()


def test_the_best_state_is_damaged(images, whole, tmp_path, capfd):
  """The best epoch is one whose state exists, here one that comes later."""
  first = best_steps(whole)[0]
  run = stopped(images, tmp_path, first + 1)
  damage(run, 'best', first)
  summary = train.train(run)
  out = capfd.readouterr().out
  assert f'checkpoint of step {first}' in out
  assert 'is chosen from those up to 0 whose state is kept' in out
  lines = metrics.read_metrics(run.workdir)
  assert [line.get('lost', 0) for line in lines] == [
      int(2 * line['epoch'] <= first) for line in lines]
  assert without_times(whole) == [
      {name: value for name, value in line.items() if name != 'lost'}
      for line in without_times(run)]
  best = reading.Reader(run.workdir, 'best')
  assert best.step() == 2 * summary['best']['epoch'] > first
  later = [line for line in lines if not line.get('lost')]
  assert summary['best']['robust_accuracy'] == max(
      line['test_robust_accuracy'] for line in later)
  arrays_of(run, 'best')
  stored = json.loads((run.workdir / 'summary.json').read_text())
  assert stored['best'] == summary['best']


def test_a_finished_run_reads_its_lost_best(images, tmp_path, capfd):
  """Without a later epoch the best is the last one, whose state is there."""
  run = run_lib.prepare(config_of(images), tmp_path)
  train.train(run)
  steps = best_steps(run)
  for step in checkpoints_of(run, 'best'):
    damage(run, 'best', step)
  summary = train.train(run)
  out = capfd.readouterr().out
  assert summary['best']['epoch'] == summary['last']['epoch'] == 3
  assert reading.Reader(run.workdir, 'best').step() == 6
  assert steps and 'best checkpoint of this run was lost' in out


def checkpoints_of(run, kind):
  return sorted(int(path.name) for path in (
      run.workdir / 'checkpoints' / kind).glob('[0-9]*'))


@pytest.mark.parametrize('last, best', [(0.3, 3), (0.1, 1)])
def test_the_second_best_takes_over(last, best, images, tmp_path):
  """It is the older checkpoint, or the state at the end if that is better."""
  run = run_lib.prepare(config_of(images), tmp_path)
  scores = iter((0.2, 0.4, last))
  with pytest.MonkeyPatch.context() as patch:
    usual = step_lib.evaluate
    patch.setattr(step_lib, 'evaluate', lambda *args: usual(*args) | {
        'test_robust_accuracy': next(scores)})
    assert train.train(run)['best']['epoch'] == 2
  assert checkpoints_of(run, 'best') == [2, 4]
  damage(run, 'best', 4)
  assert train.train(run)['best']['epoch'] == best
  assert reading.Reader(run.workdir, 'best').step() == 2 * best


@pytest.mark.parametrize('how', ['digit', 'key', 'removed', 'file'])
def test_changed_lines_are_not_believed(how, images, whole, tmp_path, capfd):
  """A changed number would be a wrong result; the best line is stored twice."""
  run = stopped(images, tmp_path, 5)
  path = tmp_path / 'metrics.jsonl'
  first, second = path.read_text().splitlines()
  best = best_steps(run)[-1] // 2
  text = (first, second)[2 - best]  # the line that is not the best
  field = '"test_robust_accuracy": '
  assert field in text
  broken = {
      'digit': text.replace(field, field + '1'), 'removed': '', 'file': '',
      'key': text.replace('"test_robust', '"tesT_robust')}[how]
  path.write_text(path.read_text().replace(text, broken))
  if how == 'file':
    path.unlink()
  summary = train.train(run)
  out = capfd.readouterr().out
  assert f'the best epoch is chosen from the others: {3 - best}\n' in out
  lines, wanted = without_times(run), without_times(whole)
  assert lines == [line for line in wanted if line['epoch'] != 3 - best]
  assert summary['last']['epoch'] == 3
  assert checkpoints_of(run, 'best')[-1] == 2 * summary['best']['epoch']


def test_lost_lines_of_steps_are_told(images, tmp_path, capfd):
  stopped(images, tmp_path, 5)
  path = tmp_path / 'steps.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  assert len(lines) == 5
  train.train(run_lib.prepare(config_of(images), tmp_path))
  assert 'damaged' not in capfd.readouterr().out
  path.write_text(''.join(path.read_text().splitlines(keepends=True)[1:]))
  train.train(run_lib.prepare(config_of(images), tmp_path))
  assert 'steps.jsonl was damaged' in capfd.readouterr().out


def test_undamaged_runs_exclude_nothing(whole):
  lines = metrics.read_metrics(whole.workdir)
  assert not any('lost' in line for line in lines)
  # Nothing is set aside, and a finished run is read again without a word.
  assert not (whole.workdir / 'checkpoints/set_aside').exists()
