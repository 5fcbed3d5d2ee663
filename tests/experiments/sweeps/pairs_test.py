"""Paired differences: intervals against tabulated quantiles, shared seeds."""

import json
import math

import numpy as np
import pytest

from experiments import table
from experiments.sweeps import pairs, records, runner


def run(label, seed, kind='finished', config=(), **measured):
  return records.Record(
      f'{label}-seed{seed}', label, seed, runner.State(kind, 1), dict(config),
      [], measured)


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
  assert found.baseline == 'at' and list(found.intervals) == ['awp']
  values = found.intervals['awp']
  assert values.keys() == {'best', 'final'}
  assert values['best'] == pairs.interval([4.0, 2.0])
  assert values['final'].low == values['final'].high == 3.0
  back = pairs.against(groups, 'awp').intervals['at']['best']
  assert (back.mean, back.low) == (-3.0, -values['best'].high)
  assert pairs.against(groups, 'stopped') == pairs.Differences('stopped', {})
  assert pairs.against({'stopped': groups['stopped']}) == (
      pairs.Differences('', {}))


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


def test_one_seed_is_stored_without_an_interval():
  groups = {'at': [run('at', 0, best=50.0)], 'awp': [run('awp', 0, best=52.0)]}
  found = pairs.against(groups)
  assert table.pair_rows(found) == [
      ['config', 'pairs', 'best'], ['awp', '1', '+2.00']]
  text = json.dumps(table.as_json(groups, found), allow_nan=False)
  assert json.loads(text)['awp']['differences']['best'] == {
      'mean': 2.0, 'low': None, 'high': None, 'size': 1}


@pytest.mark.parametrize('field, value', [
    ('dataset', 'svhn'), ('data_seed', 1), ('num_train', 100),
    ('num_test', 100), ('num_validation', 8), ('image_size', 16),
    ('npz_path', 'a.npz')])
def test_other_images_are_not_compared(field, value):
  config = {'dataset': 'cifar10', 'data_seed': 0, 'num_train': 0, 'gamma': 0.0}
  groups = {
      'at': [run('at', 0, config=config, best=50.0)],
      'other': [run('other', 0, config=config | {field: value}, best=51.0)],
      'awp': [run('awp', 0, config=config | {'gamma': 0.01}, best=52.0)]}
  found = pairs.against(groups)
  assert list(found.intervals) == ['awp'] and found.other_data == ('other',)


def test_values_that_one_run_lacks():
  """Both directions, one group with other keys, and AutoAttack."""
  groups = {
      'at': [run('at', 0, best=50.0, autoattack=40.0), run('at', 1, best=51.0)],
      'awp': [run('awp', 0, best=52.0), run('awp', 1, best=55.0, gap=1.0)],
      'trades': [run('trades', 0, best=51.0, autoattack=42.0),
                 run('trades', 1, best=51.0, autoattack=43.0)]}
  head, awp, trades = table.pair_rows(pairs.against(groups))
  assert head == ['config', 'pairs', 'best', 'AutoAttack']
  assert awp == ['awp', '2', '+3.00 (-9.71 to +15.71)', '-']
  assert trades[-1] == '+2.00, 1 of 2 pairs'
