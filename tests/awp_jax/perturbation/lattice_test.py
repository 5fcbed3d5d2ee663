"""Which method reduces to which, exactly where possible.

The reductions are those of docs/weight_perturbation.md.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awp_jax.perturbation import directions, methods
from awp_jax.perturbation.balls import Ball
from awp_jax.perturbation.base import Method
from awp_jax.perturbation.leaves import is_weight
from tests.helpers import perturbation_problem as problem
from tests.helpers.perturbation_problem import assert_close, run

TX = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1, 0.9))
SAME_BATCH = {'natural_args': (problem.X, problem.Y)}


def replace(method, **fields):
  return dataclasses.replace(method, **fields)


def with_ball(method, **fields):
  return replace(method, ball=dataclasses.replace(method.ball, **fields))


AWP = methods.awp(0.3, update_at='natural')

REDUCTIONS = {
    'RWP, one step, no condition, tensors = AWP': (
        with_ball(methods.rwp(
            0.3, c_min=None, num_steps=1, update_at='natural'), norm='tensor'),
        AWP),
    'RWP, c_min infinite = RWP without condition': (
        methods.rwp(0.3, c_min=1e30, num_steps=3),
        methods.rwp(0.3, c_min=None, num_steps=3)),
    'WT-AWP, lam 1, all weights, eps 0 = AWP': (
        methods.wt_awp(0.3, mask=is_weight, lam=1, eps=0), AWP),
    'boxed AWP, wide box, eps 0 = AWP': (
        methods.boxed_awp(0.3, 1e6, eps=0), AWP),
    'boxed AWP, long move = sign': (
        methods.boxed_awp(1e9, 0.2), methods.sign(0.2)),
    'AWP, elements = sign': (
        with_ball(replace(AWP, num_steps=2), norm='element'),
        methods.sign(0.3, num_steps=2)),
    'AWP, whole tree, absolute, all leaves = SAM': (
        with_ball(replace(AWP, mask=lambda path, leaf: True), norm='tree',
                  scale='absolute'), methods.sam(0.3)),
    'ASAM, T = 1 = SAM': (
        methods.asam(0.5, stretched=lambda path, leaf: False),
        methods.sam(0.5)),
    'm-RWP, lam 1 = random': (
        methods.m_rwp(0.1, lam=1), methods.random(0.1)),
    'FRWP on one batch = m-RWP': (
        methods.frwp(0.1, alpha=0.3), methods.m_rwp(0.1, lam=0.3)),
    'm-ARWP, lam 1 = ARWP': (
        methods.m_arwp(0.1, lam=1), methods.arwp(0.1)),
    'm-ARWP, eta 0 = m-RWP': (
        methods.m_arwp(0.1, eta=0), methods.m_rwp(0.1)),
    'ARWP, eta 0 = random': (methods.arwp(0.1, eta=0), methods.random(0.1)),
    'momentum AWP, first step = plain': (
        methods.momentum_awp(0.2), methods.awp(0, update_at='natural')),
}


@pytest.mark.parametrize('name', REDUCTIONS)
def test_reduction(name, x64):
  general, special = REDUCTIONS[name]
  params = problem.params_as('float64')
  keywords = SAME_BATCH if name.startswith('FRWP') else {}
  num_steps = 1 if 'first step' in name or 'lam 1' in name else 2
  outs = [run(method, TX, params, num_steps, **(
      keywords if method is general else {}))[-1]
          for method in (general, special)]
  for field in ('params', 'perturbation', 'loss'):
    # Mixtures and boxes round differently; the others agree bit for bit.
    assert_close(*(getattr(out, field) for out in outs), tolerance=1e-14)
  assert problem.distance(outs[0].params, params) > 1e-4


@pytest.mark.parametrize('name', [
    'RWP, one step, no condition, tensors = AWP',
    'WT-AWP, lam 1, all weights, eps 0 = AWP', 'ASAM, T = 1 = SAM'])
def test_reduction_bit_for_bit(name):
  general, special = REDUCTIONS[name]
  params = problem.params_as('float32')
  chex.assert_trees_all_equal(*(
      run(method, TX, params, 1)[0][:2] for method in (general, special)))


@pytest.mark.parametrize('general,special', [
    (methods.rwp(0.3, c_min=None, num_steps=1), AWP),
    (methods.asam(0.5), methods.sam(0.5)),
    (methods.m_rwp(0.1), methods.random(0.1)),
    (methods.arwp(0.1, eta=5), methods.random(0.1)),
    (methods.boxed_awp(0.3, 0.2), AWP)])
def test_the_methods_do_differ_elsewhere(general, special, x64):
  params = problem.params_as('float64')
  a, b = (run(method, TX, params, 2)[-1].params
          for method in (general, special))
  assert problem.distance(a, b) > 1e-6


@pytest.mark.parametrize('start,every,wanted', [
    (0, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [2, 3, 4, 5]), (0, 2, [0, 2, 4]),
    (1, 3, [1, 4]), (5, 2, [5])])
def test_steps_that_perturb(start, every, wanted):
  method = methods.make('awp', start=start, every=every)
  assert [t for t in range(6) if method.perturbs_at(t)] == wanted
  traced = method.perturbs_at(jnp.arange(6))
  np.testing.assert_array_equal(np.flatnonzero(traced), wanted)
  assert method.is_scheduled == (wanted != list(range(6)))
  again = methods.every_k(methods.start_after(methods.awp(), start), every)
  assert (again.start, again.every) == (start, every) and again == method
  assert (method == methods.awp()) == (not method.is_scheduled)


@pytest.mark.parametrize('name', ['rwp', 'wt_awp', 'm_rwp', 'frwp', 'asam'])
def test_size_0_is_the_plain_step_bit_for_bit(name):
  size = {'asam': 'rho', 'm_rwp': 'sigma'}.get(name, 'gamma')
  params, method = problem.params_as('float32'), problem.make(name, **{size: 0})
  calls = []

  def counted(p, x, y):
    calls.append(1)
    return problem.losses_fn(p, x, y)

  out, = run(method, TX, params, 1, loss_fn=counted)
  assert len(calls) == 1

  @jax.jit
  def plain(params):
    loss, gradients = jax.value_and_grad(problem.mean_fn)(params)
    updates, _ = TX.update(gradients, TX.init(params), params)
    return optax.apply_updates(params, updates), loss

  chex.assert_trees_all_equal((out.params, out.loss), plain(params))
  assert not any(np.any(v) for v in jax.tree.leaves(out.perturbation))


@pytest.mark.parametrize('name', ['awp', 'wt_awp', 'm_arwp', 'momentum_awp'])
def test_skipped_steps_are_plain(name, x64):
  params = problem.params_as('float64')
  method = methods.every_k(methods.start_after(problem.make(name), 1), 2)
  outs = run(method, TX, params, 5)
  perturbed = [bool(np.any(out.perturbation['dense']['kernel']))
               for out in outs]
  assert perturbed == [False, True, False, True, False]
  plain = run(methods.awp(0, update_at=method.update_at), TX, params, 1)[0]
  assert_close((outs[0].params, outs[0].loss), (plain.params, plain.loss),
               1e-15)
  # A perturbing step equals a step of the unscheduled method.
  assert int(outs[0].method_state.step) == 1
  again = run(problem.make(name), TX, outs[0].params, 1)[0]
  if method.direction.source == 'gradient':
    assert_close(outs[1].perturbation, again.perturbation, 1e-15)


def test_a_skipped_step_does_not_run_the_ascent():
  runs = []

  def loss_fn(params, x, y):
    jax.debug.callback(lambda _: runs.append(1), params['dense']['bias'])
    return problem.losses_fn(params, x, y)

  method = methods.start_after(problem.make('awp', num_steps=3), 1)
  run(method, TX, problem.params_as('float32'), 2, loss_fn=loss_fn)
  jax.effects_barrier()
  assert len(runs) == 1 + 4


@pytest.mark.parametrize('name,passes', [
    ('awp', 2), ('wt_awp', 2), ('sam', 2), ('asam', 2), ('sign', 2),
    ('boxed_awp', 2), ('momentum_awp', 1), ('random', 1), ('arwp', 1),
    ('m_rwp', 2), ('frwp', 2)])
def test_number_of_passes(name, passes):
  calls = []

  def counted(params, x, y):
    calls.append(1)
    return problem.losses_fn(params, x, y)

  run(problem.make(name), TX, problem.params_as('float32'), 1, loss_fn=counted)
  assert len(calls) == passes


def test_custom_method():
  # Follows the sign of the previous gradient.
  last = directions.Direction(
      'last sign', 'memory', init=lambda p: jax.tree.map(jnp.zeros_like, p),
      take=lambda memory, gradients, params, key: memory,
      observe=lambda memory, perturbed, descended: jax.tree.map(
          jnp.sign, descended))
  method = Method('last', Ball(0.1, 'element', 'absolute'), direction=last)
  first, second = run(method, TX, problem.params_as('float32'), 2)
  assert not np.any(first.perturbation['out']['kernel'])
  np.testing.assert_allclose(
      np.abs(second.perturbation['out']['kernel']), 0.1, rtol=1e-6)
