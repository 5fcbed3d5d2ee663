"""A table of runs: names, numbers, and the processes that make them."""

import fcntl
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image
import pytest

from experiments import table
from experiments.reports import curves
from experiments.runs import checkpoints
from experiments.sweeps import jobs, published, records, runner
from tests.experiments.runs.metrics_test import line

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'experiments/configs'

#: Stands for `main.py`; what it does is the config's argument.
FAKE = '''
import json, os, pathlib, signal, sys, time

flags = dict(a.lstrip('-').split('=', 1) for a in sys.argv[1:])
folder = pathlib.Path(flags['workdir'])
with (folder.parent / 'calls').open('a') as calls:
  calls.write(json.dumps(sys.argv[1:]) + chr(10))
argument = flags['config'].partition(':')[2]
if argument == 'fail':
  print('WARNING: all is well', file=sys.stderr)
  print('error: awp.gamma must be small.', file=sys.stderr)
  sys.exit('Exception ignored in: something else')
if argument == 'crash':
  print('Traceback', file=sys.stderr)
  print('KeyError: 3', file=sys.stderr)
  sys.exit(1)
if argument == 'silent':
  sys.exit(3)
if argument == 'kill':
  os.kill(os.getpid(), signal.SIGKILL)
folder.mkdir()
if argument == 'quit':
  sys.exit(0)
seed = int(flags['config.seed'])
config = {'epochs': 1, 'batch_size': 16, 'select_on': 'test', 'seed': seed}
line = {'epoch': 1, 'images': 40, 'seconds_training': 6.0}
for split, shift in (('train', 0.25), ('test', 0.0)):
  line[split + '_robust_accuracy'] = 0.25 + shift + seed / 8
  line[split + '_natural_accuracy'] = 0.5 + shift + seed / 8
(folder / 'config.json').write_text(json.dumps(config))
if argument == 'wait':
  caught = []
  signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
  (folder / 'ready').write_text('')
  while not caught:
    time.sleep(0.01)
  time.sleep(0.2)
  (folder / 'caught').write_text(str(len(caught)))
  sys.exit(0)
(folder / 'metrics.jsonl').write_text(json.dumps(line))
(folder / 'summary.json').write_text('{}')
'''


@pytest.fixture
def fake(tmp_path):
  path = tmp_path / 'fake_main.py'
  path.write_text(FAKE)
  return path


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'runs'


def calls(folder):
  return [json.loads(text) for text in (folder / 'calls').open()]


def run_of(lines, label='cifar10_at', seed=0, kind='finished', **fields):
  config = {'select_on': 'test', 'batch_size': 16, 'epochs': 8, 'seed': seed}
  config |= fields
  return records.Record(
      f'{label}-seed{seed}', label, seed, runner.State(kind, len(lines)), config,
      lines, records.measure(lines, config, pathlib.Path('nowhere')))


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
    assert jobs.parse_name(jobs.Job(config, 12).name) == (label, 12)


@pytest.mark.parametrize('name', [
    'cifar10_at', 'cifar10_at-seed', 'cifar10_at-seed01', 'a+-seed0', '-seed0',
    'table.md'])
def test_other_names(name):
  assert jobs.parse_name(name) is None
  assert jobs.parse_name('cifar10_at+WRN-34-10-seed0') == (
      'cifar10_at:WRN-34-10', 0)


