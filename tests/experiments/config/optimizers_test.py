"""Tests of schedules and optimizers against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import optimizers
from experiments.configs import cifar10_mart, cifar10_trades, cifar100_trades
from experiments.util import errors
from tests.experiments.config.build_test import changed


def rates(steps_per_epoch, **fields):
  config = changed(**fields)
  schedule = optimizers.build_schedule(config, steps_per_epoch)
  total = config.epochs * steps_per_epoch
  return np.broadcast_to(schedule(jnp.arange(total)), total)


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


@pytest.mark.parametrize('warmup, rise', [
    (0.02, 1), (0.1, 1), (0.26, 3), (9.9, 99)])
def test_one_cycle_rises_for_a_step_at_least_and_falls_for_one(warmup, rise):
  got = rates(
      10, epochs=10, optimizer__schedule='one_cycle',
      optimizer__learning_rate=0.5, optimizer__warmup_epochs=warmup)
  assert np.argmax(got) == rise
  np.testing.assert_allclose(got[[0, rise]], [0.02, 0.5], rtol=1e-6)
  np.testing.assert_allclose(
      got[rise - 1], 0.02 + 0.48 * (1 - np.cos(np.pi * (1 - 1 / rise))) / 2,
      rtol=1e-5)


def test_one_cycle_ends_at_a_ten_thousandth_of_its_start():
  config = changed(
      epochs=10, optimizer__schedule='one_cycle',
      optimizer__learning_rate=0.5, optimizer__warmup_epochs=3.0)
  schedule = optimizers.build_schedule(config, 10)
  np.testing.assert_allclose(
      [schedule(100), schedule(10 ** 6)], 0.5 / 25 / 1e4, rtol=1e-6)


@pytest.mark.parametrize('name', ['cosine', 'one_cycle'])
def test_a_run_of_one_step_has_a_schedule(name):
  got = rates(
      1, epochs=1, optimizer__schedule=name, optimizer__learning_rate=0.5,
      optimizer__warmup_epochs=0.9)
  np.testing.assert_allclose(got, [0.5], rtol=1e-6)


@pytest.mark.parametrize('name', ['steps', 'epochs', 'cosine'])
@pytest.mark.parametrize('warmup, rise', [(0.1, 0), (0.3, 1), (1.25, 5)])
def test_the_rise_is_linear_and_of_whole_steps(name, warmup, rise):
  got, plain = (
      rates(4, epochs=6, optimizer__schedule=name,
            optimizer__learning_rate=0.2, optimizer__decay_at=(),
            optimizer__warmup_epochs=epochs) for epochs in (warmup, 0.0))
  np.testing.assert_allclose(
      got[:rise], 0.2 * np.arange(1, rise + 1) / max(rise, 1), rtol=1e-6)
  np.testing.assert_allclose(got[rise], 0.2, rtol=1e-6)
  if name == 'cosine':
    k = np.arange(24 - rise)
    plain = np.r_[[0.2] * rise, 0.1 * (1 + np.cos(np.pi * k / (24 - rise)))]
  np.testing.assert_allclose(got[rise:], plain[rise:], rtol=1e-5, atol=1e-8)


def test_the_cosine_stays_at_zero_behind_its_end():
  schedule = optimizers.build_schedule(
      changed(epochs=3, optimizer__schedule='cosine'), 4)
  np.testing.assert_allclose(
      [schedule(12), schedule(500)], 0, atol=1e-9)
  assert schedule(11) > 1e-3
  single = optimizers.build_schedule(
      changed(epochs=1, optimizer__schedule='cosine'), 1)
  np.testing.assert_allclose([single(0), single(1)], [0.1, 0], atol=1e-9)


@pytest.mark.parametrize('config, epochs, at, rate', [
    (cifar10_trades.get_config(), 200, (100, 150), 0.1),
    (cifar100_trades.get_config('WRN-34-10'), 200, (100, 150), 0.1),
    (cifar10_mart.get_config(), 120, (75, 90, 100), 0.01),
    (cifar10_mart.get_config('WRN-34-10'), 90, (75,), 0.1),
], ids=['TRADES', 'TRADES wide', 'MART', 'MART wide'])
def test_schedules_of_trades_and_mart(config, epochs, at, rate):
  """The rate of an epoch, counted from 1, as in the reference loops."""
  schedule = optimizers.build_schedule(config, 391)
  wanted = np.repeat([
      rate * 0.1 ** sum(epoch >= start for start in at)
      for epoch in range(1, epochs + 1)], 391)
  assert config.epochs == epochs
  got = np.asarray(schedule(jnp.arange(epochs * 391)))
  np.testing.assert_allclose(got, wanted, rtol=1e-6)
  # Not a step earlier, unlike the rule of AT.
  assert got[(at[0] - 1) * 391 - 1] > 2 * got[(at[0] - 1) * 391]


ALLOWED = [
    {'optimizer__momentum': 0.0}, {'optimizer__momentum': 0.999},
    {'optimizer__b2': 0.0}, {'optimizer__weight_decay': 0.0},
    {'optimizer__l1': 0.0}, {'optimizer__clip_norm': 0.0},
    {'optimizer__learning_rate': 1e-30}, {'optimizer__decay_factor': 1e-30},
    {'optimizer__decay_factor': 2.0}, {'optimizer__decay_at': ()},
    {'optimizer__decay_at': (1,)}, {'optimizer__decay_at': (0.5, 0.5)},
    {'optimizer__decay_at': (1e-9, 1.0)},
    {'optimizer__nesterov': True, 'optimizer__momentum': 1e-3},
    {'epochs': 3, 'optimizer__warmup_epochs': 2.99},
    {'optimizer__schedule': 'one_cycle', 'optimizer__warmup_epochs': 1e-3},
    {'optimizer__name': 'adamw', 'optimizer__decay': 'weights'},
    {'optimizer__schedule': 'epochs'}, {'optimizer__schedule': 'cosine'}]

REFUSED = [
    {'optimizer__momentum': -1e-9}, {'optimizer__momentum': float('nan')},
    {'optimizer__b2': -1e-9}, {'optimizer__weight_decay': -1e-9},
    {'optimizer__weight_decay': float('inf')}, {'optimizer__l1': -1e-9},
    {'optimizer__clip_norm': -1e-9}, {'optimizer__warmup_epochs': -1e-9},
    {'optimizer__learning_rate': 0.0}, {'optimizer__decay_factor': 0.0},
    {'optimizer__decay_at': (0,)}, {'optimizer__decay_at': (1.0001,)},
    {'optimizer__decay_at': (0.5, 0.6, 0.55)}, {'optimizer__name': 'sgdm'},
    {'optimizer__schedule': 'step'}, {'optimizer__decay': 'weight'}]


@pytest.mark.parametrize('fields', ALLOWED, ids=str)
def test_values_at_the_edge_are_allowed(fields):
  optimizers.check(changed(**fields))


@pytest.mark.parametrize('fields', REFUSED, ids=str)
def test_values_behind_the_edge_are_refused(fields):
  (name,) = fields
  with pytest.raises(errors.UserError) as error:
    optimizers.check(changed(**fields))
  assert str(error.value).startswith(f'{name.replace("__", ".")} must be ')


def run_both(config, numpy_step, steps=6):
  """The optimizer and a NumPy rule on the same gradients; the parameters."""
  tx = optimizers.build_optimizer(config, steps)
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


def test_adamw_clips_adds_signs_and_may_be_nesterov():
  config = changed(
      **BASE, optimizer__name='adamw', optimizer__weight_decay=0.0,
      optimizer__nesterov=True, optimizer__l1=0.5, optimizer__momentum=0.8,
      optimizer__b2=0.95, optimizer__clip_norm=0.5)

  def step(k, w, g, memory):
    norm = np.sqrt(sum((x ** 2).sum() for x in g.values()))
    result = {}
    for name in w:
      d = 0.5 / norm * g[name] + (0.5 * np.sign(w[name]) if name == 'w' else 0)
      m, v = memory.get(name, (0, 0))
      m, v = 0.8 * m + 0.2 * d, 0.95 * v + 0.05 * d ** 2
      memory[name] = m, v
      # Dozat's look-ahead, with separate bias corrections.
      ahead = 0.8 * m / (1 - 0.8 ** (k + 2)) + 0.2 * d / (1 - 0.8 ** (k + 1))
      result[name] = w[name] - 0.1 * ahead / (
          np.sqrt(v / (1 - 0.95 ** (k + 1))) + 1e-8)
    return result

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


def test_l1_leaves_weights_of_zero_alone():
  config = changed(**BASE, optimizer__l1=0.5, optimizer__weight_decay=0.0)
  tx = optimizers.build_optimizer(config, 4)
  params = {'kernel': jnp.array([[0.0, 2.0]])}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  assert updates['kernel'][0, 0] == 0 and updates['kernel'][0, 1] < 0


def test_epochs_drop_behind_a_fraction_that_is_no_whole_epoch():
  config = changed(
      epochs=5, optimizer__schedule='epochs', optimizer__decay_at=(0.5,),
      optimizer__decay_factor=0.1, optimizer__learning_rate=1.0)
  rate = optimizers.build_schedule(config, 2)
  # 2.5 epochs end in the third; the fourth starts at step 6.
  np.testing.assert_allclose(
      [rate(k) for k in range(10)], 6 * [1.0] + 4 * [0.1])
