"""The processes of a sweep: failures, signals, locks, and a real run."""

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

from PIL import Image
import pytest

from experiments import table
from experiments.sweeps import flags, jobs, runner
from experiments.util.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
CONFIGS = ROOT / 'experiments/configs'


#: Replaces `main.py`; the config's argument sets what it does.
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
config |= {
    name[7:]: float(text) for name, text in flags.items()
    if name.startswith('config.awp.')}
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


def check_table(folder):
  """Checks the files of the sweep with failures below."""
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


def test_failures_are_listed_and_other_runs_continue(
    folder, fake, tmp_path, capsys):
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
      'silent': ('failed', 0, 'failed: exit code 3, no output'),
      'kill': ('failed', 0, 'failed: killed by SIGKILL'),
      'quit': ('stopped', 0, ''), 'good': ('finished', 1, '')}
  assert calls(folder)[-1] == [
      f'--config={config}:good', f'--workdir={folder}/mine+good-seed1',
      '--config.seed=1', '--config.epochs=1']
  out = capsys.readouterr().out
  assert 'mine:fail, seed 1: failed: error: awp.gamma must be small.' in out
  check_table(folder)

  # Finished runs are not repeated; failed ones are.
  before = len(calls(folder))
  assert table.main(
      [*arguments[:2], '--seeds=1', f'--configs={config}:good,{config}:fail'],
      fake) == 1
  assert [call[0] for call in calls(folder)[before:]] == [
      f'--config={config}:fail']

  # A finished run is not reported for other values.
  with pytest.raises(
      ValueError, match=r"a run with epochs=1, not 2; choose another"):
    runner.run_jobs(
        [jobs.Job(f'{config}:good', 0)], folder, ['--config.epochs=2'], fake)

  # Without --configs, the table lists all runs and starts none.
  before = len(calls(folder))
  assert table.main([f'--workdir={folder}', '--only_table'], fake) == 0
  out = capsys.readouterr().out
  assert all(f'mine:{kind}' in out for kind in kinds)
  assert len(calls(folder)) == before


@pytest.mark.parametrize('name, stored, text, says', [
    ('epochs', 1, '1', ''), ('epochs', 1, '2', 'not 2'),
    ('epochs', 16, '0x10', ''), ('epochs', 1, 'True', 'epochs'),
    ('epochs', 1, '1.0', 'epochs'), ('awp.gamma', 0.01, '1e-2', ''),
    ('beta', 6.0, '6', ''), ('beta', 0.5, '0.51', 'not 0.51'),
    ('model.normalize', True, 'true', ''), ('model.normalize', True, 't', ''),
    ('model.normalize', True, 'False', 'not False'),
    ('objective', 'AT', 'AT', ''), ('objective', 'AT', 'MART', "not 'MART'"),
    ('npz_path', '/Big.npz', '/big.npz', "not '/big.npz'"),
    ('npz_path', '', '', ''),
    ('optimizer.decay_at', [0.5, 0.75], '(0.5, 0.75)', ''),
    ('optimizer.decay_at', [0.5, 0.75], '(0.5,)', 'not [0.5]')])
def test_flags_mean_what_they_mean_to_the_run(
    name, stored, text, says, tmp_path):
  job = jobs.Job('a.py', 0)
  (tmp_path / job.name).mkdir()
  (tmp_path / job.name / 'config.json').write_text(
      json.dumps({name: stored, 'data_dir': 'x', 'evaluation.batch_size': 1}))
  free = ['--config.data_dir=y', '--config.evaluation.batch_size=2', '--debug']
  flags.check_overrides([job], tmp_path, free)
  given = [f'--config.{name}={text}']
  if not says:
    flags.check_overrides([job], tmp_path, given)
  else:
    with pytest.raises(UserError) as raised:
      flags.check_overrides([job], tmp_path, given)
    assert says in str(raised.value)


@pytest.mark.parametrize('field', ['evaluation.nonsense', 'awp.decay_at'])
def test_unknown_and_obsolete_fields_are_refused(field, tmp_path):
  with pytest.raises(UserError, match=f'unknown field {field!r}'):
    flags.check_overrides([], tmp_path, [f'--config.{field}=3'])


@pytest.mark.parametrize('flag, shown', [
    ('model.normalize=False', 'a run with model.normalize=True'),
    ('attack.restarts=5', 'a run with attack.restarts=1, not 5'),
    ('data_seed=7', 'a run with data_seed=3'),
    ('awp.update_at=perturbed', "a run with awp.update_at='natural'"),
    ('model.normalise=True', "unknown field 'model.normalise'"),
    ('awp.gama=0.5', "unknown field 'awp.gama'. Did you mean 'awp.gamma'?")])
def test_flags_are_compared_with_the_config_of_an_older_run(
    flag, shown, tmp_path):
  job = jobs.Job('a.py', 3)
  (tmp_path / job.name).mkdir()
  (tmp_path / job.name / 'config.json').write_text(json.dumps(
      {'seed': 3, 'model.normalise': True, 'awp.decay_at': 'natural'}))
  with pytest.raises(UserError) as raised:
    flags.check_overrides([job], tmp_path, [f'--config.{flag}'])
  assert shown in str(raised.value)


