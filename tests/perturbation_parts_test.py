"""Leaves, balls, accumulation: what the engine is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awp_jax import loops
from awp_jax.perturbation import balls, engine, gradients, leaves, steps
from awp_jax.perturbation.balls import Ball
from awp_jax.perturbation.method import Method
from tests import perturbation_problem as problem

RNG = np.random.default_rng(0)
D = [RNG.standard_normal((3, 4)), RNG.standard_normal(4)]
W = [RNG.standard_normal((3, 4)), RNG.standard_normal(4)]
T = [np.abs(w) + 0.1 for w in W]


def groups(xs, norm):
  """The groups of some leaves as a list of vectors, by their definition."""
  if norm == 'tree':
    return [np.concatenate([x.ravel() for x in xs])]
  if norm == 'tensor':
    return [x.ravel() for x in xs]
  if norm == 'filter':
    return [*xs[0].T, xs[1]]
  return [np.array([value]) for x in xs for value in x.ravel()]


@pytest.mark.parametrize('scale', balls.SCALES)
@pytest.mark.parametrize('norm', balls.NORMS)
def test_ball_by_its_definition(norm, scale, x64):
  ball, size = Ball(0.3, norm, scale, floor=0.1), 0.3
  v = [np.asarray(x) for x in balls.farthest(ball, D, W, size)]
  if scale == 'adaptive':
    radii = [size] * len(groups(v, norm))
    inside = groups([x / t for x, t in zip(v, T, strict=True)], norm)
    pull = groups([x * t for x, t in zip(D, T, strict=True)], norm)
  else:
    radii = [size * (1 if scale == 'absolute' else np.linalg.norm(w) + 0.1)
             for w in groups(W, norm)]
    inside, pull = groups(v, norm), groups(D, norm)
  for x, d, radius in zip(inside, pull, radii, strict=True):
    # On the sphere, and no other point of it lies farther along d.
    np.testing.assert_allclose(np.linalg.norm(x), radius, rtol=1e-12)
    np.testing.assert_allclose(x @ d, radius * np.linalg.norm(d), rtol=1e-12)
  far = balls.project(ball, [3 * x for x in v], W, size)
  near = balls.project(ball, [x / 3 for x in v], W, size)
  for a, b, x in zip(far, near, v, strict=True):
    np.testing.assert_allclose(a, x, rtol=1e-12)
    np.testing.assert_allclose(b, x / 3, rtol=1e-12)


@pytest.mark.parametrize('keywords,message', [
    ({'size': -1}, 'size must be a finite number >= 0, got -1'),
    ({'size': 1, 'norm': 'layer'}, "one of 'tensor', 'filter', 'tree', 'elem"),
    ({'size': 1, 'scale': 'rel'}, "one of 'relative', 'absolute', 'adaptive'"),
    ({'size': 1, 'tiny': -1}, 'tiny must be'),
    ({'size': 1, 'floor': -1}, 'floor must be')])
def test_bad_balls(keywords, message):
  with pytest.raises(ValueError, match=message):
    Ball(**keywords)


def test_bad_methods():
  with pytest.raises(ValueError, match="one of 'projected', 'summed'"):
    Method('m', Ball(1.0), moves='walk')
  with pytest.raises(ValueError, match='takes no gradients: num_steps must be'):
    Method('m', Ball(1.0), direction=problem.make('random').direction,
           num_steps=2)
  method = problem.make('random')
  params = problem.params_as('float32')
  with pytest.raises(ValueError, match='rounds=2 take turns'):
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
    out = jax.jit(lambda: steps.perturbed_step(
        method, loss_fn, optax.sgd(0.1), params, optax.sgd(0.1).init(params),
        method.init(params), jnp.asarray(x), jnp.asarray(y), scale=2.0,
        **problem.keywords_of(method)))()
    return out.params, out.loss, out.perturbation

  whole = step(losses_fn)
  assert shapes == {(6, 4)}
  shapes.clear()
  problem.assert_close(step(gradients.accumulated(losses_fn, 3)), whole, 1e-14)
  assert shapes == {(2, 4)}


def test_accumulation_of_means_and_aux():
  def loss_fn(w, x):
    return jnp.mean((w * x) ** 2), jnp.max(x)

  x = jnp.arange(8.0)
  loss, aux = gradients.accumulated(loss_fn, 4, has_aux=True)(2.0, x)
  assert loss == loss_fn(2.0, x)[0]
  np.testing.assert_array_equal(aux, [1, 3, 5, 7])
  with pytest.raises(ValueError, match=r'num_microbatches=3 must divide .*8'):
    gradients.accumulated(loss_fn, 3, has_aux=True)(2.0, x)
  with pytest.raises(ValueError, match='num_microbatches must be a whole'):
    gradients.accumulated(loss_fn, 0)


@pytest.mark.parametrize('name', ['awp', 'wt_awp', 'm_rwp'])
def test_dropout_is_the_same_in_all_passes(name):
  masks = []

  def loss_fn(params, x, y, *, key):
    keep = jax.random.bernoulli(key, 0.5, (5,))
    masks.append(keep)
    return problem.losses_fn(params, x, y) * keep

  method, params = problem.make(name), problem.params_as('float32')
  steps.perturbed_value_and_grad(method, loss_fn)(
      params, method.init(params), problem.X, problem.Y,
      key=jax.random.key(1), **problem.keywords_of(method))
  assert len(masks) == 2
  np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize('name,pass_at', [
    ('awp', 'perturbed'), ('wt_awp', 'perturbed'), ('m_rwp', 'natural')])
def test_aux_comes_from_the_pass_that_is_named(name, pass_at):
  params, method = problem.params_as('float32'), problem.make(name)

  def loss_fn(p, x, y):
    return problem.losses_fn(p, x, y), p['dense']['kernel']

  out = steps.perturbed_step(
      method, loss_fn, optax.sgd(0.1), params, optax.sgd(0.1).init(params),
      method.init(params), problem.X, problem.Y, has_aux=True,
      **problem.keywords_of(method))
  v = out.perturbation['dense']['kernel']
  np.testing.assert_allclose(
      out.aux - params['dense']['kernel'], v if pass_at == 'perturbed' else 0,
      atol=1e-6)
  assert np.abs(v).max() > 1e-2


def test_rounds_make_the_moves_of_alternation(x64):
  # Two rounds of two moves are four moves, when nothing changes in between.
  params, four = problem.params_as('float64'), problem.make('awp', num_steps=4)
  two = problem.make('awp', num_steps=2)
  state = two.init(params)
  ascent_fn, _ = gradients.gradient_fns(two, problem.losses_fn)
  ascent = engine.begin(two, state)
  for _ in range(2):
    ascent = engine.ascend(two, state, ascent, params, ascent_fn, rounds=2)
  wanted = steps.weight_perturbation(four, problem.losses_fn)(params, state)
  problem.assert_close(ascent.perturbation, wanted, 1e-15)
