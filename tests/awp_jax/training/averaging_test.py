"""Tests of moving averages against their closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax


def test_average_is_the_weighted_sum_of_all_weights():
  rng = np.random.default_rng(0)
  seen = rng.normal(size=(7, 3)).astype(np.float32)
  decay = 0.9
  average = awp_jax.Average({'w': jnp.asarray(seen[0])}, {'m': jnp.zeros(2)})
  for w in seen[1:]:
    average = awp_jax.update_average(
        average, {'w': jnp.asarray(w)}, {'m': jnp.ones(2)}, decay)
  weights = (1 - decay) * decay ** np.arange(5, -1, -1)
  wanted = decay ** 6 * seen[0] + weights @ seen[1:]
  np.testing.assert_allclose(average.params['w'], wanted, rtol=1e-5)
  np.testing.assert_allclose(
      average.batch_stats['m'], 1 - decay ** 6, rtol=1e-5)


def test_decay_grows_to_its_value():
  steps = np.arange(3000)
  decays = np.asarray([awp_jax.ema_decay(0.995, s) for s in (0, 1, 90, 2999)])
  np.testing.assert_allclose(decays, [0.1, 2 / 11, 0.91, 0.995], rtol=1e-6)
  everywhere = jax.vmap(lambda s: awp_jax.ema_decay(0.995, s))(steps)
  assert (np.diff(everywhere) >= 0).all() and everywhere.max() == np.float32(
      0.995)


def test_constant_weights_are_their_average_bit_for_bit():
  w = {'w': jnp.asarray([0.1, 1e-30, 3e5], jnp.float32)}
  average = awp_jax.Average(w, {})
  for _ in range(3):
    average = awp_jax.update_average(average, w, {}, jnp.float32(0.3))
  np.testing.assert_array_equal(average.params['w'], w['w'])


def test_dtypes_are_preserved():
  w = {'w': jnp.ones(2, jnp.bfloat16)}
  average = awp_jax.update_average(
      awp_jax.Average(w, {}), w, {}, awp_jax.ema_decay(0.9, 3))
  assert average.params['w'].dtype == jnp.bfloat16


@pytest.mark.parametrize('decay', [1.0, -0.1, float('nan')])
def test_bad_decay(decay):
  with pytest.raises(ValueError, match='decay must be'):
    awp_jax.ema_decay(decay, 0)
