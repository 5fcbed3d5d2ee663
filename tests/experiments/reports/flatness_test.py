"""Flatness against the robust gap: the coefficient, its interval, the runs."""

import json
import math

import numpy as np
import pytest

from experiments import compare
from experiments.reports import flatness


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
  assert flatness.correlation([(0, 0), (1, 1), (2, 2)]) is None
  assert flatness.correlation([(0, k) for k in range(6)]) is None
  assert flatness.correlation([(k, 1) for k in range(6)]) is None
  assert flatness.correlation([(k, -k) for k in range(6)]) == (-1, -1, -1, 6)


def run(rise, gap):
  landscape = None if rise is None else {'subjects': {'last': {
      'random': {'train': {'mean_rise': {'mean': rise}}}}}}
  return {'landscape': landscape,
          'summary': {'robust_generalisation_gap': gap}}


def test_points_are_those_of_runs_with_a_landscape():
  groups = {'AT': [run(0.5, 0.2), run(None, 0.3)], 'none': [run(None, 0.1)],
            'AT-AWP': [run(0.25, 0.1)]}
  assert flatness.points(groups) == {
      'AT': [(0.5, pytest.approx(20))], 'AT-AWP': [(0.25, pytest.approx(10))]}
  assert flatness.sentence(flatness.points(groups)) == ''


def test_the_figure_has_a_marker_for_every_point(tmp_path):
  groups = {'AT': [(k / 10, 30 + k) for k in range(12)], 'B': [(0.1, 9)]}
  drawn, = flatness.draw(tmp_path, groups)
  numbers = json.loads((tmp_path / 'flatness.json').read_text())['numbers']
  assert numbers['AT']['y'] == [30 + k for k in range(12)]
  assert drawn.caption.startswith("Spearman's rho") and '13 runs' in (
      drawn.caption)
  one, = flatness.draw(tmp_path / 'few', {'B': [(0.1, 9)] * 4}) or [None]
  assert one is None


def test_compare_prints_the_correlation(tmp_path, monkeypatch, capsys):
  groups = {'AT': [run(k / 10, k / 20) for k in range(4)]}
  monkeypatch.setattr(compare.comparison, 'read_run', lambda path: path)
  monkeypatch.setattr(compare.comparison, 'group_by_config', lambda _: groups)
  monkeypatch.setattr(compare.comparison, 'rows', lambda _: [['run']])
  monkeypatch.setattr(compare.comparison, 'write_page', lambda *_: None)
  monkeypatch.setattr(compare.curves, 'plot_comparison', lambda *_: None)
  for one in groups['AT']:
    one['lines'] = []
  compare.main(['x', f'--output={tmp_path / "a.png"}'])
  assert 'gap over 4 runs: +1.00' in ' '.join(capsys.readouterr().out.split())
