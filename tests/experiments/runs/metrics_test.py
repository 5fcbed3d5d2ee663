"""Tests of the outputs of a run, on constructed metrics."""

import json
import os
import struct

import jax
import numpy as np
from PIL import Image
import pytest
from tensorboardX.proto import event_pb2

import awp_jax
from experiments.reports import curves
from experiments.runs import metrics, precision
from experiments.util import atomic, console, environment


def line(epoch, robust=None, natural=0.5, **more):
  """A line of `metrics.jsonl`; without `robust`, of an unevaluated epoch."""
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
  summary = metrics.summarize(LINES, 'test', {'name': 'mine'})
  assert summary['best'] == {
      'epoch': 2, 'natural_accuracy': 0.625, 'robust_accuracy': 0.5,
      'nonfinite': 0.0, 'selected_on': 'test'}  # the first of two equal maxima
  assert summary['last'] == {
      'epoch': 8, 'natural_accuracy': 0.25, 'robust_accuracy': 0.125,
      'nonfinite': 0.0,
      'mean_of_last_6': (0.5 + 0.5 + 0.375 + 0.25 + 0.25 + 0.125) / 6}
  assert summary['robust_generalisation_gap'] == 0.25
  assert summary['images_per_second'] == 20.0
  assert summary['seconds'] == 8 * 2.0 + 7 * 0.5
  assert summary['dataset'] == {'name': 'mine'}
  assert len(summary['devices']) == 8
  assert summary['versions']['jax'] == jax.__version__
  assert summary['versions'].keys() == {
      'python', 'awp_jax', *environment.PACKAGES}
  json.dumps(summary, allow_nan=False)
  assert 'lost_epochs' not in summary
  assert metrics.summarize(
      [*LINES[1:3], *LINES[5:]], 'test', {})['lost_epochs'] == [1, 4, 5]


def test_summary_by_validation_reports_test_accuracy():
  lines = [
      line(1, 0.5, validation_robust_accuracy=0.25),
      line(2, 0.25, 0.375, validation_robust_accuracy=0.375)]
  best = metrics.summarize(lines, 'validation', {})['best']
  assert best == {
      'epoch': 2, 'natural_accuracy': 0.375, 'robust_accuracy': 0.25,
      'nonfinite': 0.0, 'selected_on': 'validation'}
  assert metrics.best_line(lines, 'test')['epoch'] == 1
  assert metrics.best_line([line(1)], 'test') is None


def test_suspicious_epochs_are_the_best_only_if_there_is_no_other():
  lines = [line(1, 0.5, suspicious=1), line(2, 0.25), line(3, 0.25),
           line(4, 0.75, suspicious=1)]
  assert metrics.best_line(lines, 'test') is lines[1]
  assert metrics.best_line(lines[3:], 'test') is lines[3]
  assert metrics.best_line([lines[0], lines[3], line(5)], 'test') is lines[3]
  assert metrics.best_line([], 'test') is None


def test_the_best_line_is_that_of_the_split_and_the_first_of_equals():
  lines = [
      line(1, 0.5, validation_robust_accuracy=0.0),
      line(2, 0.25, validation_robust_accuracy=0.75),
      line(3, 0.5, validation_robust_accuracy=0.75)]
  assert metrics.best_line(lines, 'test') is lines[0]
  assert metrics.best_line(lines, 'validation') is lines[1]
  assert metrics.best_line(lines[1:], 'test') is lines[2]


@pytest.mark.parametrize('count', [1, 2, 5, 6, 7, 9])
def test_the_last_six_evaluations_are_averaged(count):
  values = [1 / 2 ** k for k in range(count)]
  lines = [line(k + 1, value) for k, value in enumerate(values)]
  lines.insert(1, line(100))  # of an epoch not evaluated
  last = metrics.accuracies(lines, 'test')['last']
  assert last['mean_of_last_6'] == pytest.approx(
      np.mean(values[max(count - 6, 0):]), rel=1e-12)
  assert last['robust_accuracy'] == values[-1]


def test_the_gap_is_of_the_last_evaluation_and_may_be_negative():
  lines = [line(1, 0.5), line(2, 0.25, train_robust_accuracy=0.125), line(3)]
  found = metrics.accuracies(lines, 'test')
  assert found['robust_generalisation_gap'] == -0.125
  assert found['best'] == {
      'epoch': 1, 'natural_accuracy': 0.5, 'robust_accuracy': 0.5,
      'nonfinite': 0.0, 'selected_on': 'test'}
  assert found['last']['epoch'] == 2
  assert found['last']['natural_accuracy'] == 0.5


