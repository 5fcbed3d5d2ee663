"""`perturbed_optimizer` against `perturbed_step`."""

import functools

import chex
import jax
import numpy as np
import optax
import optax.contrib
import pytest

from awp_jax.perturbation import leaves, methods
from awp_jax.perturbation.optimizer import perturbed_optimizer
from tests.helpers import perturbation_problem as problem
from tests.helpers.perturbation_problem import assert_close, run

TX = optax.chain(optax.add_decayed_weights(0.05), optax.adam(0.05))
NAMES = [name for name in methods.METHODS if name not in ('frwp', 'rwp')]


def method_of(name):
  if name == 'rwp without condition':
    return methods.rwp(0.3, c_min=None, num_steps=3)
  if name == 'every second':
    return methods.every_k(problem.make('wt_awp'), 2)
  if name == 'awp, 3 steps':
    return problem.make('awp', num_steps=3)
  return problem.make(name)


@functools.lru_cache(maxsize=1)  # three steps for both kinds of optimizer
def last_step(method):
  return run(method, TX, problem.params_as('float64'), 3)[-1]


@pytest.mark.parametrize('transparent', [False, True])
@pytest.mark.parametrize('name', [
    *NAMES, 'rwp without condition', 'every second', 'awp, 3 steps'])
def test_equals_the_step(name, transparent, x64):
  params, method = problem.params_as('float64'), method_of(name)
  keywords = problem.keywords_of(method)
  wanted = last_step(method)
  tx = perturbed_optimizer(TX, method, transparent=transparent, **keywords)
  grad_fn = jax.grad(problem.mean_fn)

  @jax.jit
  def update(params, state):
    updates, state = tx.update(
        grad_fn(params), state, params,
        **({} if transparent else {'grad_fn': grad_fn}))
    return optax.apply_updates(params, updates), state

  state, calls = tx.init(params), 1 + method.num_steps if transparent else 1
  for _ in range(3 * calls):
    params, state = update(params, state)
  assert_close(params, wanted.params, 1e-12)
  assert_close(state.method_state, wanted.method_state, 1e-12)


def test_transparent_sam_equals_optax(x64):
  params, grad_fn = problem.params_as('float64'), jax.grad(problem.mean_fn)
  theirs = optax.contrib.sam(
      optax.sgd(0.1, 0.9),
      optax.chain(optax.contrib.normalize(), optax.sgd(0.5)))
  ours = perturbed_optimizer(
      optax.sgd(0.1, 0.9), methods.sam(0.5), transparent=True)
  seen = []
  for tx in (theirs, ours):
    p, state, path = params, tx.init(params), []
    for _ in range(6):
      updates, state = jax.jit(tx.update)(grad_fn(p), state, p)
      p = optax.apply_updates(p, updates)
      path.append(p)
    seen.append(path)
  assert_close(*seen, 1e-13)


def test_skipped_steps_call_no_gradient():
  calls = []
  params = problem.params_as('float32')

  def grad_fn(p):
    jax.debug.callback(lambda _: calls.append(1), p['dense']['bias'])
    return jax.grad(problem.mean_fn)(p)

  tx = perturbed_optimizer(TX, methods.start_after(problem.make('awp'), 1))
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=grad_fn))
  state = tx.init(params)
  for expected in (0, 1):
    updates, state = update(jax.grad(problem.mean_fn)(params), state, params)
    params = optax.apply_updates(params, updates)
    jax.effects_barrier()
    assert len(calls) == expected


@pytest.mark.parametrize('name,calls', [
    # The last two of three moves are traced once, as the body of a loop.
    ('awp', 1), ('awp, 3 steps', 2), ('wt_awp', 1), ('random', 1),
    ('m_rwp', 1), ('off', 0)])
def test_the_given_gradient_is_not_recomputed(
    name, calls, monkeypatch):
  params, traced = problem.params_as('float32'), []
  method = methods.awp(0) if name == 'off' else method_of(name)
  original = leaves.perturb
  # The result must not depend on whether the engine copies w.
  monkeypatch.setattr(leaves, 'perturb', lambda params, v: jax.tree.map(
      lambda w: w + 0, original(params, v)))

  def grad_fn(p):
    traced.append(1)
    return jax.grad(problem.mean_fn)(p)

  tx = perturbed_optimizer(TX, method, **problem.keywords_of(method))
  jax.eval_shape(
      lambda g, state, p: tx.update(g, state, p, grad_fn=grad_fn), params,
      tx.init(params), params)
  assert len(traced) == calls


