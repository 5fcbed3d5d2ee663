"""AWP with optimizers of optax: where decay and bounds act."""

import functools

import chex
import jax
import numpy as np
import optax
import optax.contrib
import pytest

import awp_jax
from tests.helpers.perturbation_problem import mean_fn as loss_fn
from tests.helpers.perturbation_problem import params_as


def test_decay_acts_at_the_perturbed_weights_by_default(x64):
  params, decay = params_as(np.float64), 0.1
  tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(1.0))

  @functools.partial(jax.jit, static_argnames='update_at')
  def step(params, **keywords):
    return awp_jax.awp_step(
        loss_fn, tx, params, tx.init(params), gamma=0.3, **keywords)

  out = step(params)
  shown = jax.tree.map(np.add, params, out.perturbation)
  wanted = jax.tree.map(
      lambda w, s, g: w - (g + decay * s), params, shown,
      jax.grad(loss_fn)(shown))
  chex.assert_trees_all_close(out.params, wanted, rtol=1e-12)
  clean = step(params, update_at='natural')
  chex.assert_trees_all_close(
      jax.tree.map(np.subtract, clean.params, out.params),
      jax.tree.map(lambda v: decay * v, out.perturbation),
      rtol=1e-9, atol=1e-15)


def after_steps(tx, update_at, num_steps=3):
  params = params_as(np.float64)
  opt_state = tx.init(params)
  for _ in range(num_steps):
    params, opt_state = awp_jax.awp_step(
        loss_fn, tx, params, opt_state, gamma=0.3, update_at=update_at)[:2]
  return params


def gap(a, b):
  return max(jax.tree.leaves(jax.tree.map(
      lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_optimizers_that_keep_the_parameters_need_update_at_natural(x64):
  # The inner optimizer makes no step, so nothing may move. Shown w + v, the
  # outer one takes v into the average that it keeps.
  tx = optax.contrib.schedule_free(
      optax.sgd(0.0), learning_rate=1.0, b1=0.9)
  params = params_as(np.float64)
  assert gap(after_steps(tx, 'natural'), params) < 1e-15
  assert gap(after_steps(tx, 'perturbed'), params) > 1e-3


def test_optimizers_that_bound_the_parameters_need_update_at_natural(x64):
  tx = optax.chain(optax.sgd(1.0), optax.keep_params_nonnegative())

  def smallest(update_at):
    params = jax.tree.map(np.abs, params_as(np.float64))
    out = awp_jax.awp_step(
        loss_fn, tx, params, tx.init(params), gamma=0.3, update_at=update_at)
    return min(float(leaf.min()) for leaf in jax.tree.leaves(out.params))

  assert smallest('natural') >= 0
  assert smallest('perturbed') < -1e-3


@pytest.mark.parametrize('tx', [
    optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adamw(1e-2),
    optax.lion(1e-2), optax.chain(optax.clip_by_global_norm(1.0),
                                  optax.rmsprop(1e-2))])
def test_any_optimizer_lowers_the_loss(tx):
  params = params_as(np.float32)
  opt_state, first = tx.init(params), loss_fn(params)
  step = jax.jit(lambda p, s: awp_jax.awp_step(
      loss_fn, tx, p, s, gamma=0.01)[:2])
  for _ in range(30):
    params, opt_state = step(params, opt_state)
  assert loss_fn(params) < first - 0.1
