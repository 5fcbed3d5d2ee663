"""Writers of metrics: what they get, where it goes, and refusals."""

import importlib.util
import json
import os
import pathlib
import struct
import sys
from typing import ClassVar

import pytest
from tensorboardX import record_writer

from experiments.runs import metrics, writers
from experiments.util.errors import UserError
from tests.experiments.runs import metrics_test

PARTS = 'tests.experiments.runs.writers_test'
CONFIG = {'awp.gamma': 0.01, 'dataset': 'digits'}
EPOCHS = [{'epoch': 1, 'train_loss': 2.0, 'precision': 'float32'},
          {'epoch': 2, 'train_loss': 1.0, 'precision': 'float32'}]
STEPS = [{'step': step, 'loss': 3.0 / step, 'images': 16.0}
         for step in (1, 2, 3, 4)]


class Kept:
  """A user's writer that records every call."""

  made: ClassVar[list] = []

  def __init__(self, workdir, config, prefix=''):
    self.place, self.config, self.prefix = workdir, config, prefix
    self.epochs, self.steps, self.closed = [], [], False
    type(self).made.append(self)

  def epoch(self, line):
    self.epochs.append(line)

  def step(self, line):
    self.steps.append(line)

  def close(self):
    self.closed = True


def log_of(folder, names, epochs=0, steps=0):
  return metrics.MetricsLog(folder, epochs, steps, names, CONFIG)


def write(log, epochs=EPOCHS, steps=STEPS):
  for line in steps:
    log.append_step(line)
  for line in epochs:
    log.append(line)
  log.close()


def test_a_writer_of_another_package(tmp_path):
  write(log_of(tmp_path, (f'{PARTS}:Kept(prefix="a")',)))
  # Pytest may have imported this file under another name.
  kept = sys.modules[PARTS].Kept.made.pop()
  assert kept.epochs == EPOCHS and kept.steps == STEPS and kept.closed
  assert (kept.place, kept.config, kept.prefix) == (tmp_path, CONFIG, 'a')
  assert metrics.read_metrics(tmp_path) == EPOCHS
  assert metrics.read_lines(tmp_path / 'steps.jsonl', 'step') == STEPS
  assert not (tmp_path / 'tensorboard').exists()


def test_lines_of_steps_after_the_restored_state_are_removed(tmp_path):
  write(log_of(tmp_path, ()))
  with (tmp_path / 'steps.jsonl').open('a') as file:
    file.write('{"step": 5, "lo')
  log_of(tmp_path, (), epochs=1, steps=3).close()
  assert metrics.read_lines(tmp_path / 'steps.jsonl', 'step') == STEPS[:3]
  assert metrics.read_metrics(tmp_path) == EPOCHS[:1]


def test_numbers_of_a_line():
  assert writers.scalars(
      {'epoch': 1, 'step': 2, 'a': 1, 'b': 0.5, 'c': 'x', 'd': None}) == {
          'a': 1.0, 'b': 0.5}


def test_two_starts_within_a_second_keep_all_events(tmp_path):
  log_of(tmp_path, ('tensorboard',)).close()
  write(log_of(tmp_path, ('tensorboard',)))
  assert len(list((tmp_path / 'tensorboard').glob('*tfevents*'))) == 2


def test_a_full_disk_is_an_error_and_hangs_nothing(tmp_path, monkeypatch):
  """Hundreds of values, where a queue of ten would fill up."""
  log = log_of(tmp_path, ('tensorboard', f'{PARTS}:Kept'))
  kept = log._writers[1]

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(record_writer.RecordWriter, 'write', full)
  for _ in range(20):
    with pytest.raises(OSError, match='No space left'):
      log.append(EPOCHS[0] | {f'value{i}': 1.0 for i in range(20)})
  closed = []
  monkeypatch.setattr(record_writer.RecordWriter, 'flush', full)
  monkeypatch.setattr(kept, 'close', lambda: closed.append(kept))
  with pytest.raises(OSError, match='No space left'):
    log.close()
  assert closed == [kept]


def test_tensorboard_has_both_axes(tmp_path):
  write(log_of(tmp_path, ('tensorboard',)))
  def read(folder):
    (events,) = metrics_test.read_events(folder).values()
    return {(value.tag, event.step): value.simple_value
            for event in events for value in event.summary.value}

  folder = tmp_path / 'tensorboard'
  assert read(folder) == {
      ('train_loss', line['epoch']): line['train_loss'] for line in EPOCHS}
  assert read(folder / 'steps') == pytest.approx({
      **{('step/loss', line['step']): line['loss'] for line in STEPS},
      **{('step/images', line['step']): 16.0 for line in STEPS}})
  # A resumed run drops later epochs and steps, each by their own number.
  log_of(tmp_path, ('tensorboard',), epochs=1, steps=3).close()
  for place, mark in ((folder, 2), (folder / 'steps', 4)):
    assert mark in [
        event.step for events in metrics_test.read_events(place).values()
        for event in events if event.HasField('session_log')]


