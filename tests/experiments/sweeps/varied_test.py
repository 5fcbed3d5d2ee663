"""--vary: names of runs, combinations, refusals, and the figure's numbers."""

import json
import statistics

from PIL import Image
import pytest

from experiments import table
from experiments.sweeps import flags, jobs, records, runner, varied
from experiments.util.errors import UserError
from tests.experiments.sweeps import runner_test


@pytest.mark.parametrize('texts, combined', [
    ([], [()]),
    (['awp.gamma=0.01,1e-2'], [(('awp.gamma', '0.01'),),
                               (('awp.gamma', '1e-2'),)]),
    (['a=1,2', 'b.c=x'], [(('a', '1'), ('b.c', 'x')),
                          (('a', '2'), ('b.c', 'x'))]),
    (['a=f(x=1,y=[2,3]), g("p,)q", 4),(1,)'],
     [(('a', 'f(x=1,y=[2,3])'),), (('a', 'g("p,)q", 4)'),), (('a', '(1,)'),)]),
    (['a=b=c'], [(('a', 'b=c'),)]),
    (['a="x,y",\'z\''], [(('a', 'x,y'),), (('a', 'z'),)]),
])
def test_combinations(texts, combined):
  assert jobs.parse_varied(texts) == combined


@pytest.mark.parametrize('texts, shown', [
    (['awp.gamma'], "got 'awp.gamma'"), (['a='], "got 'a='"),
    (['a=1,'], "got 'a=1,'"), (['=1'], "got '=1'"), (['a b=1'], "got 'a b=1'"),
    (['a=1,2,1'], 'a value more than once'),
    (['a=1', 'b=1', 'a=2'], "'a' more than once")])
def test_wrong_lists(texts, shown):
  with pytest.raises(UserError, match='--vary') as caught:
    jobs.parse_varied(texts)
  assert shown in str(caught.value)


@pytest.mark.parametrize('values', [
    (), (('awp.gamma', '0.005'),),
    (('data_dir', '/a b/c%2F@d'), ('x', 'f(a=1, b="-seed3")'), ('y', 'ü=+'))])
def test_a_name_keeps_everything(values):
  job = jobs.Job('x/mine.py:L2,WRN-34-10', 3, values)
  assert '/' not in job.name
  assert jobs.parse_name(job.name) == ('mine:L2,WRN-34-10', 3, values)


def test_names_of_files():
  job = jobs.Job('mine.py', 0, (('awp.gamma', '0.005'),))
  assert job.name == 'mine@awp.gamma=0.005-seed0'
  assert jobs.parse_name(job.name).row == 'mine, awp.gamma=0.005'
  with pytest.raises(UserError, match='longer than 248 bytes'):
    jobs.make(['mine.py'], [0], [(('npz_path', 'x' * 240),)])


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('')
  return path


@pytest.fixture
def fake(tmp_path):
  path = tmp_path / 'fake_main.py'
  path.write_text(runner_test.FAKE)
  return path


def test_a_sweep(config, fake, tmp_path, capsys):
  folder = tmp_path / 'runs'
  arguments = [
      f'--configs={config}', f'--workdir={folder}', '--seeds=0,1',
      '--vary=awp.gamma=0.02,0.005']
  assert table.main(arguments, fake) == 0
  assert [call[1:] for call in runner_test.calls(folder)] == [
      [f'--workdir={folder}/mine@awp.gamma={gamma}-seed{seed}',
       f'--config.seed={seed}', f'--config.awp.gamma={gamma}']
      for seed in (0, 1) for gamma in (0.02, 0.005)]
  stored = json.loads((folder / 'table.json').read_text())
  assert list(stored) == ['mine, awp.gamma=0.02', 'mine, awp.gamma=0.005']
  entry = stored['mine, awp.gamma=0.005']
  assert entry['varied'] == {'awp.gamma': '0.005'}
  assert entry['baseline'] == 'mine, awp.gamma=0.02'
  assert entry['differences']['best']['size'] == 2
  with Image.open(folder / 'table_awp.gamma.png') as image:
    assert image.format == 'PNG' and image.width > 900
  # Nothing is repeated, and stored rows may be the baseline.
  assert table.main(
      [*arguments, '--baseline=mine, awp.gamma=0.005'], fake) == 0
  assert len(runner_test.calls(folder)) == 4
  assert 'Differences to mine, awp.gamma=0.005' in capsys.readouterr().out
  # A renamed folder does not pass for a run with another value.
  (folder / 'mine@awp.gamma=0.02-seed0').rename(
      folder / 'mine@awp.gamma=0.03-seed0')
  assert table.main([f'--workdir={folder}', '--only_table'], fake) == 2
  err = capsys.readouterr().err
  assert 'must hold a run with awp.gamma=0.03' in err and 'got 0.02' in err


@pytest.mark.parametrize('arguments, shown', [
    (['--vary=awp.gama=1,2'], "'awp.gama'. Did you mean 'awp.gamma'"),
    (['--vary=awp.gamma=1,x'], 'awp.gamma=x'),
    (['--vary=awp.gamma=0.01,1e-2'], "one value twice, '0.01' and '1e-2'"),
    (['--vary=user.x=1,1.0'], "one value twice, '1' and '1.0'"),
    (['--vary=user.x=true,True'], 'one value twice'),
    (['--vary=seed=0,1'], 'set seeds with --seeds'),
    (['--vary=log_every_steps=1,2'], 'does not change the training'),
    (['--vary=evaluation.num_examples=1,2'], 'does not change the training'),
    (['--vary=epochs=1,2', '--config.epochs=3'], 'epochs is set by --vary and'),
])
def test_refusals(arguments, shown, config, fake, tmp_path, capsys):
  """Before the first run."""
  code = table.main(
      [f'--configs={config}', f'--workdir={tmp_path}/runs', *arguments], fake)
  out, err = capsys.readouterr()
  assert code == 2 and out == '' and shown in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'runs' / 'calls').exists()


