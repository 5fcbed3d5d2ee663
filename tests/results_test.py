"""Tests of what a run leaves behind, from lines made by hand."""

import json
import struct

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

from experiments import results


def line(epoch, robust=None, natural=0.5, **more):
  """A line of `metrics.jsonl`; without `robust`, of an epoch not evaluated."""
  values = {
      'epoch': epoch, 'train_loss': 2.0 / epoch, 'images': 40,
      'seconds_training': 2.0, 'seconds_evaluating': 0.5 * (robust is not None),
      'images_per_second': 20.0}
  if robust is not None:
    for split, shift in (('train', 0.25), ('test', 0.0), ('validation', -0.1)):
      values |= {
          f'{split}_natural_accuracy': natural + shift,
          f'{split}_robust_accuracy': robust + shift,
          f'{split}_natural_loss': 1.0, f'{split}_robust_loss': 1.5}
  return values | more


LINES = [
    line(1, 0.125), line(2, 0.5, 0.625), line(3), line(4, 0.5, 0.75),
    line(5, 0.375), line(6, 0.25), line(7, 0.25), line(8, 0.125, 0.25)]


def test_summary_values():
  summary = results.summarise(LINES, 'test', {'name': 'mine'})
  assert summary['best'] == {
      'epoch': 2, 'natural_accuracy': 0.625, 'robust_accuracy': 0.5,
      'selected_on': 'test'}  # the first of two equal maxima
  assert summary['last'] == {
      'epoch': 8, 'natural_accuracy': 0.25, 'robust_accuracy': 0.125,
      'mean_of_last_6': (0.5 + 0.5 + 0.375 + 0.25 + 0.25 + 0.125) / 6}
  assert summary['robust_generalisation_gap'] == 0.25
  assert summary['images_per_second'] == 20.0
  assert summary['seconds'] == 8 * 2.0 + 7 * 0.5
  assert summary['dataset'] == {'name': 'mine'}
  assert len(summary['devices']) == 8
  assert summary['versions']['jax'] == jax.__version__
  assert summary['versions'].keys() == {'python', *results.PACKAGES}
  json.dumps(summary, allow_nan=False)


def test_summary_by_validation_reports_test_accuracy():
  lines = [
      line(1, 0.5, validation_robust_accuracy=0.25),
      line(2, 0.25, 0.375, validation_robust_accuracy=0.375)]
  best = results.summarise(lines, 'validation', {})['best']
  assert best == {
      'epoch': 2, 'natural_accuracy': 0.375, 'robust_accuracy': 0.25,
      'selected_on': 'validation'}
  assert results.best_line(lines, 'test')['epoch'] == 1
  assert results.best_line([line(1)], 'test') is None


def read_events(folder):
  """{file: its events}, from the TFRecord frames: length, crc, data, crc."""
  files = {}
  for path in sorted(folder.glob('*tfevents*')):
    raw, place, events = path.read_bytes(), 0, []
    while place < len(raw):
      (length,) = struct.unpack_from('<Q', raw, place)
      data = raw[place + 12:place + 12 + length]
      events.append(event_pb2.Event.FromString(data))
      place += 12 + length + 4
    assert place == len(raw)
    files[path.name] = events
  return files


def test_log_writes_lines_and_events(tmp_path):
  log = results.MetricsLog(tmp_path, 0)
  for values in LINES[:3]:
    log.append(values)
  log.close()
  assert results.read_metrics(tmp_path) == LINES[:3]
  (events,) = read_events(tmp_path / 'tensorboard').values()
  scalars = {
      (value.tag, event.step): value.simple_value
      for event in events for value in event.summary.value}
  wanted = {
      (name, values['epoch']): value for values in LINES[:3]
      for name, value in values.items() if name != 'epoch'}
  assert scalars == pytest.approx(wanted, rel=1e-6)


def test_log_takes_back_what_the_state_has_not_seen(tmp_path):
  log = results.MetricsLog(tmp_path, 0)
  for values in LINES[:4]:
    log.append(values)
  log.close()
  log = results.MetricsLog(tmp_path, 2)
  assert log.lines == LINES[:2] == results.read_metrics(tmp_path)
  log.append(LINES[2])
  log.close()
  assert results.read_metrics(tmp_path) == LINES[:3]
  # The new event file tells TensorBoard to drop steps from 3 on.
  marks = [
      event.step for events in read_events(tmp_path / 'tensorboard').values()
      for event in events if event.HasField('session_log')]
  assert 3 in marks


@pytest.mark.parametrize('end', ['{"epoch": 3, "train_lo', '{"epoch": 3', '{'])
def test_half_written_last_line(tmp_path, end):
  whole = ''.join(json.dumps(values) + '\n' for values in LINES[:2])
  (tmp_path / 'metrics.jsonl').write_text(whole + end)
  assert results.read_metrics(tmp_path) == LINES[:2]
  log = results.MetricsLog(tmp_path, 3)
  log.append(LINES[2])
  log.close()
  assert results.read_metrics(tmp_path) == LINES[:3]


def test_no_metrics(tmp_path):
  assert results.read_metrics(tmp_path) == []


def test_write_json_keeps_the_old_file_if_it_fails(tmp_path):
  path = tmp_path / 'summary.json'
  results.write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    results.write_json(path, {'a': object()})
  assert json.loads(path.read_text()) == {'a': 1}


def assert_is_picture(path):
  assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
  with Image.open(path) as image:
    pixels = np.asarray(image.convert('RGB'))
  assert pixels.shape[0] > 300 and pixels.shape[1] > 900
  colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
  assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colours  # both curves


@pytest.mark.parametrize('lines', [LINES[:1], LINES], ids=['one', 'all'])
def test_curves(tmp_path, lines):
  results.plot_curves(lines, tmp_path / 'curves.png', 'a run')
  assert_is_picture(tmp_path / 'curves.png')


def test_comparison(tmp_path):
  results.plot_comparison(
      {'AT': LINES, 'AT-AWP': LINES[::-1]}, tmp_path / 'both.png')
  assert_is_picture(tmp_path / 'both.png')


def test_table():
  assert results.table([['run', 'robust'], ['AT-AWP', '0.5']]) == (
      'run     robust\n------  ------\nAT-AWP     0.5')
