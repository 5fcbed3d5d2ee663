"""Directions: their norms, distribution and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import landscape
from tests.helpers.landscape_problem import parameters


def random_direction(key, params, **keywords):
  return jax.jit(functools.partial(
      landscape.random_direction, **keywords))(key, params)


def filter_normalize(direction, params, **keywords):
  return jax.jit(functools.partial(
      landscape.filter_normalize, **keywords))(direction, params)


@pytest.mark.parametrize('axis', [-1, 0])
def test_filters_have_the_norms_of_the_weights(axis, x64):
  params = parameters(dtype='float64')
  d = random_direction(jax.random.key(3), params, filter_axis=axis)
  for got, w in ((d['conv']['kernel'], params['conv']['kernel']),
                 (d['out'], params['out'])):
    got, w = (np.moveaxis(leaf, axis, 0) for leaf in (got, w))
    for filter_of_d, filter_of_w in zip(got, w, strict=True):
      np.testing.assert_allclose(
          np.sqrt(np.sum(filter_of_d ** 2)), np.sqrt(np.sum(filter_of_w ** 2)),
          rtol=1e-14)
      # Another direction than the weight's own.
      assert np.abs(filter_of_d - filter_of_w).max() > 0.1
  assert not np.any(d['conv']['bias']) and not np.any(d['scale'])
  # Norms of filters along the other axis are not those of the weights.
  other = np.sqrt(np.sum(np.square(d['out']), axis=axis))
  wrong = np.sqrt(np.sum(np.square(params['out']), axis=axis))
  assert np.abs(other - wrong).max() > 0.1


def test_layers_have_the_norms_of_the_weights(x64):
  params = parameters(dtype='float64')
  v = jax.tree.map(lambda w: 1e-30 * jnp.sin(w), params)
  d = filter_normalize(v, params, norm='layer')
  for got, tiny, w in ((d['out'], v['out'], params['out']),
                       (d['conv']['kernel'], v['conv']['kernel'],
                        params['conv']['kernel'])):
    ratio = np.linalg.norm(w) / np.linalg.norm(tiny)
    np.testing.assert_allclose(got, ratio * tiny, rtol=1e-13)
  assert not np.any(d['conv']['bias'])


def test_directions_are_gaussian_and_differ():
  params = {'w': jnp.ones((4000, 2))}
  d, e = (random_direction(jax.random.key(i), params)['w']
          for i in (0, 1))
  # All weights are 1: so is the variance of d, filter by filter.
  np.testing.assert_allclose(np.mean(np.square(d), axis=0), 1, rtol=1e-5)
  assert abs(float(np.mean(d))) < 0.05 and abs(float(np.mean(d * e))) < 0.05
  assert abs(float(np.mean(np.square(d) ** 2)) - 3) < 0.3
  again = random_direction(
      jax.random.key(0), {'w': 2 * jnp.ones((4000, 2))})['w']
  np.testing.assert_allclose(again, 2 * d, rtol=1e-6)


def test_zeros_stay_zeros():
  params = {'w': jnp.array([[1.0, 0.0], [2.0, 0.0]])}
  d = landscape.filter_normalize(
      {'w': jnp.array([[0.0, 1.0], [0.0, 1.0]])}, params)
  assert not np.any(d['w'])


def test_mask_chooses_leaves():
  params = parameters()
  d = landscape.random_direction(
      jax.random.key(0), params, mask=lambda path, leaf: path == 'out')
  assert np.any(d['out']) and not np.any(d['conv']['kernel'])


@pytest.mark.parametrize('norm', ['filter', 'layer'])
def test_stacked_layers_have_norms_of_their_own(norm):
  rng = np.random.default_rng(0)
  w, d = (jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
          for _ in range(2))
  params = {'layers/kernel': w, 'layers/gain': w[:, 0]}
  direction = {'layers/kernel': d, 'layers/gain': d[:, 0]}
  whole = filter_normalize(direction, params, norm=norm, stack_axes=1)
  assert not np.any(whole['layers/gain'])  # [L, D]: a vector in each layer
  for layer in range(2):
    alone = filter_normalize(
        {'kernel': d[layer]}, {'kernel': w[layer]}, norm=norm)
    np.testing.assert_allclose(
        whole['layers/kernel'][layer], alone['kernel'], rtol=1e-6)


def test_other_arguments_are_refused():
  params = parameters()
  with pytest.raises(ValueError, match=r"norm must be one of .* got 'weight'"):
    landscape.random_direction(jax.random.key(0), params, norm='weight')
  with pytest.raises(ValueError, match='direction must be a pytree like'):
    landscape.filter_normalize({'w': jnp.ones(2)}, params)
  # A first axis of 1 would be broadcast.
  single = jax.tree.map(lambda w: jnp.ones((1, *w.shape[1:])), params)
  with pytest.raises(ValueError, match='direction must have the shapes of'):
    landscape.filter_normalize(single, params)
  with pytest.raises(ValueError, match='each direction must have the shapes'):
    landscape.evaluate_points(
        jax.random.key(0), lambda *_: {}, params, [params, single],
        [[0.0, 0.0]], np.ones(3), batch_size=8)