@pytest.mark.parametrize('epochs, patience, stops', [
    (3, 2, False), (4, 2, True), (5, 2, True), (4, 3, False), (5, 3, True),
    (2, 1, False), (3, 1, True), (5, 0, False)])
def test_early_stopping_counts_epochs_since_the_best(epochs, patience, stops):
  # The second epoch is the best; later ones tie with it.
  lines = [line(1, 0.25)] + [line(k, 0.5) for k in range(2, epochs + 1)]
  assert metrics.stops_early(lines, 'test', patience) is stops


def test_early_stopping_waits_for_an_evaluation():
  lines = [line(1, 0.5), line(2), line(3)]
  assert not metrics.stops_early(lines, 'test', 1)
  assert not metrics.stops_early([], 'test', 1)
  assert not metrics.stops_early([line(1)], 'test', 1)
  assert metrics.stops_early([*lines, line(4, 0.25)], 'test', 3)
  assert not metrics.stops_early([*lines, line(4, 0.75)], 'test', 1)
  assert not metrics.stops_early(
      [line(1, 0.5), line(2, 0.25), line(3)], 'test', 2)


def test_speed_of_a_run_without_training_time_is_zero():
  lines = [line(1, 0.5, seconds_training=0.0)]
  summary = metrics.summarize(lines, 'test', {})
  assert summary['images_per_second'] == 0.0 and summary['seconds'] == 0.5
  lines = [line(1, 0.5, seconds_training=4.0, images=10),
           line(2, 0.5, seconds_training=1.0, images=20)]
  assert metrics.summarize(lines, 'test', {})['images_per_second'] == 6.0


def test_precision_of_the_evaluation_is_in_the_summary():
  summary = metrics.summarize([
      *LINES[:-1], LINES[-1] | {'judged_by': precision.judged_by()}],
      'test', {})
  assert summary['judged_by'] == {
      'precision': 'float32', 'matmul_precision': 'float32',
      'devices': environment.devices(), 'versions': environment.versions()}
  assert summary['judged_by']['versions']['awp_jax'] == awp_jax.__version__


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
  log = metrics.MetricsLog(tmp_path, 0)
  for values in LINES[:3]:
    log.append(values)
  log.close()
  assert log.lines == metrics.read_metrics(tmp_path) == LINES[:3]
  (events,) = read_events(tmp_path / 'tensorboard').values()
  scalars = {
      (value.tag, event.step): value.simple_value
      for event in events for value in event.summary.value}
  wanted = {
      (name, values['epoch']): value for values in LINES[:3]
      for name, value in values.items() if name != 'epoch'}
  assert scalars == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize('line', [1, 2])
def test_a_changed_line_of_steps_is_noticed(line, tmp_path):
  log = metrics.MetricsLog(tmp_path, 0, names=())
  for step in (1, 2):
    log.append_step({'step': step, 'loss': 1.5})
  sums, path = log.checksums(), tmp_path / 'steps.jsonl'
  assert not metrics.MetricsLog(
      tmp_path, 0, 2, names=(), checksums=sums).lost_steps
  lines = path.read_text().splitlines(keepends=True)
  lines[line - 1] = lines[line - 1].replace('1.5', '2.5')
  path.write_text(''.join(lines))
  assert metrics.MetricsLog(
      tmp_path, 0, 2, names=(), checksums=sums).lost_steps


def test_lost_epochs_do_not_stop_a_run_early():
  lines = [line(1, 0.5, lost=1), line(2, 0.25), line(3, 0.5, lost=1),
           line(4, 0.2)]
  assert not metrics.stops_early(lines, 'test', 2)
  assert metrics.stops_early([*lines, line(5, 0.1)], 'test', 2)


def test_a_line_of_the_best_checkpoint_reaches_the_writers(tmp_path):
  """A process ended between the checkpoint and the line."""
  metrics.MetricsLog(tmp_path, 0, names=()).append(LINES[0])
  log = metrics.MetricsLog(
      tmp_path, 2, 0, ('tests.experiments.runs.writers_test:Kept',), {}, None,
      LINES[1])
  assert log.lines == LINES[:2]
  assert log._writers[0].epochs == [LINES[1]]