def test_every_run_and_every_flag_is_compared(tmp_path):
  new, old = jobs.Job('a.py', 0), jobs.Job('b.py', 0)
  (tmp_path / old.name).mkdir()
  (tmp_path / old.name / 'config.json').write_text('{"epochs": 1}')
  with pytest.raises(UserError, match='a run with epochs=1'):
    flags.check_overrides(
        [new, old], tmp_path, ['--config.data_dir=y', '--config.epochs=2'])


def test_the_table_leaves_accelerators_to_the_runs(folder, fake, tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text('')
  runner.run_jobs([jobs.Job(f'{config}:good', 0)], folder, main=fake)
  # Asking JAX for a device would be an error.
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

  # Background jobs of a shell ignore SIGINT, and the sweep respects that.
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
  assert 'running in another process' in capsys.readouterr().out
  assert not (folder / 'calls').exists()
  runner.run_jobs([job], folder, main=fake)
  assert runner.state_of(folder, job.name).kind == 'finished'


TINY = [f'--config.{field}' for field in (
    'num_train=32', 'num_test=32', 'batch_size=32', 'epochs=1',
    'attack.num_steps=1', 'eval.num_steps=1', 'eval.batch_size=32',
    'eval.num_train=32', 'eval.every_epochs=1')]


@pytest.mark.slow
def test_real_runs(folder, monkeypatch, capfd):
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'].replace(
      '--xla_force_host_platform_device_count=8', ''))
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
  assert table.main([*arguments, '--config.awp.gama=1'], runner.MAIN) == 2
  assert "unknown field 'awp.gama'" in capfd.readouterr().err
  assert table.main([*arguments, '--config.awp.gamma=-1'], runner.MAIN) == 1
  out, err = capfd.readouterr()
  assert 'failed: error: awp.gamma must be' in out
  assert '\ndigits_at ' in out and err == ''


def test_a_bare_flag_is_true_and_the_last_flag_counts():
  found = flags.parse_flags([
      '--config.model.normalize', '--config.epochs=1', '--config.epochs=2'])
  assert found == {'model.normalize': True, 'epochs': 2}


def test_differences_to_any_row(folder, fake, tmp_path, capsys):
  """In the printed and both stored tables, also between the runs."""
  config = tmp_path / 'mine.py'
  config.write_text('')
  arguments = [f'--workdir={folder}', '--baseline=mine:b', '--seeds=0,1']
  assert table.main(
      [*arguments, f'--configs={config}:a,{config}:b'], fake) == 0
  row = '| mine:a | 2 | +0.00 (+0.00 to +0.00) |'
  assert row in (folder / 'table.md').read_text()
  out = capsys.readouterr().out
  assert 'mine:a' in out and 'Differences to mine:b in points' in out
  stored = json.loads((folder / 'table.json').read_text())
  assert stored['mine:a']['differences']['best']['size'] == 2
  assert stored['mine:a']['baseline'] == 'mine:b'
  assert 'baseline' not in stored['mine:b']
  # Of stored runs, and of the row of a config with other fields.
  for baseline in ('mine:a', "mine:a'"):
    assert table.main([
        f'--workdir={folder}', f'--baseline={baseline}', '--only_table'],
        fake) == 0


def test_the_table_between_runs_has_the_same_baseline(
    folder, fake, tmp_path, monkeypatch):
  config, seen = tmp_path / 'mine.py', []
  config.write_text('')
  monkeypatch.setattr(
      table, 'write', lambda workdir, names, baseline='': seen.append(baseline))
  assert table.main([
      f'--workdir={folder}', '--baseline=mine:b',
      f'--configs={config}:a,{config}:b'], fake) == 0
  assert seen == ['mine:b'] * 3


def test_a_folder_named_after_another_seed(folder, fake, tmp_path, capsys):
  """Two names of one run would be two seeds, with no spread."""
  config = tmp_path / 'mine.py'
  config.write_text('')
  assert table.main([f'--workdir={folder}', f'--configs={config}:a'], fake) == 0
  (folder / 'mine+a-seed1').mkdir()
  for file in (folder / 'mine+a-seed0').iterdir():
    if file.is_file():
      (folder / 'mine+a-seed1' / file.name).write_bytes(file.read_bytes())
  capsys.readouterr()
  assert table.main([f'--workdir={folder}', '--only_table'], fake) == 2
  assert re.fullmatch(
      r'error: \S+mine\+a-seed1 must hold a run of seed 1, as its name says, '
      r'got seed 0: rename it, or train with --config\.seed=1\.\n',
      capsys.readouterr().err)


def test_a_baseline_without_a_finished_run(folder, fake, tmp_path, capsys):
  config = tmp_path / 'mine.py'
  config.write_text('')
  assert table.main([
      f'--workdir={folder}', f'--configs={config}:crash,{config}:a,{config}:b'],
      fake) == 1
  text = (folder / 'table.md').read_text()
  assert "There are no differences to 'mine:crash': it has no finished" in text
  assert 'Differences to' not in text