def run(label, seed, values=(), kind='finished', **config):
  measured = config.pop('measured', {'best': 1.0, 'final': 1.0, 'gap': 1.0})
  return records.Record(
      jobs.Job(f'{label}.py', seed, values).name, label, seed,
      runner.State(kind, 1), config | {'seed': seed}, [], measured, '', values)


def test_series():
  """Equal configs join by their fields, whatever their names are."""
  def gamma(text):
    return (('awp.gamma', text),)

  runs = [
      run('awp', 0, gamma('0.02'), **{'awp.gamma': 0.02}, measured={'best': 3}),
      run('awp', 1, gamma('0.02'), **{'awp.gamma': 0.02}, measured={'best': 5}),
      run('awp', 0, gamma('0.01'), **{'awp.gamma': 0.01}, measured={'gap': 2}),
      run('awp', 2, gamma('0.04'), 'stopped', **{'awp.gamma': 0.04}),
      # The same run under its plain name counts once; AT is gamma = 0.
      run('awp', 1, **{'awp.gamma': 0.02}, measured={'best': 70}),
      run('at', 0, **{'awp.gamma': 0.0}, measured={'best': 1, 'gap': 9}),
      # Of another series, with one value only.
      run('trades', 0, gamma('0.01'), **{'awp.gamma': 0.01}, beta=6.0)]
  found = varied.collect(records.group(runs))
  assert found == {'awp.gamma': {'awp': {
      0.0: {'best': [1], 'gap': [9]}, 0.01: {'gap': [2]},
      0.02: {'best': [3, 5]}}}}
  (series,) = found.values()
  assert list(series['awp']) == [0.0, 0.01, 0.02]


def test_two_fields_have_a_figure_each():
  runs = [
      run('x', 0, (('a', str(a)), ('b', b)), a=a, b=b)
      for a in (1, 2) for b in ('p', 'q', 'r')]
  found = varied.collect(records.group(runs))
  assert {field: list(series) for field, series in found.items()} == {
      'a': ['x, b=p', 'x, b=q', 'x, b=r'], 'b': ['x, a=1', 'x, a=2']}
  assert list(found['b']['x, a=2']) == ['p', 'q', 'r']


def test_figure(tmp_path, monkeypatch):
  """Means and standard deviations at the values, gaps apart."""
  from matplotlib.axes import Axes

  from experiments.reports import curves
  drawn, draw = [], Axes.errorbar

  def errorbar(axis, x, y, spread, **style):
    drawn.append((list(x), list(y), list(spread), style['label']))
    return draw(axis, x, y, spread, **style)

  monkeypatch.setattr(Axes, 'errorbar', errorbar)
  points = {0.0: {'best': [1.0, 4.0], 'gap': [2.0]}, 0.5: {'best': [3.0]}}
  curves.plot_varied('f', {'s': points}, tmp_path / 'x.png')
  spread = statistics.stdev([1.0, 4.0])
  assert drawn == [
      ([0.0, 0.5], [2.5, 3.0], [spread, 0.0], 's, best'),
      ([], [], [], 's, last'), ([0.0], [2.0], [0.0], 's')]
  drawn.clear()
  curves.plot_varied(
      'f', {'s': {'a': {'gap': [1.0]}, 'b': {'gap': [2.0]}}},
      tmp_path / 'x.png')
  assert drawn[-1] == ([0, 1], [1.0, 2.0], [0.0, 0.0], 's')


@pytest.mark.parametrize('text, stored', [
    ('1', '1'), ('1', 1), ('1', 1.0), ('true', True), ('False', False),
    ('inf', float('inf')), ('1e-2', 0.01), ('None', 'None'), ('None', None),
    ('(1, 2)', [1, 2]), ('a b', 'a b')])
def test_free_fields_are_compared_as_the_config_reads_them(text, stored):
  assert flags.is_same('user.x', text, stored)
  assert not flags.is_same('user.x', f'{text}0', stored)


def test_a_run_from_before_a_field_was_added():
  runs = [run('x', 0), run('x', 0, (('user.w', '1'),), **{'user.w': 1.0}),
          run('x', 0, (('user.w', '2'),), **{'user.w': 2.0})]
  (series,) = varied.collect(records.group(runs)).values()
  assert list(series['x']) == [1.0, 2.0]


@pytest.mark.parametrize('vary, shown', [
    ('user.wieght=1.0,2.0', "has no field 'user.wieght', only user.weight"),
    ('user.weight=a,1.0', "--vary=user.weight: 'a'"),
    ('model.kwargs.x=1,2', "has no field 'model.kwargs.x'")])
def test_own_fields_are_checked_before_the_first_run(
    vary, shown, fake, tmp_path, capsys):
  path = tmp_path / 'mine.py'
  path.write_text(
      'from experiments.configs import base\n'
      'def get_config():\n  config = base.get_config()\n'
      '  config.user.weight = 0.5\n  return config\n')
  arguments = [f'--configs={path}', f'--workdir={tmp_path}/runs']
  assert table.main([*arguments, f'--vary={vary}'], fake) == 2
  assert shown in capsys.readouterr().err
  assert not (tmp_path / 'runs' / 'calls').exists()
  assert table.main([*arguments, '--vary=awp.gamma=0.1,0.2'], fake) == 0