def test_a_line_is_on_disk_when_append_returns(tmp_path, monkeypatch):
  log = metrics.MetricsLog(tmp_path, 0)
  synced = []

  def fsync(file):
    # TensorBoard's writer syncs its own file.
    if os.path.samestat(
        os.fstat(file), os.stat(tmp_path / 'metrics.jsonl')):
      synced.append(metrics.read_metrics(tmp_path))

  monkeypatch.setattr(os, 'fsync', fsync)
  log.append(LINES[0])
  log.append(LINES[1])
  log.close()
  assert synced == [LINES[:1], LINES[:2]]


def test_checksums_tell_changed_lines():
  def open_log(lines, best=None, completed=4):
    return metrics._recovered(lines, checksums, completed, best or {})

  checksums = {
      str(line['epoch']): metrics._checksum(line) for line in LINES[:3]}
  assert open_log(LINES[:4]) == (LINES[:4], [])  # the last is not covered
  # A version without checksums.
  assert metrics._recovered(LINES[:2], None, 4, {}) == (LINES[:2], [])
  assert open_log(LINES[1:3]) == (LINES[1:3], [1])
  assert open_log(LINES[1:3], best=LINES[0]) == (LINES[:3], [])
  first = dict(LINES[0])
  name = next(name for name in first if name != 'epoch')
  first[name] += 1e-9
  assert open_log([first, *LINES[1:3]]) == (LINES[1:3], [1])
  # Only the line after the last checkpoint may be unknown.
  for epoch in (0, -1, 5, 3):
    moved = LINES[0] | {'epoch': epoch}
    assert open_log([moved, *LINES[1:3]]) == (LINES[1:3], [1])
  # The best checkpoint has a digest of its own.
  assert open_log(LINES[1:3], best=first) == ([first, *LINES[1:3]], [])
  assert open_log(LINES[1:3], best=LINES[4]) == (LINES[1:3], [1])
  marked = [line | {'lost': 1} for line in LINES[:3]]
  assert open_log(marked) == (marked, [])


def test_log_takes_back_what_the_state_has_not_seen(tmp_path):
  log = metrics.MetricsLog(tmp_path, 0)
  for values in LINES[:4]:
    log.append(values)
  log.close()
  log = metrics.MetricsLog(tmp_path, 2)
  assert log.lines == LINES[:2] == metrics.read_metrics(tmp_path)
  log.append(LINES[2])
  log.close()
  assert metrics.read_metrics(tmp_path) == LINES[:3]
  # The new event file tells TensorBoard to drop steps from 3 on.
  marks = [
      event.step for events in read_events(tmp_path / 'tensorboard').values()
      for event in events if event.HasField('session_log')]
  assert 3 in marks


@pytest.mark.parametrize('end', ['{"epoch": 3, "train_lo', '{"epoch": 3', '{'])
def test_half_written_last_line(tmp_path, end):
  whole = ''.join(json.dumps(values) + '\n' for values in LINES[:2])
  (tmp_path / 'metrics.jsonl').write_text(whole + end)
  assert metrics.read_metrics(tmp_path) == LINES[:2]
  log = metrics.MetricsLog(tmp_path, 3)
  log.append(LINES[2])
  log.close()
  assert metrics.read_metrics(tmp_path) == LINES[:3]


def test_no_metrics(tmp_path):
  assert metrics.read_metrics(tmp_path) == []


def test_write_json_keeps_the_old_file_if_it_fails(tmp_path):
  path = tmp_path / 'summary.json'
  atomic.write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    atomic.write_json(path, {'a': object()})
  assert json.loads(path.read_text()) == {'a': 1}


def assert_is_picture(path):
  assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
  with Image.open(path) as image:
    pixels = np.asarray(image.convert('RGB'))
  assert pixels.shape[0] > 300 and pixels.shape[1] > 900
  colors = {tuple(color) for color in pixels.reshape(-1, 3)}
  assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= colors  # both curves


@pytest.mark.parametrize('lines', [LINES[:1], LINES], ids=['one', 'all'])
def test_curves(tmp_path, lines):
  curves.plot_curves(lines, tmp_path / 'curves.png', 'a run')
  assert_is_picture(tmp_path / 'curves.png')


def test_comparison(tmp_path):
  curves.plot_comparison(
      {'AT': [LINES], 'AT-AWP': [LINES[::-1]]}, tmp_path / 'both.png')
  assert_is_picture(tmp_path / 'both.png')


