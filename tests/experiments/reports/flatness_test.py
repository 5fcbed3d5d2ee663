"""Flatness against the robust gap: the coefficient, its interval, the runs."""

import json
import math

import numpy as np
import pytest

from experiments import compare
from experiments.reports import figures, flatness


def test_rho_and_interval_by_hand():
  # Ranks of y: 1, 3, 2, 5, 4; the squared differences of ranks sum to 4.
  points = list(zip([0.1, 0.2, 0.3, 0.4, 9.0], [1, 30, 2, 50, 40],
                    strict=True))
  found = flatness.correlation(points)
  rho = 1 - 6 * 4 / (5 * 24)
  half = 1.959964 * math.sqrt((1 + rho * rho / 2) / 2)
  assert found == pytest.approx((
      rho, math.tanh(math.atanh(rho) - half),
      math.tanh(math.atanh(rho) + half), 5), rel=1e-6)


def test_the_interval_covers_as_often_as_it_says():
  """Of independent normal pairs, about 95 % of the intervals contain 0."""
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(400):
    found = flatness.correlation([tuple(p) for p in rng.normal(size=(20, 2))])
    covered += found.low <= 0 <= found.high
  assert 0.92 <= covered / 400 <= 0.98


def test_without_enough_points_there_is_no_correlation():
  assert flatness.correlation([(0, 0), (1, 2), (2, 1), (3, 3)]) is None
  assert flatness.correlation([(0, k) for k in range(6)]) is None
  assert flatness.correlation([(k, 1) for k in range(6)]) is None


def test_a_perfect_order_has_no_interval():
  rho, low, high, size = flatness.correlation([(k, -k) for k in range(6)])
  assert (rho, size) == (-1, 6) and math.isnan(low) and math.isnan(high)
  assert 'over 6 runs: -1.00, without an interval. ' in flatness.sentence(
      flatness.Points({'a': [(k, -k) for k in range(6)]}, 0, True))


def run(rise, gap, *, kind='last', step=30, seed=0, **settings):
  subjects = {kind: {
      'step': step, 'random': {'train': {'mean_rise': {'mean': rise}}}}}
  settings = {'settings': {'range': 1.0}, 'threat': {}, 'attack': {},
              'images': {}, 'dataset': {'name': 'd', 'source': 's'}} | settings
  return {'landscape': {'subjects': subjects} | settings, 'name': f'r{seed}',
          'summary': {'robust_generalisation_gap': gap},
          'config': {'batch_size': 16, 'seed': seed},
          # 40 images are three batches of 16.
          'lines': [{'images': 40}] * 10}


def test_points_are_those_of_runs_with_a_landscape_of_the_last_step():
  without = run(0.5, 0.3) | {'landscape': None}
  groups = {'AT': [run(0.5, 0.2), without, run(0.7, 0.2, step=27)],
            'none': [without, run(0.4, 0.1, kind='best')],
            'lost': [run(None, 0.1), run(0.3, None)],
            'AT-AWP': [run(0.25, 0.1)]}
  found = flatness.points(groups)
  assert found.groups == {
      'AT': [(0.5, pytest.approx(20))], 'AT-AWP': [(0.25, pytest.approx(10))]}
  assert found.left_out == 2 and found.comparable
  many = flatness.points(groups | {'more': [run(k, k / 9) for k in range(6)]})
  assert '2 runs with values that are not finite' in flatness.sentence(many)


@pytest.mark.parametrize('other', [
    {'settings': {'range': 0.5}}, {'threat': {'epsilon': 1}},
    {'attack': {'num_steps': 1}}, {'images': {'train': 2}},
    {'dataset': {'name': 'e', 'source': 's'}}])
def test_other_settings_are_not_compared(other, tmp_path):
  runs = [run(k, k / 9) for k in range(6)]
  same = flatness.points({'a': [*runs, run(9, 0.2, dataset={
      'name': 'd', 'source': 'elsewhere'})]})
  assert same.comparable and 'over 7 runs' in flatness.sentence(same)
  found = flatness.points({'a': [*runs, run(9, 0.2, **other)]})
  assert not found.comparable and not flatness.draw(tmp_path, found)
  assert 'are not compared' in flatness.sentence(found)


def test_the_figure_has_a_marker_for_every_point(tmp_path, monkeypatch):
  seen, save = [], figures._save
  monkeypatch.setattr(figures, '_save', lambda axis, *rest: (
      seen.append(axis) or save(axis, *rest)))
  groups = {'AT': [(k / 10, 30 + k) for k in range(12)], 'B': [(0.1, 9)]}
  drawn, = flatness.draw(tmp_path, flatness.Points(groups, 0, True))
  numbers = json.loads((tmp_path / 'flatness.json').read_text())['numbers']
  assert numbers['AT']['x'] == [k / 10 for k in range(12)]
  assert numbers['AT']['y'] == [30 + k for k in range(12)]
  assert "Spearman's rho" in drawn.caption and '13 runs' in drawn.caption
  axis, = seen
  assert 'rise' in axis.get_xlabel() and 'gap' in axis.get_ylabel()
  for line in axis.lines:
    assert line.get_linestyle() == 'None' and line.get_markevery() == 1


def compared(monkeypatch, tmp_path, runs):
  """What `compare` prints, and the curves that it draws."""
  drawn = []
  monkeypatch.setattr(
      compare.comparison, 'read_run', lambda path: runs[int(path.name)])
  monkeypatch.setattr(compare.comparison, 'rows', lambda _: [['run']])
  monkeypatch.setattr(compare.comparison, 'write_page', lambda *_: None)
  monkeypatch.setattr(
      compare.curves, 'plot_comparison', lambda shown, _: drawn.append(shown))
  compare.main([*map(str, range(len(runs))), f'--output={tmp_path / "a.png"}'])
  return drawn


def test_compare_prints_the_correlation(tmp_path, monkeypatch, capsys):
  runs = [run(k / 10, k / 20, seed=k) for k in range(5)]
  shown, = compared(monkeypatch, tmp_path, runs)
  assert 'gap over 5 runs: +1.00' in ' '.join(capsys.readouterr().out.split())
  assert shown == {'r0': [one['lines'] for one in runs]}
  compared(monkeypatch, tmp_path, runs[:4])
  assert 'rho' not in capsys.readouterr().out


def test_a_run_is_not_counted_twice(tmp_path, monkeypatch):
  runs = [run(k / 10, k / 20, seed=k // 2) for k in range(2)]
  with pytest.raises(SystemExit, match="'r0' and 'r0' are runs of one config "
                     'with the same seed, 0'):
    compared(monkeypatch, tmp_path, runs)