@pytest.mark.parametrize('arguments, shown', [
    ([], '--workdir'),
    (['--workdir=w'], '--configs names no config'),
    (['--workdir=w', '--configs=nowhere.py'], "there is no file 'nowhere.py'"),
    (['--workdir=w', '--configs=cifar10_at'], "'cifar10_at' is no config"),
    (['--workdir=w', '--configs=here.py:L2,here.py:L2'], "'here:L2' more than"),
    (['--workdir=w', '--configs=here.py', '--seeds=0,0'], "got '0,0'"),
    (['--workdir=w', '--configs=here.py', '--seeds=a'], "got 'a'"),
    (['--workdir=w', '--configs=here.py', '--config.seed=1'], '--seeds=0,1,2'),
    (['--workdir=w', '--configs=here.py', '--epochs=1'], "'--epochs=1'"),
    (['--workdir=w', '--configs=here.py', '--config.epochs', '1'],
     "'--config.epochs'"),
    (['--workdir=w', '--only_table'], "'w' holds no runs"),
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
  # The table of the authors' logs, read across: best, last and natural.
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


def write_evaluation(folder, *, step=8, count=60, **origin):
  origin = origin or {'checkpoint': 'best', 'step': step}
  (folder / 'evaluation.json').write_text(json.dumps({
      'num_examples': count, 'dataset': {'num_test': 60}, 'subjects': {
          'best': {'origin': origin, 'evaluations': {
              'aa-standard': {'robust': {'accuracy': 0.4375}}}}}}))


def test_autoattack_of_another_model_or_of_few_images_is_left_out(tmp_path):
  store = checkpoints.Checkpoints(tmp_path, 'best')
  store.save(8, {'w': np.ones(1)}, {})
  store.close()
  write_evaluation(tmp_path)
  assert records.read_autoattack(tmp_path) == (43.75, '')
  write_evaluation(tmp_path, step=4)
  assert records.read_autoattack(tmp_path) == (None, (
      'its AutoAttack is of step 4, the best checkpoint is now of step 8'))
  write_evaluation(tmp_path, count=7)
  assert records.read_autoattack(tmp_path) == (
      None, 'its AutoAttack is on 7 of 60 test images')
  write_evaluation(tmp_path, torch_checkpoint='best.pth')
  assert records.read_autoattack(tmp_path) == (None, '')
  run = run_of(LINES)._replace(left_out='its AutoAttack is of step 4')
  assert any('its AutoAttack is of step 4.' in note
             for note in table.notes(records.group([run])))


def test_measured(tmp_path):
  config = {'select_on': 'test', 'batch_size': 16}
  measured = records.measure(LINES, config, tmp_path)
  assert measured == pytest.approx({
      'best': 50.0, 'natural': 62.5, 'gap': 25.0,
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
  assert cells['seeds'] == '0, 1' and cells['state'] == 'finished'
  assert cells['s/step'] == '0.667' and cells['s/epoch'] == '2'
  # Each published number stands right of its own.
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


def test_changed_fields_are_told():
  from experiments.config import build
  from experiments.configs import cifar10_at
  fields = json.loads(json.dumps(build.flatten(cifar10_at.get_config())))
  assert records.changed('cifar10_at', fields) == {}
  fields |= {'num_train': 1000, 'awp.gamma': 0.5, 'seed': 7, 'data_dir': 'x'}
  assert records.changed('cifar10_at', fields) == {
      'num_train': 1000, 'awp.gamma': 0.5}
  assert records.changed('of_someone', fields) == {}
  assert records.changed('digits_at:L2', fields) == {}
  run = run_of(LINES, 'cifar10_at', **fields)
  (note,) = table.notes({'cifar10_at': [run]})
  assert 'awp.gamma=0.5, ' in note and 'not for this' in note


def test_mean_lines():
  # One line has a field that the other one lacks.
  runs = [run_of(LINES), run_of(
      [line(2, 0.25, 0.125, suspicious=1), line(3, 0.5)], seed=1)]
  (only,) = records.mean_lines(runs)  # epoch 3 was evaluated in one alone
  assert only['epoch'] == 2
  assert only['test_robust_accuracy'] == 0.375
  assert only['train_natural_accuracy'] == 0.375 + 0.25
  assert 'suspicious' not in only


def test_runs_looks_differ():
  looks = {
      (curves.RUN_COLORS[i % len(curves.RUN_COLORS)],
       curves.RUN_MARKERS[i % len(curves.RUN_MARKERS)]) for i in range(42)}
  assert len(looks) == 42


def test_failures_are_told_and_the_others_go_on(folder, fake, tmp_path, capsys):
  config = tmp_path / 'mine.py'
  config.write_text('')
  kinds = ('fail', 'crash', 'silent', 'kill', 'quit', 'good')
  arguments = [
      '--configs=' + ','.join(f'{config}:{kind}' for kind in kinds),
      f'--workdir={folder}', '--seeds=0,1', '--config.epochs=1']
  assert table.main(arguments, fake) == 1
  states = {
      kind: runner.state_of(folder, f'mine+{kind}-seed1') for kind in kinds}
  assert states == {
      'fail': ('failed', 0, 'failed: error: awp.gamma must be small.'),
      'crash': ('failed', 0, 'failed: KeyError: 3'),
      'silent': ('failed', 0, 'failed: exit code 3, without a word'),
      'kill': ('failed', 0, 'failed: killed by SIGKILL'),
      'quit': ('stopped', 0, ''), 'good': ('finished', 1, '')}
  assert calls(folder)[-1] == [
      f'--config={config}:good', f'--workdir={folder}/mine+good-seed1',
      '--config.seed=1', '--config.epochs=1']
  out = capsys.readouterr().out
  assert 'mine:fail, seed 1: failed: error: awp.gamma must be small.' in out
  text = (folder / 'table.md').read_text()
  deviation = statistics.stdev([25, 37.5])
  assert f'| mine:good | 0, 1 | 31.25 ± {deviation:.2f} | - |' in text
  assert 'mine:crash, seed 0: failed: KeyError: 3' in text
  stored = json.loads((folder / 'table.json').read_text())
  assert [run['measured']['best'] for run in stored['mine:good']['runs']] == [
      25.0, 37.5]
  assert stored['mine:kill, seed 0']['runs'][0]['error'] == (
      'failed: killed by SIGKILL')
  with Image.open(folder / 'table.png') as image:
    assert image.format == 'PNG' and image.width > 900

  # The finished are not run again; the others are tried once more.
  before = len(calls(folder))
  assert table.main(
      [*arguments[:2], '--seeds=1', f'--configs={config}:good,{config}:fail'],
      fake) == 1
  assert [call[0] for call in calls(folder)[before:]] == [
      f'--config={config}:fail']

  # A finished run is not passed off for one with other values.
  with pytest.raises(ValueError, match=r'a run with epochs=1; choose another'):
    runner.run_jobs(
        [jobs.Job(f'{config}:good', 0)], folder, ['--config.epochs=2'], fake)

  # Without a list the table has all that is there, and runs nothing.
  before = len(calls(folder))
  assert table.main([f'--workdir={folder}', '--only_table'], fake) == 0
  out = capsys.readouterr().out
  assert all(f'mine:{kind}' in out for kind in kinds)
  assert len(calls(folder)) == before


@pytest.mark.parametrize('stored, text, same', [
    (1, '1', True), (1, '2', False), (0.01, '1e-2', True), (0.5, '0.51', False),
    (True, 'true', True), (True, 'False', False), ('AT', 'AT', True),
    ('AT', 'MART', False), ([0.5, 0.75], '(0.5, 0.75)', True),
    ([0.5, 0.75], '(0.5,)', False), ('', '', True), ('', 'x y', False)])
def test_values_as_flags(stored, text, same, tmp_path):
  job = jobs.Job('a.py', 0)
  (tmp_path / job.name).mkdir()
  (tmp_path / job.name / 'config.json').write_text(
      json.dumps({'b.c': stored, 'data_dir': 'x', 'evaluation.d': 1}))
  free = ['--config.data_dir=y', '--config.evaluation.d=2', '--config.new=3']
  runner.check_overrides([job], tmp_path, free)
  if same:
    runner.check_overrides([job], tmp_path, [f'--config.b.c={text}'])
  else:
    with pytest.raises(ValueError, match='choose another --workdir'):
      runner.check_overrides([job], tmp_path, [f'--config.b.c={text}'])


def test_the_table_leaves_accelerators_to_the_runs(folder, fake, tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text('')
  runner.run_jobs([jobs.Job(f'{config}:good', 0)], folder, main=fake)
  # Whoever asked JAX for a device would get an error.
  done = subprocess.run(
      [sys.executable, ROOT / 'experiments/table.py', '--only_table',
       f'--workdir={folder}'],
      env=os.environ | {'JAX_PLATFORMS': 'nowhere'}, capture_output=True,
      text=True, check=False)
  assert done.returncode == 0 and done.stderr == ''
  assert 'mine:good' in done.stdout and (folder / 'table.png').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_the_run_gently(number, folder, fake, tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text('')
  listed = [jobs.Job(f'{config}:wait', seed) for seed in (0, 1)]
  ready, state = folder / listed[0].name / 'ready', []

  def interrupt():
    end = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < end:
      time.sleep(0.01)
    state.append(runner.state_of(folder, listed[0].name).kind)
    os.kill(os.getpid(), number)

  # A shell's background jobs are born with SIGINT ignored, and the sweep would
  # respect that.
  before = signal.signal(number, signal.SIG_DFL)
  try:
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert runner.run_jobs(listed, folder, main=fake) == number.name
    thread.join()
    assert signal.getsignal(number) == signal.SIG_DFL
  finally:
    signal.signal(number, before)
  assert state == ['running']
  assert (ready.parent / 'caught').read_text() == '1'
  assert runner.state_of(folder, listed[0].name).kind == 'stopped'
  assert runner.state_of(folder, listed[1].name).kind == 'not started'
  assert len(calls(folder)) == 1


def test_a_run_of_another_process_is_left_alone(folder, fake, tmp_path, capsys):
  config = tmp_path / 'mine.py'
  config.write_text('')
  job = jobs.Job(str(config), 0)
  folder.mkdir()
  with (folder / f'{job.name}.stderr').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    assert runner.run_jobs([job], folder, main=fake) is None
    assert runner.state_of(folder, job.name).kind == 'running'
  assert 'another process is at it' in capsys.readouterr().out
  assert not (folder / 'calls').exists()
  runner.run_jobs([job], folder, main=fake)
  assert runner.state_of(folder, job.name).kind == 'finished'


TINY = [f'--config.{field}' for field in (
    'num_train=32', 'num_test=32', 'batch_size=32', 'epochs=1',
    'attack.num_steps=1', 'eval.num_steps=1', 'eval.batch_size=32',
    'eval.num_train=32', 'eval.every_epochs=1')]


def test_real_runs(folder, monkeypatch, capfd):
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  arguments = [f'--configs={CONFIGS}/digits_at.py', f'--workdir={folder}']
  assert table.main([*arguments, *TINY], runner.MAIN) == 0
  out, err = capfd.readouterr()
  assert 'robust accuracy: best' in out and err == ''
  summary = json.loads((folder / 'digits_at-seed0/summary.json').read_text())
  stored = json.loads((folder / 'table.json').read_text())['digits_at']
  (run,) = stored['runs']
  assert run['kind'] == 'finished'
  assert run['measured']['best'] == (
      100 * summary['best']['robust_accuracy'])
  assert run['measured']['gap'] == (
      100 * summary['robust_generalisation_gap'])
  assert stored['changed']['num_train'] == 32
  assert stored['published'] is None

  arguments[0] = f'--configs={CONFIGS}/digits_awp.py'
  assert table.main([*arguments, '--config.awp.gama=1'], runner.MAIN) == 1
  out, err = capfd.readouterr()
  assert "failed: error: the config has an unknown field 'awp.gama'" in out
  assert '\ndigits_at ' in out and err == ''