@pytest.mark.parametrize('name', [
    'awp', 'wt_awp', 'rwp without condition', 'momentum_awp'])
def test_parameters_and_state_may_be_donated(name):
  method = method_of(name)
  tx = perturbed_optimizer(TX, method, transparent=True)
  grad_fn = jax.grad(problem.mean_fn)

  def update(params, state):
    updates, state = tx.update(grad_fn(params), state, params)
    return optax.apply_updates(params, updates), state

  ends = []
  for donated in ((), (0, 1)):
    params = problem.params_as('float32')
    state, step = tx.init(params), jax.jit(update, donate_argnums=donated)
    for _ in range(2 * (1 + method.num_steps)):
      params, state = step(params, state)
    ends.append(params)
  assert_close(*ends, 1e-7)


def test_an_unfinished_step_stores_only_the_perturbed_leaves():
  method = problem.make('awp', mask='out/*')
  tx = perturbed_optimizer(TX, method, transparent=True)
  pending = tx.init(problem.params_as('float32')).pending
  assert list(pending.weights) == ['out/kernel']
  assert list(pending.ascent.perturbation) == ['out/kernel']


def test_size_0_is_the_optimizer_itself():
  params = problem.params_as('float32')
  tx = perturbed_optimizer(TX, methods.awp(0))
  g = jax.grad(problem.mean_fn)(params)
  updates, _ = tx.update(g, tx.init(params), params, grad_fn=lambda p: 1 / 0)
  wanted, _ = TX.update(g, TX.init(params), params)
  chex.assert_trees_all_equal(updates, wanted)


def test_unsupported_methods_and_missing_arguments():
  params = problem.params_as('float32')
  with pytest.raises(ValueError, match='needs per-example losses'):
    perturbed_optimizer(TX, problem.make('rwp'))
  with pytest.raises(ValueError, match='uses two batches'):
    perturbed_optimizer(TX, problem.make('frwp'), noise_key=problem.KEY)
  with pytest.raises(ValueError, match='noise_key must be a PRNG key'):
    perturbed_optimizer(TX, problem.make('random'))
  tx = perturbed_optimizer(TX, problem.make('awp'))
  with pytest.raises(ValueError, match='grad_fn must be passed'):
    tx.update(params, tx.init(params), params)
  with pytest.raises(ValueError, match='params must be passed'):
    tx.update(params, tx.init(params), grad_fn=lambda p: p)


def steps_of(tx, params, num_calls, transparent, **extra):
  """Some calls of `update` on the mean loss, compiled."""
  grad_fn = jax.grad(problem.mean_fn)

  @jax.jit
  def update(params, state):
    given = extra if transparent else extra | {'grad_fn': grad_fn}
    updates, state = tx.update(grad_fn(params), state, params, **given)
    assert jax.tree.map(lambda leaf: leaf.dtype, updates) == jax.tree.map(
        lambda leaf: leaf.dtype, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(num_calls):
    params, state = update(params, state)
  return params, state


@pytest.mark.parametrize('transparent', [False, True])
def test_other_keywords_go_to_the_optimizer(transparent):
  tx = perturbed_optimizer(
      optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
      problem.make('awp'), transparent=transparent)
  calls = 2 if transparent else 1
  _, state = steps_of(
      tx, problem.params_as('float32'), calls, transparent, value=1.25)
  assert state.opt_state[1].best_value == 1.25


@pytest.mark.filterwarnings('ignore:. perturbed parameters are in half')
def test_transparent_updates_keep_half_precision():
  # The optimizer's own updates are wider than the parameters.
  tx, method = optax.adam(0.05, mu_dtype='float32'), problem.make('awp')
  params = problem.params_as('bfloat16')
  got, _ = steps_of(
      perturbed_optimizer(tx, method, transparent=True), params, 4, True)
  wanted = run(method, tx, params, 2)[-1].params
  moved = problem.distance(wanted, params)
  assert moved > 0.05
  # Each of the four sums rounds to 8 bits of numbers below 2.
  assert problem.distance(got, wanted) < 4 * 2 ** -8


@pytest.mark.parametrize('gamma', [
    np.float64(0.3), optax.cosine_decay_schedule(0.3, 4)])
def test_transparent_updates_keep_float32_in_64_bit_mode(gamma, x64):
  # The sizes are float64.
  params, method = problem.params_as('float32'), methods.awp(gamma)
  got, _ = steps_of(
      perturbed_optimizer(TX, method, transparent=True), params, 4, True)
  assert_close(got, run(method, TX, params, 2)[-1].params, 1e-5)
