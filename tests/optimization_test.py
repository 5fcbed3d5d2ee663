"""Tests of schedules and optimizers against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optimization
from tests.setup_test import changed


def rates(steps_per_epoch, **fields):
  config = changed(**fields)
  schedule = optimization.build_schedule(config, steps_per_epoch)
  return np.asarray(schedule(jnp.arange(config.epochs * steps_per_epoch)))


def test_cosine():
  got = rates(
      5, epochs=8, optimizer__schedule='cosine', optimizer__learning_rate=0.2)
  np.testing.assert_allclose(
      got, 0.1 * (1 + np.cos(np.pi * np.arange(40) / 40)), rtol=1e-5, atol=1e-8)


def test_cosine_behind_a_rise():
  got = rates(
      4, epochs=6, optimizer__schedule='cosine', optimizer__learning_rate=0.2,
      optimizer__warmup_epochs=1.5)
  k = np.arange(24)
  falling = 0.1 * (1 + np.cos(np.pi * (k - 6) / 18))
  np.testing.assert_allclose(
      got, np.where(k < 6, 0.2 * (k + 1) / 6, falling), rtol=1e-5, atol=1e-8)


def test_steps_behind_a_rise():
  got = rates(
      4, epochs=4, optimizer__learning_rate=1.0, optimizer__decay_at=(0.5,),
      optimizer__warmup_epochs=1.0)
  np.testing.assert_allclose(
      got, [0.25, 0.5, 0.75, 1, 1, 1, 1] + [0.1] * 9, rtol=1e-6)


def test_one_cycle_rises_and_falls():
  got = rates(
      10, epochs=10, optimizer__schedule='one_cycle',
      optimizer__learning_rate=0.5, optimizer__warmup_epochs=3.0)
  k = np.arange(100)
  rising = 0.02 + 0.48 * (1 - np.cos(np.pi * k / 30)) / 2
  falling = 2e-6 + (0.5 - 2e-6) * (1 + np.cos(np.pi * (k - 30) / 70)) / 2
  np.testing.assert_allclose(
      got, np.where(k < 30, rising, falling), rtol=1e-4, atol=1e-7)


def run_both(config, numpy_step, steps=6):
  """The optimizer and a NumPy rule on the same gradients; the parameters."""
  tx = optimization.build_optimizer(config, steps)
  rng = np.random.default_rng(0)
  w = {'w': rng.normal(size=(3, 2)), 'b': rng.normal(size=2)}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w)
  state, memory = tx.init(params), {}
  for k in range(steps):
    g = {name: rng.normal(size=value.shape) for name, value in w.items()}
    updates, state = tx.update(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    w = numpy_step(k, w, g, memory)
    for name, value in w.items():
      np.testing.assert_allclose(params[name], value, rtol=3e-5, atol=1e-6)


BASE = {
    'epochs': 1, 'optimizer__learning_rate': 0.1, 'optimizer__decay_at': ()}


def test_nesterov_l1_and_decay_on_weights_alone():
  config = changed(
      **BASE, optimizer__nesterov=True, optimizer__l1=0.03,
      optimizer__decay='weights', optimizer__weight_decay=0.2)

  def step(k, w, g, memory):
    del k
    result = {}
    for name in w:
      d = g[name]
      if name == 'w':
        d = d + 0.03 * np.sign(w[name]) + 0.2 * w[name]
      memory[name] = 0.9 * memory.get(name, 0) + d
      result[name] = w[name] - 0.1 * (d + 0.9 * memory[name])
    return result

  run_both(config, step)


def test_clipping_sees_the_gradient_of_the_loss_alone():
  config = changed(
      **BASE, optimizer__clip_norm=0.5, optimizer__momentum=0.0,
      optimizer__weight_decay=3.0)

  def step(k, w, g, memory):
    del k, memory
    norm = np.sqrt(sum((x ** 2).sum() for x in g.values()))
    assert norm > 0.5
    return {
        n: w[n] - 0.1 * (0.5 / norm * g[n] + 3 * w[n]) for n in w}

  run_both(config, step)


@pytest.mark.parametrize('decay', ['all', 'weights'])
def test_adamw_decays_aside_from_the_gradient(decay):
  config = changed(
      **BASE, optimizer__name='adamw', optimizer__weight_decay=0.4,
      optimizer__b2=0.95, optimizer__decay=decay)

  def step(k, w, g, memory):
    result = {}
    for name in w:
      m, v = memory.get(name, (0, 0))
      m = 0.9 * m + 0.1 * g[name]
      v = 0.95 * v + 0.05 * g[name] ** 2
      memory[name] = m, v
      scaled = m / (1 - 0.9 ** (k + 1)) / (
          np.sqrt(v / (1 - 0.95 ** (k + 1))) + 1e-8)
      decayed = 0.4 * w[name] if decay == 'all' or name == 'w' else 0
      result[name] = w[name] - 0.1 * (scaled + decayed)
    return result

  run_both(config, step)
