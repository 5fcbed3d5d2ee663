"""Methods that draw noise: its distribution, its key, its Fisher sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awp_jax.perturbation import balls, methods, steps
from tests import perturbation_problem as problem
from tests.perturbation_problem import as_trees, assert_same, reference, run

SIGMA, DRAWS = 0.02, 400
SHAPES = {'kernel': (3, 2, 4, 5), 'dense': (7, 5), 'bias': (6,), 'scalar': ()}


def weights():
  rng = np.random.default_rng(0)
  return {name: jnp.asarray(rng.standard_normal(shape) * 2, jnp.float32)
          for name, shape in SHAPES.items()}


def spread(params, fisher=None, eta=0.0):
  """The standard deviation of each entry, from its formula."""
  stds = {}
  for name, w in params.items():
    w = np.asarray(w, np.float64)
    axes = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
    norm = np.sqrt(np.sum(w ** 2, axis=axes, keepdims=w.ndim > 1))
    f = 0 if fisher is None else np.asarray(fisher[name], np.float64)
    stds[name] = SIGMA * norm / np.sqrt(1 + eta * f) * np.ones_like(w)
  return stds


def draws(method, state, params):
  """DRAWS perturbations, one a key."""
  draw = steps.find_perturbation(method, lambda p: 0.0 * p['scalar'])
  return jax.jit(jax.vmap(lambda key: draw(params, state, noise_key=key)))(
      jax.random.split(jax.random.key(0), DRAWS))


def fits(v, stds):
  """Whether v / std is standard normal, leaf by leaf and filter by filter.

  Five standard errors of the mean and of the mean square of n numbers,
  sqrt(1 / n) and sqrt(2 / n).
  """
  for name, std in stds.items():
    z = np.asarray(v[name], np.float64) / std
    if z.ndim == 2:
      groups = list(z.T)
    elif z.ndim < 2:
      groups = [z]
    else:
      groups = [z[..., j].ravel() for j in range(z.shape[-1])]
    for group in groups:
      n = group.size
      if abs(group.mean()) > 5 / np.sqrt(n):
        return False
      if abs(np.mean(group ** 2) - 1) > 5 * np.sqrt(2 / n):
        return False
  return True


FISHER = {'kernel': np.arange(5.0).reshape(1, 1, 1, 5),
          'dense': np.linspace(0, 30, 5)[None],
          'bias': np.linspace(0, 9, 6), 'scalar': np.array(3.0)}


@pytest.mark.parametrize('name,eta', [
    ('random', 0), ('m_rwp', 0), ('frwp', 0), ('arwp', 0.5), ('m_arwp', 0.5)])
def test_scale_is_accepted_and_others_are_rejected(name, eta):
  params = weights()
  options = {'gamma' if name == 'frwp' else 'sigma': SIGMA}
  if eta:
    options['eta'] = eta
  method = methods.make(name, **options)
  state = method.init(params)
  if eta:
    state = state._replace(memory=jax.tree.map(jnp.float32, FISHER))
    assert not fits(draws(method, state, params), spread(params))
  v, stds = draws(method, state, params), spread(params, FISHER, eta)
  assert fits(v, stds)
  for factor in (2 / 3, 3 / 2):
    assert not fits(v, {name: factor * std for name, std in stds.items()})
  # Different leaves and entries are different draws.
  flat = np.concatenate([
      (np.asarray(v[name]) / stds[name]).reshape(DRAWS, -1) for name in stds],
      axis=1)
  correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
  assert np.abs(correlation).max() < 6 / np.sqrt(DRAWS)


def test_filters_lie_along_the_axis_that_is_named():
  params = {'w': jnp.array([[1.0, 2.0], [3.0, 4.0]])}
  last = balls.lengths(balls.Ball(1.0, 'filter'), params)['w']
  first = balls.lengths(balls.Ball(1.0, 'filter', filter_axis=0), params)['w']
  np.testing.assert_allclose(last, np.sqrt([[10.0, 20.0]]), rtol=1e-6)
  np.testing.assert_allclose(first, np.sqrt([[5.0], [25.0]]), rtol=1e-6)


def test_spread_is_that_of_the_published_arwp(x64):
  # The published class, its Fisher sums after three steps, 20,000 draws: their
  # root mean square is known to 0.5 per cent.
  wanted = as_trees(reference()['arwp_rms'])
  params = as_trees(reference()['arwp_params'])
  fisher = as_trees(reference()['arwp_fisher'])
  for layer, name in (('dense', 'kernel'), ('dense', 'bias'),
                      ('out', 'kernel')):
    w, f = params[layer][name], fisher[layer][name]
    ours = balls.lengths(
        balls.Ball(0.02, 'filter'), {'w': jnp.asarray(w)})['w']
    std = 0.02 * np.asarray(ours) / np.sqrt(1 + 0.1 * f) * np.ones_like(w)
    np.testing.assert_allclose(wanted[layer][name], std, rtol=0.025)
    assert np.abs(wanted[layer][name] / std * 1.5 - 1).min() > 0.025


def test_fisher_sums_follow_their_recursion(x64):
  params, method = problem.params_as('float64'), problem.make(
      'arwp', sigma=0, beta=0.9)
  # Size 0 switches the noise off: the gradients are those at w.
  outs = run(method, optax.sgd(0.1), params, 3)
  wanted, shown = {'kernel': 0.0, 'bias': 0.0}, params
  for out in outs:
    g = jax.grad(problem.mean_fn)(shown)['dense']
    wanted = {'kernel': 0.9 * wanted['kernel'] + np.sum(
        np.square(g['kernel']), axis=0, keepdims=True),
              'bias': 0.9 * wanted['bias'] + np.square(g['bias'])}
    shown = out.params
  got = outs[-1].method_state.memory
  np.testing.assert_allclose(got['dense/kernel'], wanted['kernel'], rtol=1e-12)
  np.testing.assert_allclose(got['dense/bias'], wanted['bias'], rtol=1e-12)


def test_one_key_gives_new_noise_in_every_step_and_the_same_again():
  params = problem.params_as('float32')
  method = problem.make('random')
  # At a rate of 0 the weights, which scale the noise, stay.
  outs, again = (run(method, optax.sgd(0.0), params, 2) for _ in range(2))
  assert problem.distance(outs[0].perturbation, outs[1].perturbation) > 1e-3
  assert_same(outs[1], again[1])
  other = run(method, optax.sgd(0.0), params, 1,
              noise_key=np.array([0, 8], np.uint32))[0]
  assert problem.distance(outs[0].perturbation, other.perturbation) > 1e-3


def test_mixture_of_two_batches(x64):
  params, method = problem.params_as('float64'), problem.make('frwp', alpha=0.3)
  other = (problem.X[:3] * 2, problem.Y[:3])
  (loss, g), _ = steps.perturbed_value_and_grad(method, problem.losses_fn)(
      params, method.init(params), problem.X, problem.Y, natural_args=other,
      noise_key=problem.KEY)
  v = steps.find_perturbation(method, problem.losses_fn)(
      params, method.init(params), problem.X, problem.Y, noise_key=problem.KEY)
  shifted = jax.tree.map(np.add, params, v)
  wanted = 0.3 * problem.mean_fn(shifted) + 0.7 * problem.mean_fn(
      params, *other)
  np.testing.assert_allclose(loss, wanted, rtol=1e-13)
  problem.assert_close(g, jax.tree.map(
      lambda a, b: 0.3 * a + 0.7 * b, jax.grad(problem.mean_fn)(shifted),
      jax.grad(problem.mean_fn)(params, *other)), 1e-14)


def test_sigma_grows_as_in_arwp():
  sigma = methods.cosine_increase(0.001, 10, 100)
  np.testing.assert_allclose(
      [sigma(jnp.int32(t)) for t in (0, 50, 100)], [0.001, 0.006, 0.011],
      rtol=1e-5)
  params = weights()
  method = methods.random(lambda step: SIGMA * (step + 1))
  state = method.init(params)._replace(step=jnp.int32(2))
  v = draws(method, state, params)
  assert fits(jax.tree.map(lambda leaf: leaf / 3, v), spread(params))
