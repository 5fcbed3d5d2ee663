"""Each method against its published code, in float64.

The numbers in tests/data/perturbation_reference.json come from the authors'
PyTorch classes on the same network: RobustWeightPerturb of RWP (then SGD with
momentum 0.9 and decay 0.05), SAM of davda54 and of SamsungLabs, ASAM,
AdvWeightPerturb of WT-AWP (one step, delta in the first layer, Adam) and ARWP
(noise of size zero). The class of the text competitions, of which many copies
exist, was reimplemented with torch operations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from awp_jax.perturbation import perturbed_step
from tests.helpers import perturbation_problem as problem
from tests.helpers.perturbation_problem import (
    as_trees,
    assert_close,
    reference,
    run,
)

SGD = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1, 0.9))
ADAM = optax.chain(optax.add_decayed_weights(0.05), optax.adam(0.01))
ADAMW = optax.adamw(0.01, weight_decay=0.05)


def test_losses_are_those_of_the_reference_network(x64):
  assert_close(problem.losses_fn(problem.params_as('float64')),
               np.asarray(reference()['losses']), 1e-14)


@pytest.mark.parametrize('name,reference_name,options,tx,num_steps', [
    ('rwp', 'rwp_some', {'c_min': 0.7}, SGD, 1),
    ('rwp', 'rwp_none', {'c_min': 1e-9}, SGD, 1),
    ('rwp', 'rwp_all', {'c_min': 1e9}, SGD, 1),
    ('sam', 'sam', {'rho': 0.5}, SGD, 3),
    ('sam', 'sam_samsung', {'rho': 0.5}, SGD, 3),
    ('asam', 'asam', {'rho': 0.5, 'eta': 0.01}, SGD, 3),
    ('boxed_awp', 'boxed_awp_replace', {}, ADAMW, 3),
    ('boxed_awp', 'boxed_awp_add', {'gradient': 'add'}, ADAMW, 3),
    ('momentum_awp', 'momentum_awp', {}, ADAMW, 3),
    ('wt_awp', 'wt_awp', {'lam': 0.6}, ADAM, 2),
    ('arwp', 'arwp', {'sigma': 1e-18}, SGD, 3),
])
def test_parity(name, reference_name, options, tx, num_steps, x64):
  method = problem.make(name, **options)
  outs = run(method, tx, problem.params_as('float64'), num_steps)
  wanted = reference()
  assert_close(outs[-1].params, as_trees(wanted[f'{reference_name}_params']))
  assert problem.distance(outs[-1].params, problem.PARAMS) > 1e-3
  if reference_name in wanted and reference_name != 'wt_awp':
    assert_close(outs[0].perturbation, as_trees(wanted[reference_name]))
  if reference_name == 'wt_awp':
    v = outs[0].perturbation
    assert_close(v['dense']['kernel'], np.asarray(wanted['wt_awp']))
    assert not np.any(v['out']['kernel'])
  if reference_name == 'arwp':
    assert_close(*map(jax.tree.leaves, (
        outs[-1].method_state.memory, as_trees(wanted['arwp_fisher']))))
  if reference_name.startswith('boxed_awp'):
    assert_close(outs[0].perturbation, as_trees(wanted['boxed_awp']))


@pytest.mark.parametrize('name,options', [
    ('rwp', {'c_min': 0.8}), ('rwp', {'c_min': 0.7, 'num_steps': 9}),
    ('sam', {'rho': 0.51}), ('asam', {'eta': 0.02}), ('wt_awp', {'lam': 0.5}),
    ('boxed_awp', {'gradient': 'add'}), ('momentum_awp', {'decay': 0.8}),
])
def test_parity_rejects_another_choice(name, options, x64):
  expected = {'rwp': 'rwp_some', 'boxed_awp': 'boxed_awp_replace'}
  optimizers = {'wt_awp': ADAM, 'boxed_awp': ADAMW, 'momentum_awp': ADAMW}
  tx = optimizers.get(name, SGD)
  out = run(problem.make(name, **options), tx, problem.params_as('float64'),
            {'rwp': 1, 'wt_awp': 2}.get(name, 3))[-1]
  wanted = reference()[f'{expected.get(name, name)}_params']
  assert problem.distance(out.params, as_trees(wanted)) > 1e-7


def test_sam_equals_optax(x64):
  params = problem.params_as('float64')
  sam = optax.contrib.sam(
      SGD, optax.chain(optax.contrib.normalize(), optax.sgd(0.5)),
      opaque_mode=True)
  theirs, state = params, sam.init(params)
  for _ in range(3):
    updates, state = sam.update(
        jax.grad(problem.mean_fn)(theirs), state, theirs,
        grad_fn=lambda p, _: jax.grad(problem.mean_fn)(p))
    theirs = optax.apply_updates(theirs, updates)
  ours = run(problem.make('sam'), SGD, params, 3)[-1].params
  assert_close(ours, theirs, 1e-14)


def numpy_gradient(loss_fn=problem.mean_fn):
  gradient_fn = jax.grad(loss_fn)
  return lambda params: jax.tree.map(np.asarray, gradient_fn(params))


def test_asam_formula(x64):
  gradient = numpy_gradient()(problem.PARAMS)
  t = {'dense': {'kernel': np.abs(problem.PARAMS['dense']['kernel']) + 0.01,
                 'bias': np.ones(3)},
       'out': {'kernel': np.abs(problem.PARAMS['out']['kernel']) + 0.01}}
  scaled = jax.tree.map(np.multiply, t, gradient)
  norm = np.sqrt(sum(np.sum(s ** 2) for s in jax.tree.leaves(scaled)))
  wanted = jax.tree.map(lambda t, s: 0.5 * t * s / norm, t, scaled)
  method = problem.make('asam')
  params = problem.params_as('float64')
  got = perturbed_step.find_perturbation(method, problem.mean_fn)(
      params, method.init(params))
  assert_close(got, wanted, 1e-14)


@pytest.mark.parametrize('num_steps', [1, 3])
def test_sign_formula(num_steps, x64):
  gradient_fn, v = numpy_gradient(), jax.tree.map(np.zeros_like, problem.PARAMS)
  for _ in range(num_steps):
    g = gradient_fn(jax.tree.map(np.add, problem.PARAMS, v))
    for layer in ('dense', 'out'):
      w = np.abs(problem.PARAMS[layer]['kernel'])
      v[layer]['kernel'] = np.clip(
          v[layer]['kernel'] + 0.3 / num_steps * w * np.sign(
              g[layer]['kernel']), -0.3 * w, 0.3 * w)
  method = problem.make('sign', num_steps=num_steps)
  params = problem.params_as('float64')
  got = perturbed_step.find_perturbation(method, problem.mean_fn)(
      params, method.init(params))
  assert_close(got, v, 1e-14)


def test_momentum_equals_that_of_adam(x64):
  outs = run(problem.make('momentum_awp'), optax.adam(0.01),
             problem.params_as('float64'), 3)
  adam = outs[-1].opt_state[0]
  memory = outs[-1].method_state.memory
  assert list(memory) == ['dense/kernel', 'out/kernel']
  for layer in ('dense', 'out'):
    assert_close(memory[f'{layer}/kernel'], adam.mu[layer]['kernel'], 1e-16)
  assert not any(np.any(v) for v in jax.tree.leaves(outs[0].perturbation))
  assert np.any(outs[1].perturbation['out']['kernel'])


def test_rwp_mean_is_over_the_whole_batch(x64):
  # A mean over the chosen examples only would give the same direction in the
  # first pass, but weight the passes differently.
  params, method = problem.params_as('float64'), problem.make('rwp', c_min=0.7)

  def wrong_fn(p, threshold=0.7):
    losses = problem.losses_fn(p)
    chosen = losses < threshold
    return jnp.sum(jnp.where(chosen, losses, 0)) / jnp.sum(chosen)

  right = perturbed_step.find_perturbation(method, problem.losses_fn)(
      params, method.init(params))
  assert_close(right, as_trees(reference()['rwp_some']))
  all_in = problem.make('rwp', c_min=None)
  wrong = perturbed_step.find_perturbation(all_in, wrong_fn)(
      params, all_in.init(params))
  assert problem.distance(wrong, right) > 1e-4
