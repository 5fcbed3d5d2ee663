"""The table: lists of configs, published and measured numbers, notes."""

import json
import pathlib
import re
import statistics

import numpy as np
import pytest

from experiments import table
from experiments.reports import curves
from experiments.runs import checkpoints
from experiments.sweeps import jobs, published, records, runner
from tests.experiments.runs.metrics_test import line


def run_of(lines, label='cifar10_at', seed=0, kind='finished', **fields):
  config = {'select_on': 'test', 'batch_size': 16, 'epochs': 8, 'seed': seed}
  config |= fields
  return records.Record(
      f'{label}-seed{seed}', label, seed, runner.State(kind, len(lines)),
      config, lines, records.measure(lines, config, pathlib.Path('nowhere')))


@pytest.mark.parametrize('text, labels', [
    ('a.py', ['a']),
    ('x/a.py,b.py:L2', ['a', 'b:L2']),
    ('a.py:L2,WRN-34-10,b.py,c.py:WRN-28-10,L2',
     ['a:L2,WRN-34-10', 'b', 'c:WRN-28-10,L2']),
])
def test_configs(text, labels, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'x').mkdir()
  for name in ('a.py', 'b.py', 'c.py', 'x/a.py'):
    (tmp_path / name).write_text('')
  configs = jobs.parse_configs(text)
  assert [jobs.label_of(config) for config in configs] == labels
  assert ','.join(configs) == text
  for config, label in zip(configs, labels, strict=True):
    assert jobs.parse_name(jobs.Job(config, 12).name) == (label, 12, ())


@pytest.mark.parametrize('name', [
    'cifar10_at', 'cifar10_at-seed', 'cifar10_at-seed01', 'a+-seed0', '-seed0',
    'table.md'])
def test_other_names(name):
  assert jobs.parse_name(name) is None
  assert jobs.parse_name('cifar10_at+WRN-34-10-seed0') == (
      'cifar10_at:WRN-34-10', 0, ())


@pytest.mark.parametrize('arguments, shown', [
    ([], '--workdir'),
    (['--workdir=w'], '--configs is missing'),
    (['--workdir=w', '--configs=nowhere.py'], "there is no file 'nowhere.py'"),
    (['--workdir=w', '--configs=cifar10_at'], "'cifar10_at' is not a config"),
    (['--workdir=w', '--configs=here.py:L2,here.py:L2'], "'here:L2' more than"),
    (['--workdir=w', '--configs=here.py', '--seeds=0,0'], "got '0,0'"),
    (['--workdir=w', '--configs=here.py', '--seeds=a'], "got 'a'"),
    (['--workdir=w', '--configs=here.py', '--config.seed=1'], '--seeds=0,1,2'),
    (['--workdir=w', '--configs=here.py', '--epochs=1'], "'--epochs=1'"),
    (['--workdir=w', '--configs=here.py', '--config.epochs', '1'],
     "'--config.epochs'"),
    (['--workdir=w', '--only_table'], "'w' holds no runs"),
    (['--workdir=w', '--configs=here.py', '--baseline=there'],
     "--baseline must be one of here, got 'there'"),
    (['--workdir=here.py', '--configs=here.py'], 'File exists'),
])
def test_wrong_arguments(arguments, shown, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'here.py').write_text('')
  try:
    code = table.main(arguments, pathlib.Path('never_run.py'))
  except SystemExit as exit_:
    code = exit_.code
  out, err = capsys.readouterr()
  assert code == 2 and out == ''
  assert re.fullmatch(r'error: [^\n]+\n', err) and shown in err, err
  assert not (tmp_path / 'w').exists()


def test_published_numbers():
  # From the authors' logs: best, last and natural.
  rows = {
      'cifar10_at': (52.79, 44.44, 81.70), 'cifar10_awp': (55.39, 54.73, 81.18),
      'svhn_awp:L2': (72.57, 67.73, 94.83),
      'cifar100_at:L2': (41.33, 35.27, 62.26)}
  for label, numbers in rows.items():
    entry = published.find(label)
    assert tuple(entry[k] for k in ('best', 'last', 'natural')) == numbers
  assert published.find('cifar10_awp:L2,WRN-34-10') is None
  assert published.find('digits_at') is None
  for label, entry in published.PUBLISHED.items():
    assert published.find(label) == entry
    assert entry.keys() <= {*table.PUBLISHED, 'source'} and entry['source']
    robust = entry.get('best', entry.get('autoattack'))
    assert entry.get('last', 0) <= robust < entry['natural'] < 100


def test_published_argument_in_any_order(monkeypatch):
  monkeypatch.setitem(published.PUBLISHED, 'x:L2,WRN-34-10', {'best': 1.0})
  assert published.find('x:WRN-34-10,L2') == {'best': 1.0}
  assert published.find('y:WRN-34-10,L2') is None


LINES = [
    line(1, 0.125), line(2, 0.5, 0.625), line(3), line(4, 0.5, 0.75),
    line(5, 0.375), line(6, 0.25), line(7, 0.25), line(8, 0.125, 0.25)]


def write_evaluation(
    folder, *, step=8, count=60, name='aa-standard', **origin):
  origin = origin or {'checkpoint': 'best', 'step': step}
  (folder / 'evaluation.json').write_text(json.dumps({
      'num_examples': count, 'dataset': {'num_test': 60}, 'subjects': {
          'best': {'origin': origin, 'evaluations': {
              name: {'robust': {'accuracy': 0.4375}}}}}}))


