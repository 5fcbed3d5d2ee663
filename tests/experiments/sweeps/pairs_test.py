"""Paired differences: intervals against tabulated quantiles, shared seeds."""

import math

import numpy as np
import pytest

from experiments import table
from experiments.sweeps import pairs, records, runner


def run(label, seed, kind='finished', **measured):
  return records.Record(
      f'{label}-seed{seed}', label, seed, runner.State(kind, 1), {}, [],
      measured)


@pytest.mark.parametrize('values, quantile', [
    ([1.0, 4.0], 12.7062), ([2.0, 3.0, 7.0], 4.3027),
    ([0.5, -1.0, 2.0, 0.0, 1.5], 2.7764)])
def test_interval(values, quantile):
  """Quantiles of Student's distribution from a printed table."""
  found = pairs.interval(values)
  spread = np.std(values, ddof=1) / np.sqrt(len(values))
  assert found.size == len(values)
  np.testing.assert_allclose(found.mean, np.mean(values), atol=1e-12)
  np.testing.assert_allclose(found.high - found.mean, quantile * spread, 1e-4)
  np.testing.assert_allclose(found.mean - found.low, quantile * spread, 1e-4)


def test_coverage():
  """95 % of the intervals of five normal values hold the mean."""
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(2000):
    found = pairs.interval(rng.normal(3, 2, 5).tolist())
    hits += found.low < 3 < found.high
  assert 0.935 < hits / 2000 < 0.965


def test_one_value_has_no_interval():
  found = pairs.interval([2.5])
  assert (found.mean, found.size) == (2.5, 1)
  assert math.isnan(found.low) and math.isnan(found.high)


def test_only_runs_of_the_same_seed_are_compared():
  groups = {
      'at': [run('at', seed, best=50.0 + seed, final=40.0) for seed in (0, 1)],
      'awp': [run('awp', seed, best=52.0 + 3 * seed, final=43.0)
              for seed in (1, 2, 0)],
      'other': [run('other', 7, best=60.0)],
      'stopped': [run('stopped', 0, 'stopped', best=60.0)]}
  found = pairs.against(groups)
  assert found.baseline == 'at' and list(found.differences) == ['awp']
  values = found.differences['awp']
  assert values.keys() == {'best', 'final'}
  assert values['best'] == pairs.interval([4.0, 2.0])
  assert values['final'].low == values['final'].high == 3.0
  back = pairs.against(groups, 'awp').differences['at']['best']
  assert (back.mean, back.low) == (-3.0, -values['best'].high)
  assert pairs.against(groups, 'stopped') == pairs.Pairs('stopped', {})
  assert pairs.against({'stopped': groups['stopped']}) == pairs.Pairs('', {})


def test_cells():
  groups = {
      'at': [run('at', 0, best=50.0, natural=80.0), run('at', 1, best=51.0)],
      'awp': [run('awp', 0, best=52.0, natural=79.0), run('awp', 1, best=55.0)]}
  rows = table.pair_rows(pairs.against(groups))
  assert rows == [
      ['config', 'pairs', 'best', 'natural'],
      ['awp', '2', '+3.00 (-9.71 to +15.71)', '-1.00, 1 of 2 pairs']]
  stored = table.as_json(groups, pairs.against(groups))
  assert 'differences' not in stored['at']
  assert stored['awp']['baseline'] == 'at'
  assert stored['awp']['differences']['best']['mean'] == 3.0
