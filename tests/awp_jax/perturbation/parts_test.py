"""Parts of the engine: masks, accumulation, passes, settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from awp_jax.core import loops
from awp_jax.perturbation import (
    engine,
    leaves,
    methods,
    perturbed_step,
    value_and_grad,
)
from awp_jax.perturbation.balls import Ball
from awp_jax.perturbation.base import Method
from tests.helpers import perturbation_problem as problem


def test_bad_methods():
  with pytest.raises(ValueError, match="one of 'projected', 'summed'"):
    Method('m', Ball(1.0), moves='walk')
  with pytest.raises(ValueError, match='uses no gradients: num_steps must be'):
    Method('m', Ball(1.0), direction=problem.make('random').direction,
           num_steps=2)
  method = problem.make('random')
  params = problem.params_as('float32')
  with pytest.raises(ValueError, match='rounds=2 need a gradient'):
    engine.ascend(method, method.init(params), engine.Ascent(), params,
                  lambda p: None, rounds=2)


def test_masks_by_path():
  params = problem.params_as('float32')

  def chosen(mask):
    flags = jax.tree.leaves(leaves.weight_mask(params, mask))
    return [path for path, flag in zip(
        leaves.leaf_paths(params), flags, strict=True) if flag]

  assert chosen('dense/*') == ['dense/bias', 'dense/kernel']
  assert chosen(('dense/bias', 'out/*')) == ['dense/bias', 'out/kernel']
  assert chosen(['*/kernel']) == ['dense/kernel', 'out/kernel']
  assert chosen(leaves.is_weight) == ['dense/kernel', 'out/kernel']
  assert chosen(leaves.is_no_bias) == ['dense/kernel', 'out/kernel']
  assert len(chosen(leaves.is_any)) == 3
  with pytest.raises(ValueError, match='matches no leaf; there are: dense/'):
    chosen('kernel')


@pytest.mark.parametrize('unrolls', [True, False])
@pytest.mark.parametrize('name', ['rwp', 'wt_awp', 'm_rwp'])
def test_accumulation_equals_the_large_batch(name, unrolls, monkeypatch, x64):
  monkeypatch.setattr(loops, 'unrolls', lambda: unrolls)
  method, params = problem.make(name), problem.params_as('float64')
  x, y = np.tile(problem.X, (2, 1))[:6], np.tile(problem.Y, 2)[:6]
  shapes = set()

  def losses_fn(p, x, y, *, scale):
    shapes.add(x.shape)
    return scale * problem.losses_fn(p, x, y)

  def step(loss_fn):
    out = jax.jit(lambda: perturbed_step.perturbed_step(
        method, loss_fn, optax.sgd(0.1), params, optax.sgd(0.1).init(params),
        method.init(params), jnp.asarray(x), jnp.asarray(y), scale=2.0,
        **problem.keywords_of(method)))()
    return out.params, out.loss, out.perturbation

  whole = step(losses_fn)
  assert shapes == {(6, 4)}
  shapes.clear()
  problem.assert_close(
      step(value_and_grad.accumulated(losses_fn, 3)), whole, 1e-14)
  assert shapes == {(2, 4)}


def test_accumulation_of_means_and_aux():
  def loss_fn(w, x):
    return jnp.mean((w * x) ** 2), jnp.max(x)

  x = jnp.arange(8.0)
  loss, aux = value_and_grad.accumulated(loss_fn, 4, has_aux=True)(2.0, x)
  assert loss == loss_fn(2.0, x)[0]
  np.testing.assert_array_equal(aux, [4, 5, 6, 7])  # of examples j and j + 4
  with pytest.raises(ValueError, match=r'num_microbatches=3 must divide .*8'):
    value_and_grad.accumulated(loss_fn, 3, has_aux=True)(2.0, x)
  with pytest.raises(ValueError, match='num_microbatches must be a whole'):
    value_and_grad.accumulated(loss_fn, 0)


def test_accumulated_losses_keep_the_order_of_the_examples():
  x = jnp.arange(8.0)
  losses = value_and_grad.accumulated(lambda w, x: w * x, 4)(2.0, x)
  np.testing.assert_array_equal(losses, 2 * x)


def test_accumulation_of_a_sharded_batch_shares_the_work():
  # Each of the four devices must compute a quarter of every part.
  mesh = Mesh(np.array(jax.devices()[:4]), ('d',))
  rows = NamedSharding(mesh, PartitionSpec('d'))
  x = jax.device_put(np.linspace(-1, 1, 512).reshape(32, 16), rows)
  w = jax.device_put(jnp.eye(16), NamedSharding(mesh, PartitionSpec()))

  def loss_fn(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)

  def compiled(loss_fn):
    return jax.jit(jax.value_and_grad(loss_fn)).lower(w, x).compile()

  whole = compiled(loss_fn)
  parts = compiled(value_and_grad.accumulated(loss_fn, 4))
  problem.assert_close(parts(w, x), whole(w, x), 1e-6)
  # Recomputing the forward pass costs a third more.
  flops = [f.cost_analysis()['flops'] for f in (whole, parts)]
  assert flops[1] < 2 * flops[0]


@pytest.mark.parametrize('name', ['awp', 'wt_awp', 'm_rwp'])
def test_dropout_is_the_same_in_all_passes(name):
  masks = []

  def loss_fn(params, x, y, *, key):
    keep = jax.random.bernoulli(key, 0.5, (5,))
    masks.append(keep)
    return problem.losses_fn(params, x, y) * keep

  method, params = problem.make(name), problem.params_as('float32')
  perturbed_step.perturbed_value_and_grad(method, loss_fn)(
      params, method.init(params), problem.X, problem.Y,
      key=jax.random.key(1), **problem.keywords_of(method))
  assert len(masks) == 2
  np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize('name,pass_at', [
    ('awp', 'perturbed'), ('wt_awp', 'perturbed'), ('m_rwp', 'natural')])
def test_aux_comes_from_the_given_pass(name, pass_at):
  params, method = problem.params_as('float32'), problem.make(name)

  def loss_fn(p, x, y):
    return problem.losses_fn(p, x, y), p['dense']['kernel']

  out = perturbed_step.perturbed_step(
      method, loss_fn, optax.sgd(0.1), params, optax.sgd(0.1).init(params),
      method.init(params), problem.X, problem.Y, has_aux=True,
      **problem.keywords_of(method))
  v = out.perturbation['dense']['kernel']
  np.testing.assert_allclose(
      out.aux - params['dense']['kernel'], v if pass_at == 'perturbed' else 0,
      atol=1e-6)
  assert np.abs(v).max() > 1e-2


def test_rounds_make_the_moves_of_alternation(x64):
  # Two rounds of two moves equal four moves if nothing changes in between.
  params, four = problem.params_as('float64'), problem.make('awp', num_steps=4)
  two = problem.make('awp', num_steps=2)
  state = two.init(params)
  ascent_fn, _ = value_and_grad.gradient_fns(two, problem.losses_fn)
  ascent = engine.begin(two, state)
  for _ in range(2):
    ascent = engine.ascend(two, state, ascent, params, ascent_fn, rounds=2)
  wanted = perturbed_step.find_perturbation(
      four, problem.losses_fn)(params, state)
  problem.assert_close(
      leaves.restore(ascent.perturbation, params), wanted, 1e-15)


#: Whether a method evaluates the loss at w on the whole batch.
EVALUATES = {
    'awp': True, 'rwp': False, 'wt_awp': True, 'sam': True, 'random': False,
    'm_rwp': True, 'frwp': False, 'momentum_awp': False, 'arwp': False}


@pytest.mark.parametrize('name', EVALUATES)
def test_unperturbed_loss(name):
  params = problem.params_as('float32')
  clean = problem.mean_fn(params)
  out, = problem.run(problem.make(name), optax.sgd(0.1), params, 1)
  assert out._fields[-1] == 'unperturbed_loss'
  if EVALUATES[name]:
    np.testing.assert_allclose(out.unperturbed_loss, clean, rtol=1e-6)
    assert abs(out.loss - clean) > 1e-3
  else:
    assert np.isposinf(out.unperturbed_loss)


def test_unperturbed_loss_of_skipped_steps_and_off_methods():
  params = problem.params_as('float32')
  first, second = problem.run(
      methods.start_after(problem.make('awp', num_steps=2), 1), optax.sgd(0.1),
      params, 2)
  assert first.unperturbed_loss == first.loss
  np.testing.assert_allclose(
      second.unperturbed_loss, problem.mean_fn(first.params), rtol=1e-6)
  assert second.loss > second.unperturbed_loss + 1e-3
  off, = problem.run(methods.awp(0), optax.sgd(0.1), params, 1)
  assert off.unperturbed_loss == off.loss


def test_unperturbed_loss_of_another_natural_batch_is_not_reported():
  # The loss at w was evaluated on natural_args only.
  params = problem.params_as('float32')
  out, = problem.run(
      problem.make('m_rwp'), optax.sgd(0.1), params, 1,
      natural_args=(problem.X[::-1] * 2, problem.Y[::-1]))
  assert np.isposinf(out.unperturbed_loss)


def test_unperturbed_loss_of_alternations_is_that_of_the_first_round():
  params, two = problem.params_as('float32'), problem.make('awp')
  state = two.init(params)
  ascent_fn, descent_fn = value_and_grad.gradient_fns(two, problem.losses_fn)
  ascent = engine.begin(two, state)
  for _ in range(2):
    ascent = engine.ascend(two, state, ascent, params, ascent_fn, rounds=2)
  out = engine.descend(two, state, ascent, params, descent_fn)
  np.testing.assert_allclose(
      out.unperturbed_loss, problem.mean_fn(params), rtol=1e-6)


def test_perturbation_of_a_step_on_request():
  params, method = problem.params_as('float32'), problem.make('awp')
  out = perturbed_step.perturbed_step(
      method, problem.losses_fn, optax.sgd(0.1), params,
      optax.sgd(0.1).init(params), method.init(params),
      return_perturbation=False)
  assert out.perturbation is None


@pytest.mark.parametrize('name', methods.METHODS)
def test_equal_methods_are_one_static_argument(name):
  traces = []

  @functools.partial(jax.jit, static_argnums=0)
  def double(method, x):
    traces.append(method.name)
    return 2 * x

  for _ in range(2):
    method = methods.every_k(methods.scaled(problem.make(name), 0.5), 3)
    double(method, 1.0)
  assert len(traces) == 1
  double(methods.scaled(problem.make(name), 0.25), 1.0)
  assert len(traces) == 2


def test_methods_compare_by_settings():
  assert methods.momentum_awp(decay=0.8) != methods.momentum_awp(decay=0.9)
  assert methods.arwp(eta=0.2) != methods.arwp(eta=0.1)
  assert methods.arwp(beta=0.9) != methods.arwp(beta=0.8)
  assert methods.arwp(filter_axis=0) != methods.arwp()
  rising = [methods.awp(methods.cosine_increase(0.1, 2, 5)) for _ in range(2)]
  assert rising[0] == rising[1]
  assert hash(methods.scaled(rising[0], 2.0)) == hash(
      methods.scaled(rising[1], 2.0))
  assert rising[0] != methods.awp(methods.cosine_increase(0.1, 2, 6))
  assert hash(methods.awp(mask=['a/*'])) == hash(methods.awp(mask=('a/*',)))


def test_scaled_methods():
  method = methods.scaled(methods.boxed_awp(2.0, 0.3), 0.5)
  assert (method.ball.size, method.box.size) == (1.0, 0.15)
  assert methods.scaled(method, 1) is method
  assert methods.scaled(method, 0).is_off
  rising = methods.scaled(methods.awp(lambda step: 0.1 * step), 3.0)
  np.testing.assert_allclose(rising.ball.size_at(2), 0.6)
  with pytest.raises(ValueError, match='factor must be a finite number >= 0'):
    methods.scaled(method, -1)


@pytest.mark.parametrize('name', ['momentum_awp', 'arwp'])
def test_which_gradients_a_memory_observes(name, x64):
  # Of a mixture: momentum follows what is descended, Fisher sums the gradient
  # at w + v.
  params = problem.params_as('float64')
  method = dataclasses.replace(problem.make(name), mix=(0.5, 0.5))
  outs = problem.run(method, optax.sgd(0.0), params, 2)
  wanted = 0.0
  for out in outs:
    still, moved = (
        np.asarray(jax.grad(problem.mean_fn)(p)['dense']['kernel'])
        for p in (params, jax.tree.map(jnp.add, params, out.perturbation)))
    if name == 'arwp':
      beta = method.direction.observe.beta
      wanted = beta * wanted + np.sum(moved ** 2, axis=0, keepdims=True)
    else:
      decay = method.direction.observe.decay
      wanted = decay * wanted + (1 - decay) * (still + moved) / 2
  assert np.abs(moved - still).max() > 1e-3
  np.testing.assert_allclose(
      outs[-1].method_state.memory['dense/kernel'], wanted, rtol=1e-10)


def test_gradients_of_parts_are_summed_in_float32():
  fn = value_and_grad.averaged_value_and_grad(
      lambda w, x: w * x, num_parts=512)
  with loops.platform('tpu'):
    _, gradient = jax.jit(fn)(
        jnp.bfloat16(1), jnp.ones((512, 2), jnp.bfloat16))
  # A sum in bfloat16 stays at 256.
  assert gradient == 1 and gradient.dtype == jnp.bfloat16
