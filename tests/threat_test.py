"""Threat models against NumPy formulas, and in ball and box."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.threat import ThreatModel, l2_norms, unit_l2

NORMS = ('Linf', 'L2', 'L1')
#: Those whose step is the steepest of all: an L_1 step is spread over a fifth
#: of the entries, since the box stops the steepest one at once.
STEEPEST = ('Linf', 'L2')

SHAPES = [(4, 3), (4, 5, 7), (4, 6, 5, 3), (2, 3, 2, 3, 2)]
DTYPES = [jnp.float32, jnp.bfloat16]


def numpy_distance(norm, x_adv, x):
  delta = (np.asarray(x_adv, np.float64) - np.asarray(x, np.float64))
  flat = delta.reshape(len(delta), -1)
  order = {'Linf': np.inf, 'L2': 2, 'L1': 1}[norm]
  return np.linalg.norm(flat, ord=order, axis=1)


@pytest.mark.parametrize('norm,shape', list(itertools.product(NORMS, SHAPES)))
def test_random_start_fills_ball_and_stays_in_box(norm, shape):
  threat = ThreatModel(norm, epsilon=0.3)
  x = jax.random.uniform(jax.random.key(0), shape)
  starts = jax.vmap(lambda key: threat.random_start(key, x))(
      jax.random.split(jax.random.key(1), 200))
  assert starts.min() >= 0 and starts.max() <= 1
  distances = np.stack([numpy_distance(norm, s, x) for s in starts])
  assert distances.max() <= 0.3 + 1e-6
  assert distances.max() > 0.2  # a start of another radius would fail
  assert len(np.unique(np.asarray(starts).reshape(200, -1), axis=0)) > 100


def test_random_start_lengths_are_uniform_in_l2():
  # Far from the box, |delta| / epsilon is uniform in [0, 1]: mean 1/2 and
  # standard deviation 1 / sqrt(12). A uniform point of the ball would have a
  # mean near 1.
  threat = ThreatModel('L2', epsilon=0.01)
  x = jnp.full((4000, 50), 0.5)
  lengths = numpy_distance(
      'L2', threat.random_start(jax.random.key(0), x), x) / 0.01
  np.testing.assert_allclose(lengths.mean(), 0.5, atol=0.02)
  np.testing.assert_allclose(lengths.std(), 12 ** -0.5, atol=0.01)


def test_random_start_is_uniform_in_linf():
  threat = ThreatModel('Linf', epsilon=0.01)
  x = jnp.full((100, 100), 0.5)
  delta = np.asarray(threat.random_start(jax.random.key(0), x) - x) / 0.01
  np.testing.assert_allclose(delta.mean(), 0, atol=0.03)
  np.testing.assert_allclose(delta.std(), 3 ** -0.5, atol=0.01)


@pytest.mark.parametrize(
    'norm,shape', list(itertools.product(STEEPEST, SHAPES)))
def test_steepest_ascent_attains_the_dual_norm(norm, shape):
  # max_{|d|_p <= 1} <d, g> is the dual norm |g|_q: L_1 for L_inf, L_2 for L_2.
  gradient = jax.random.normal(jax.random.key(0), shape)
  step = ThreatModel(norm, epsilon=1.0).steepest_ascent(gradient)
  np.testing.assert_allclose(
      numpy_distance(norm, step, np.zeros(shape)), 1, rtol=1e-6)
  gain = np.sum(np.asarray(step * gradient).reshape(shape[0], -1), axis=1)
  dual = np.linalg.norm(
      np.asarray(gradient).reshape(shape[0], -1),
      ord=1 if norm == 'Linf' else 2, axis=1)
  np.testing.assert_allclose(gain, dual, rtol=1e-5)


@pytest.mark.parametrize(
    'norm,scale,dtype',
    list(itertools.product(STEEPEST, [1e-30, 1.0, 1e30], DTYPES)))
def test_steepest_ascent_of_tiny_and_huge_gradients(norm, scale, dtype):
  gradient = (jnp.array([[3.0, -4.0], [0.0, 0.0]]) * scale).astype(dtype)
  step = ThreatModel(norm, epsilon=1.0).steepest_ascent(gradient)
  expected = [[1, -1], [0, 0]] if norm == 'Linf' else [[0.6, -0.8], [0, 0]]
  assert step.dtype == dtype
  np.testing.assert_allclose(
      np.asarray(step, np.float32), expected,
      rtol=1e-6 if dtype == jnp.float32 else 4e-3)


def test_l1_step_moves_the_largest_fifth():
  gradient = jnp.arange(-10.0, 10.0).reshape(1, 20)
  step = np.asarray(ThreatModel('L1', epsilon=1.0).steepest_ascent(gradient))
  moved = np.flatnonzero(step[0])
  np.testing.assert_allclose(np.abs(step).sum(), 1, rtol=1e-6)
  assert 4 <= len(moved) <= 5
  assert set(moved) <= {0, 1, 2, 18, 19}
  assert np.all(step[0, moved] * gradient[0, moved] > 0)


def test_gradient_floor_is_added_to_the_norm():
  step = ThreatModel('L2', epsilon=1.0).steepest_ascent(
      jnp.array([[3.0, -4.0], [0.0, 0.0]]), floor=5.0)
  np.testing.assert_allclose(step, [[0.3, -0.4], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize('norm,shape', list(itertools.product(NORMS, SHAPES)))
def test_projection_is_inside_and_leaves_inner_points(norm, shape):
  threat = ThreatModel(norm, epsilon=0.1)
  x = jax.random.uniform(jax.random.key(0), shape)
  far = x + jax.random.normal(jax.random.key(1), shape)
  near = threat.project(far, x)
  assert near.min() >= 0 and near.max() <= 1
  assert numpy_distance(norm, near, x).max() <= 0.1 + 1e-6
  # Projecting again changes nothing, and neither does it move inner points.
  np.testing.assert_allclose(threat.project(near, x), near, atol=1e-7)
  inner = threat.clip(x + 1e-3 * (far - x) / numpy_distance(
      norm, far, x).max())
  np.testing.assert_allclose(threat.project(inner, x), inner, atol=1e-7)


def test_projection_against_closed_forms():
  x = jnp.full((1, 2), 0.5)
  far = x + jnp.array([[0.3, -0.4]])
  np.testing.assert_allclose(
      ThreatModel('Linf', 0.35).project(far, x) - x, [[0.3, -0.35]], rtol=1e-6)
  np.testing.assert_allclose(
      ThreatModel('L2', 0.25).project(far, x) - x, [[0.15, -0.2]], rtol=1e-5)
  # A ball that leaves the box: the entries that stick out are cut.
  np.testing.assert_allclose(
      ThreatModel('Linf', 0.9).project(x + 5, x), [[1, 1]])
  np.testing.assert_allclose(
      ThreatModel('Linf', 0.2, lower=0.4, upper=0.6).project(far, x),
      [[0.6, 0.4]], rtol=1e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_distance(norm):
  x = jax.random.uniform(jax.random.key(0), (3, 4, 4, 2))
  x_adv = jax.random.uniform(jax.random.key(1), (3, 4, 4, 2))
  got = ThreatModel(norm, 1.0).distance(x_adv, x)
  assert got.shape == (3,)
  np.testing.assert_allclose(got, numpy_distance(norm, x_adv, x), rtol=1e-6)


def test_norms_of_zero_have_no_nan():
  zeros = jnp.zeros((2, 3))
  assert not np.any(l2_norms(zeros))
  assert not np.any(unit_l2(zeros))
  assert not np.any(ThreatModel('L2', 1.0).project(zeros, zeros))


@pytest.mark.parametrize('arguments,message', [
    (('L3', 0.1), "norm must be one of 'Linf', 'L2', 'L1', got 'L3'"),
    (('linf', 0.1), "Did you mean 'Linf'"),
    (('Linf', 0.0), 'epsilon must be a finite number > 0, got 0.0'),
    (('Linf', -0.1), 'epsilon must be a finite number > 0, got -0.1'),
    (('L2', float('nan')), 'epsilon must be a finite number > 0, got nan'),
    (('L2', float('inf')), 'epsilon must be a finite number > 0, got inf'),
    (('L2', '0.1'), "epsilon must be a finite number > 0, got '0.1'"),
    (('L2', 0.1, 1.0, 1.0), r'lower < upper, got \[1.0, 1.0\]'),
])
def test_bad_threat_models(arguments, message):
  with pytest.raises(ValueError, match=message):
    ThreatModel(*arguments)


def test_inputs_need_a_batch_axis():
  with pytest.raises(ValueError, match=r'rank >= 2.*\(3,\)'):
    ThreatModel('L2', 0.1).steepest_ascent(jnp.ones(3))
