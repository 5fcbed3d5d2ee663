"""Arguments, outputs and errors of the three functions of `awp_jax.awp`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import awp
from tests.helpers.perturbation_problem import X, Y, params_as
from tests.helpers.perturbation_problem import mean_fn as loss_fn


@pytest.mark.parametrize('gamma,passes', [(0, 1), (0.0, 1), (0.01, 2)])
def test_number_of_passes(gamma, passes):
  calls = []

  def counted(params):
    calls.append(1)
    return loss_fn(params)

  awp_jax.awp_value_and_grad(counted, gamma=gamma)(params_as(np.float32))
  assert len(calls) == passes


def test_drop_in_for_value_and_grad():
  def with_aux(params, x, *, y):
    loss = loss_fn(params, x, y)
    return loss, {'twice': 2 * loss}

  params = params_as(np.float32)
  (loss, aux), gradients = awp_jax.awp_value_and_grad(
      with_aux, gamma=0.01, has_aux=True)(params, X, y=Y)
  v = awp.awp_perturbation(
      with_aux, gamma=0.01, has_aux=True)(params, X, y=Y)
  (wanted, wanted_aux), wanted_gradients = jax.value_and_grad(
      with_aux, has_aux=True)(jax.tree.map(jnp.add, params, v), X, y=Y)
  assert loss == wanted and aux == wanted_aux
  chex.assert_trees_all_close(gradients, wanted_gradients, rtol=1e-6)
  assert loss > loss_fn(params)


def test_arguments_of_the_loss_go_by_position():
  params, tx = params_as(np.float32), optax.sgd(0.1)

  def masked(params, mask, num_steps):
    return loss_fn(params) * jnp.sum(mask) * num_steps

  with pytest.raises(TypeError, match=r"keyword, 'padding'.* by position"):
    awp_jax.awp_step(
        masked, tx, params, tx.init(params), gamma=0.1, padding=jnp.ones(3))
  out = awp_jax.awp_step(
      masked, tx, params, tx.init(params), jnp.ones(3), 2.0, gamma=0)
  np.testing.assert_allclose(out.loss, 6 * loss_fn(params), rtol=1e-6)


def test_drop_in_takes_keywords_of_any_name():
  # `value_and_grad` hands keywords on; none of ours may swallow them.
  def loss(params, noise_key, *, natural_args, method_state):
    return loss_fn(params) * noise_key * natural_args * method_state

  params = params_as(np.float32)
  keywords = {'natural_args': 3.0, 'method_state': 5.0}
  value, _ = awp_jax.awp_value_and_grad(loss, gamma=0)(
      params, noise_key=2.0, **keywords)
  np.testing.assert_allclose(value, 30 * loss_fn(params), rtol=1e-6)
  v = awp_jax.awp_perturbation(loss, gamma=0.1)(
      params, noise_key=2.0, **keywords)
  chex.assert_trees_all_close(
      v, awp_jax.awp_perturbation(loss_fn, gamma=0.1)(params), rtol=1e-5)


@pytest.mark.parametrize('call', ['step', 'value_and_grad', 'perturbation'])
def test_a_schedule_is_an_error_that_names_what_takes_it(call):
  params, tx = params_as(np.float32), optax.sgd(0.1)
  gamma = optax.linear_schedule(0, 0.1, 10)
  with pytest.raises(ValueError, match=r'gamma must be a number.*perturbed_st'):
    if call == 'step':
      awp_jax.awp_step(loss_fn, tx, params, tx.init(params), gamma=gamma)
    elif call == 'value_and_grad':
      awp_jax.awp_value_and_grad(loss_fn, gamma=gamma)
    else:
      awp_jax.awp_perturbation(loss_fn, gamma=gamma)


def test_perturbation_on_request():
  params, tx = params_as(np.float32), optax.sgd(0.1)
  full, less = (awp_jax.awp_step(
      loss_fn, tx, params, tx.init(params), gamma=0.1,
      return_perturbation=flag) for flag in (True, False))
  assert less.perturbation is None and less._fields == (
      'params', 'opt_state', 'loss', 'aux', 'perturbation')
  chex.assert_trees_all_equal(less.params, full.params)


def test_perturbation_of_size_zero_is_a_tree_of_zeros():
  params = params_as(np.float32)
  v = awp_jax.awp_perturbation(loss_fn, gamma=0)(params)
  assert jax.tree.structure(v) == jax.tree.structure(params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(v))


def test_module_exports_three_functions():
  public = {name for name, value in vars(awp).items()
            if getattr(value, '__module__', None) == awp.__name__
            and not name.startswith('_')}
  assert public == {'awp_perturbation', 'awp_step', 'awp_value_and_grad'}
  for name in ('ascend', 'perturb', 'global_norm', 'apply_at_perturbed'):
    assert not hasattr(awp, name)


def test_second_call_does_not_recompile():
  params, tx = params_as(np.float32), optax.sgd(0.1)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(params, opt_state, gamma):
    out = awp_jax.awp_step(loss_fn, tx, params, opt_state, gamma=gamma)
    return out.params, out.opt_state

  opt_state = tx.init(params)
  for gamma in (0.01, 0.02, 0.0):
    params, opt_state = step(params, opt_state, gamma)


@pytest.mark.parametrize('keywords,message', [
    ({'gamma': -0.01}, 'gamma must be a finite number >= 0, got -0.01'),
    ({'gamma': float('nan')}, 'gamma must be a finite number >= 0, got nan'),
    ({'gamma': 0.1, 'num_steps': 0}, 'num_steps must be a whole number >= 1'),
    ({'gamma': 0.1, 'update_at': 'clean'}, "one of 'perturbed', 'natural'"),
])
def test_bad_arguments(keywords, message):
  params, tx = params_as(np.float32), optax.sgd(0.1)
  with pytest.raises(ValueError, match=message):
    awp_jax.awp_step(loss_fn, tx, params, tx.init(params), **keywords)