def test_words_are_logged_but_are_no_scalars(tmp_path):
  log = metrics.MetricsLog(tmp_path, 0)
  log.append({'epoch': 1, 'loss': 0.5, 'precision': 'float32'})
  log.close()
  assert metrics.read_metrics(tmp_path)[0]['precision'] == 'float32'
  (events,) = read_events(tmp_path / 'tensorboard').values()
  assert [value.tag for event in events for value in event.summary.value] == [
      'loss']


def drawn(monkeypatch, draw, *arguments):
  """The figure before it is saved."""
  kept = []
  monkeypatch.setattr(curves.plt, 'close', kept.append)
  draw(*arguments)
  (figure,) = kept
  return figure


def test_curves_show_each_metric_by_split(tmp_path, monkeypatch):
  figure = drawn(
      monkeypatch, curves.plot_curves, LINES, tmp_path / 'a.png', 'a run')
  assert figure.get_suptitle() == 'a run'
  shown = metrics.evaluated(LINES)
  names = ['robust_accuracy', 'natural_accuracy', 'robust_loss']
  for axis, name in zip(figure.axes, names, strict=True):
    assert axis.get_xlabel() == 'epoch'
    assert name.split('_')[0] in axis.get_ylabel()
    for curve, split, style in zip(
        axis.lines, ('train', 'test'), ('--', '-'), strict=True):
      np.testing.assert_array_equal(
          curve.get_xdata(), [one['epoch'] for one in shown])
      np.testing.assert_array_equal(
          curve.get_ydata(), [one[f'{split}_{name}'] for one in shown])
      assert (curve.get_label(), curve.get_linestyle()) == (split, style)
      assert curve.get_marker() == 'None'
    if 'accuracy' in name:
      assert axis.get_ylim() == (0, 1)
  two = drawn(
      monkeypatch, curves.plot_curves, LINES[:2], tmp_path / 'b.png', '')
  three = drawn(
      monkeypatch, curves.plot_curves, [*LINES[:2], LINES[3]],
      tmp_path / 'c.png', '')
  assert two.axes[0].lines[0].get_marker() == 'o'
  assert three.axes[0].lines[0].get_marker() == 'None'


@pytest.mark.parametrize('count', [2, 3, 4, 8])
def test_comparisons_tell_runs_apart(count, tmp_path, monkeypatch):
  runs = {f'run {k}': [[line(1, k / 16), line(2), line(3, k / 32)]]
          for k in range(count)}
  figure = drawn(
      monkeypatch, curves.plot_comparison, runs, tmp_path / 'a.png')
  for axis, metric in zip(figure.axes, ('robust', 'natural'), strict=True):
    assert axis.get_ylabel() == f'{metric} accuracy'
    assert axis.get_ylim() == (0, 1.01) and axis.get_xlabel() == 'epoch'
    assert len(axis.lines) == 2 * count
    looks = set()
    for k, curve in enumerate(axis.lines):
      name, split = curve.get_label().split(', ')
      assert name == f'run {k // 2}' and split == ('test', 'train')[k % 2]
      lines = [one for one in runs[name][0] if f'test_{metric}_accuracy' in one]
      np.testing.assert_array_equal(curve.get_xdata(), [1, 3])
      np.testing.assert_array_equal(
          curve.get_ydata(),
          [one[f'{split}_{metric}_accuracy'] for one in lines])
      assert curve.get_linestyle() == ('-', '--')[k % 2]
      assert curve.get_linewidth() == (2, 1.2)[k % 2]
      looks.add((curve.get_color(), curve.get_marker(), curve.get_linestyle()))
    assert len(looks) == 2 * count
  # More than three runs: the legend is next to the curves.
  assert bool(figure.legends) == (count > 3)
  assert (figure.axes[0].get_legend() is None) == (count > 3)


def test_table():
  assert console.table([['run', 'robust'], ['AT-AWP', '0.5']]) == (
      'run     robust\n------  ------\nAT-AWP     0.5')


def test_shares_of_examples_that_are_not_finite_are_in_the_summary():
  lines = [line(1, 0.5, test_nonfinite=0.25), line(2, 0.25, test_nonfinite=0.5)]
  found = metrics.accuracies(lines, 'test')
  assert found['best']['nonfinite'] == 0.25
  assert found['last']['nonfinite'] == 0.5
