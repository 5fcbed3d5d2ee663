"""Which passes of a step update the batch statistics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import methods
from tests.helpers.train_step_problem import (
    AT,
    MART,
    NATURAL,
    OBJECTIVES,
    TRADES,
    batch_of,
    counting,
    run_tiny,
    state_of,
    step,
    tiny_problem,
)


# The attack makes two steps; that of AT ends with a third pass.
@pytest.mark.parametrize('objective,statistics,attack,passes', [
    (AT, 'perturbed', {}, 1),
    (AT, 'reference', {}, 2 + 1 + 1 + 1),
    (AT, 'reference', {'restarts': 2}, 2 * (2 + 1) + 1 + 1),
    (AT, 'reference', {'mode': 'eval'}, 1 + 1),
    (TRADES, 'perturbed', {}, 2),
    (TRADES, 'reference', {}, 3),
    (TRADES, 'reference', {'mode': 'train'}, 2 + 1 + 3),
    (MART, 'reference', {}, 2),
    (NATURAL, 'perturbed', {}, 1),
    (NATURAL, 'reference', {}, 1),
])
def test_passes_that_move_the_statistics(
    objective, statistics, attack, passes):
  state = state_of(counting, jnp.float32(0))
  # The ascent does not update the statistics.
  state, _ = jax.jit(functools.partial(
      step, objective=objective, statistics=statistics,
      attack=awp_jax.Attack(0.05, 2, **attack),
      perturbation=methods.awp(0.1)))(state, batch_of())
  assert state.batch_stats == passes
  assert state.step == 1


def test_policies_train_the_same_weights_with_other_statistics(x64):
  state = state_of(counting, jnp.float64(0))
  outs = [
      step(state, batch_of(), statistics=statistics, alternations=2,
           perturbation=methods.awp(0.1))
      for statistics in ('perturbed', 'reference')]
  chex.assert_trees_all_close(
      *((out.params, metrics) for out, metrics in outs), rtol=1e-7, atol=1e-14)
  assert outs[0][0].batch_stats == 1
  assert outs[1][0].batch_stats == 2 * (2 + 1) + 1 + 1


def ema(stats, batches):
  for batch in batches:
    stats = 0.9 * stats + 0.1 * batch
  return stats


def hidden_mean(params, x):
  layer = params['Dense_0']
  return (x.reshape(len(x), -1) @ layer['kernel'] + layer['bias']).mean(axis=0)


@pytest.mark.parametrize('statistics', ['perturbed', 'reference'])
@pytest.mark.parametrize('name', ['TRADES', 'MART'])
def test_statistics_policies_with_two_passes(name, statistics, x64):
  # With a negligible attack step, x' is the start. All passes are at the old
  # weights (gamma 0).
  state, (x, y) = tiny_problem()
  start = x + 1e-3
  got, _ = run_tiny(
      state, (x, y), objective=OBJECTIVES[name], statistics=statistics,
      attack=awp_jax.Attack(1e-9, 1, start=start))
  natural = hidden_mean(state.params, x)
  adversarial = hidden_mean(state.params, start)
  order = {
      ('TRADES', 'perturbed'): [adversarial, natural],
      ('TRADES', 'reference'): [adversarial, natural, natural],
      ('MART', 'perturbed'): [natural, adversarial],
      ('MART', 'reference'): [natural, adversarial]}[name, statistics]
  np.testing.assert_allclose(
      got.batch_stats['BatchNorm_0']['mean'],
      ema(np.zeros(6), order), atol=1e-7)


def test_statistics_of_at_under_both_policies(x64):
  state, (x, y) = tiny_problem()
  start = x + 1e-3
  attack = awp_jax.Attack(1e-9, 3, start=start)
  adversarial = hidden_mean(state.params, start)
  simple, _ = run_tiny(state, (x, y), attack=attack)
  np.testing.assert_allclose(
      simple.batch_stats['BatchNorm_0']['mean'],
      ema(np.zeros(6), [adversarial]), atol=1e-7)
  published, _ = run_tiny(state, (x, y), attack=attack, statistics='reference')
  # Three steps, a further pass, the pass at w + v, a natural one at the new w.
  order = [adversarial] * 5 + [hidden_mean(published.params, x)]
  np.testing.assert_allclose(
      published.batch_stats['BatchNorm_0']['mean'],
      ema(np.zeros(6), order), atol=1e-7)