@pytest.mark.parametrize('names, shown', [
    (('tensorbord',), "got 'tensorbord'"),
    (('tensorboard', 'tensorboard'), 'more than once'),
    (('no_such_package.module:Writer',), "no module 'no_such_package'"),
    ((f'{PARTS}:Keep',), "Did you mean 'Kept'?"),
    (('wandb',), 'needs the package wandb: pip install wandb'),
    (('mlflow',), 'needs the package mlflow: pip install mlflow')])
def test_refusals(names, shown, tmp_path, monkeypatch):
  monkeypatch.setattr(
      importlib.util, 'find_spec',
      lambda name: None if name in ('wandb', 'mlflow') else 'found')
  with pytest.raises(UserError) as caught:
    writers.check(names)
  assert shown in str(caught.value)
  with pytest.raises(UserError):
    log_of(tmp_path, names)


def test_an_option_that_a_writer_does_not_take(tmp_path):
  with pytest.raises(UserError, match="takes no option 'wait'"):
    log_of(tmp_path, (f'{PARTS}:Kept(wait=1)',))


def optional(name):
  """A package that need not be installed, or skips."""
  if importlib.util.find_spec(name) is None:
    pytest.skip(f'an optional logger is not installed: {name}')
  return importlib.import_module(name)


def test_mlflow_keeps_the_curves_in_a_local_store(tmp_path, monkeypatch):
  mlflow = optional('mlflow')
  monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
  folder = tmp_path / 'run'
  folder.mkdir()
  write(log_of(folder, ('mlflow',)), EPOCHS[:1], STEPS[:2])
  # The same workdir goes on with the same run.
  write(log_of(folder, ('mlflow',), epochs=1, steps=2), EPOCHS[1:], STEPS[2:])
  run_id = json.loads((folder / 'mlflow.json').read_text())['id']
  client = mlflow.MlflowClient(tracking_uri=f'sqlite:///{tmp_path}/mlflow.db')
  (run,) = client.search_runs(
      [client.get_experiment_by_name('awp_jax').experiment_id])
  assert run.info.run_id == run_id and run.info.run_name == 'run'
  assert run.data.params == {'awp.gamma': '0.01', 'dataset': 'digits'}
  assert run.info.status == 'FINISHED'
  for name, axis, key, lines in (
      ('train_loss', 'epoch', 'train_loss', EPOCHS),
      ('step/loss', 'step', 'loss', STEPS)):
    found = [(m.step, m.value)
             for m in client.get_metric_history(run_id, name)]
    assert found == [(line[axis], line[key]) for line in lines]


def test_wandb_keeps_the_curves_offline(tmp_path, monkeypatch):
  wandb = optional('wandb')
  for name, value in (
      ('WANDB_MODE', 'offline'), ('WANDB_SILENT', 'true'),
      ('WANDB_CACHE_DIR', str(tmp_path / 'cache')),
      ('WANDB_CONFIG_DIR', str(tmp_path / 'config'))):
    monkeypatch.setitem(os.environ, name, value)
  write(log_of(tmp_path, ('wandb',)))
  (path,) = pathlib.Path(tmp_path, 'wandb').glob('offline-run-*/*.wandb')
  assert json.loads((tmp_path / 'wandb.json').read_text())['id'] in path.name
  history = read_wandb(wandb, path)
  assert [row['epoch/train_loss'] for row in history if 'epoch' in row] == [
      line['train_loss'] for line in EPOCHS]
  assert [(row['step'], row['step/loss'])
          for row in history if 'step' in row] == [
      (line['step'], line['loss']) for line in STEPS]


def log_records(data):
  """Records of a file in LevelDB's log format, after a header of 7 bytes.

  A fragment has a checksum of 4 bytes, a length of 2, and a type: whole (1),
  first (2), middle (3) or last (4). Blocks of 32 KiB end in zeros.
  """
  place, parts = 7, b''
  while place + 7 <= len(data):
    left = 2**15 - place % 2**15
    if left < 7:
      place += left
      continue
    length, kind = struct.unpack_from('<HB', data, place + 4)
    parts += data[place + 7:place + 7 + length]
    place += 7 + length
    if kind in (1, 4):
      yield parts
      parts = b''


def read_wandb(wandb, path):
  """The rows of an offline run's history."""
  from wandb.proto import wandb_internal_pb2

  assert wandb.__version__
  rows = []
  for data in log_records(path.read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    if record.WhichOneof('record_type') == 'history':
      rows.append({
          item.key or '/'.join(item.nested_key): json.loads(item.value_json)
          for item in record.history.item})
  return rows