def test_autoattack_of_another_model_or_of_few_images_is_left_out(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'best')
  store.save(8, {'w': np.ones(1)}, {})
  store.close()
  write_evaluation(tmp_path)
  assert records.read_autoattack(tmp_path) == (43.75, '')
  write_evaluation(tmp_path, step=4)
  assert records.read_autoattack(tmp_path) == (None, (
      'AutoAttack evaluated step 4, but the best checkpoint is now step 8'))
  write_evaluation(tmp_path, count=7)
  assert records.read_autoattack(tmp_path) == (
      None, 'AutoAttack evaluated only 7 of 60 test images')
  write_evaluation(tmp_path, torch_checkpoint='best.pth')
  assert records.read_autoattack(tmp_path) == (None, '')
  write_evaluation(tmp_path, name='aa-standard-bfloat16')
  assert records.read_autoattack(tmp_path) == (
      None, 'AutoAttack attacked in bfloat16 only')
  run = run_of(LINES)._replace(left_out='AutoAttack evaluated step 4')
  assert any('AutoAttack evaluated step 4.' in note
             for note in table.notes(records.group([run])))


def test_measured(tmp_path):
  config = {'select_on': 'test', 'batch_size': 16}
  measured = records.measure(LINES, config, tmp_path)
  assert measured == pytest.approx({
      'best': 50.0, 'natural': 62.5, 'gap': 25.0, 'final': 12.5, 'fall': 37.5,
      'last': 100 * (0.5 + 0.5 + 0.375 + 0.25 + 0.25 + 0.125) / 6,
      # 40 images are two batches of 16 and one of 8.
      'seconds_per_step': 2.0 / 3, 'seconds_per_epoch': 2.0}, rel=1e-12)
  write_evaluation(tmp_path)
  assert records.measure(LINES, config, tmp_path)['autoattack'] == 43.75
  assert records.measure([line(1)], config, tmp_path) == {}


def test_rows_of_several_seeds():
  first, second = run_of(LINES), run_of([line(1, 0.25, 0.5)], seed=1)
  other = run_of(LINES, seed=2, epochs=9)
  begun = run_of(LINES[:4], 'svhn_awp', kind='stopped')
  groups = records.group([first, begun, second, other])
  assert list(groups) == ['cifar10_at', "cifar10_at'", 'svhn_awp, seed 0']
  head, mean, single, unfinished = table.rows(groups)
  cells = dict(zip(head, mean, strict=True))
  deviation = statistics.stdev([50, 25])
  assert cells['best'] == f'37.50 ± {deviation:.2f}'
  assert cells['final'] == f'18.75 ± {statistics.stdev([12.5, 25]):.2f}'
  # Falls of 37.5 and 0; t_1(0.975) = 12.7062.
  half = 12.7062 * 37.5 / 2
  assert cells['fall'] == f'+18.75 ({18.75 - half:+.2f} to {18.75 + half:+.2f})'
  assert single[head.index('fall')] == '+37.50'
  assert cells['seeds'] == '0, 1' and cells['state'] == 'finished'
  assert cells['s/step'] == '0.667' and cells['s/epoch'] == '2'
  # Each published number is to the right of the measured one.
  for heading, number in (
      ('best', '52.79'), ('last 6', '44.44'), ('natural', '81.70')):
    place = head.index(heading)
    assert head[place + 1] == 'published' and mean[place + 1] == number
  assert single[head.index('best')] == '50.00'
  assert unfinished[:4] == ['svhn_awp, seed 0', '0', '50.00', '59.12']
  assert unfinished[-1] == 'stopped, epoch 4/8'
  assert 'AutoAttack' not in head


def test_autoattack_has_a_column_where_it_was_run():
  run = run_of(LINES, 'cifar10_rst_awp')
  run = run._replace(measured=run.measured | {'autoattack': 43.75})
  head, cells = table.rows(records.group([run]))
  place = head.index('AutoAttack')
  assert cells[place:place + 2] == ['43.75', '60.04']


def test_changed_fields_are_listed():
  from experiments.config import schema
  from experiments.configs import cifar10_at
  fields = json.loads(json.dumps(schema.flatten(cifar10_at.get_config())))
  assert records.changed(run_of(LINES, 'cifar10_at', **fields)) == {}
  fields |= {'num_train': 1000, 'awp.gamma': 0.5, 'seed': 7, 'data_dir': 'x'}
  run = run_of(LINES, 'cifar10_at', **fields)
  assert records.changed(run) == {'num_train': 1000, 'awp.gamma': 0.5}
  assert records.changed(run_of(LINES, 'of_someone', **fields)) == {}
  assert records.changed(run_of(LINES, 'digits_at:L2', **fields)) == {}
  (note,) = table.notes({'cifar10_at': [run]})
  assert 'awp.gamma=0.5, ' in note and 'do not apply' in note


def test_curves_of_several_seeds():
  runs = [LINES, [line(2, 0.25, 0.125), line(3, 0.5), line(4, 0.5)]]
  epochs, means, spreads = curves.over_epochs(runs, 'test_robust_accuracy')
  place = epochs.index(2)
  assert means[place] == (0.5 + 0.25) / 2
  assert spreads[place] == pytest.approx(
      statistics.stdev([0.5, 0.25]), rel=1e-12)
  # An epoch that one run evaluated.
  assert means[epochs.index(3)] == 0.5 and spreads[epochs.index(3)] == 0
  assert epochs == sorted(set(epochs)) and epochs[-1] == 8
  assert not curves.over_epochs(runs[:1], 'test_robust_accuracy')[2].any()


def test_styles_of_runs_differ():
  styles = {
      (curves.RUN_COLORS[i % len(curves.RUN_COLORS)],
       curves.RUN_MARKERS[i % len(curves.RUN_MARKERS)]) for i in range(42)}
  assert len(styles) == 42
