"""Threat models against NumPy formulas, and within ball and box."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import threat
from awp_jax.threat import ThreatModel, l2_norms, unit_l2

NORMS = ('Linf', 'L2', 'L1')
#: Norms with the steepest step. An L_1 step is spread over a fifth of the
#: entries, since the box soon stops the steepest one.
STEEPEST = ('Linf', 'L2')

SHAPES = [(4, 3), (4, 5, 7), (4, 6, 5, 3), (2, 3, 2, 3, 2)]
DTYPES = [jnp.float32, jnp.bfloat16]


def uniform(shape, seed=0):
  return np.random.default_rng(seed).random(shape, np.float32)


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def numpy_distance(norm, x_adv, x):
  delta = (np.asarray(x_adv, np.float64) - np.asarray(x, np.float64))
  flat = delta.reshape(len(delta), -1)
  order = {'Linf': np.inf, 'L2': 2, 'L1': 1}[norm]
  return np.linalg.norm(flat, ord=order, axis=1)


@pytest.mark.parametrize(
    'norm,shape', list(itertools.product(NORMS, SHAPES[::3])))
def test_random_start_fills_ball_and_stays_in_box(norm, shape):
  model = ThreatModel(norm, epsilon=0.3)
  x = uniform(shape)
  starts = np.asarray(jax.jit(jax.vmap(lambda key: model.random_start(key, x)))(
      jax.random.split(jax.random.key(1), 200)))
  assert starts.min() >= 0 and starts.max() <= 1
  distances = np.stack([numpy_distance(norm, s, x) for s in starts])
  assert distances.max() <= 0.3 + 1e-6
  assert distances.max() > 0.2  # a start of another radius would fail
  assert len(np.unique(starts.reshape(200, -1), axis=0)) > 100


def test_random_start_lengths_are_uniform_in_l2():
  # Far from the box, |delta| / epsilon is uniform in [0, 1]: mean 1/2 and
  # standard deviation 1 / sqrt(12). A uniform point of the ball would have a
  # mean near 1.
  model = ThreatModel('L2', epsilon=0.01)
  x = np.full((4000, 50), 0.5, np.float32)
  start = jax.jit(model.random_start)(jax.random.key(0), x)
  lengths = numpy_distance('L2', start, x) / 0.01
  np.testing.assert_allclose(lengths.mean(), 0.5, atol=0.02)
  np.testing.assert_allclose(lengths.std(), 12 ** -0.5, atol=0.01)


def test_random_start_is_uniform_in_linf():
  model = ThreatModel('Linf', epsilon=0.01)
  x = np.full((100, 100), 0.5, np.float32)
  delta = (np.asarray(model.random_start(jax.random.key(0), x)) - x) / 0.01
  np.testing.assert_allclose(delta.mean(), 0, atol=0.03)
  np.testing.assert_allclose(delta.std(), 3 ** -0.5, atol=0.01)


@pytest.mark.parametrize(
    'norm,shape', list(itertools.product(STEEPEST, SHAPES)))
def test_linear_maximizer_attains_the_dual_norm(norm, shape):
  # max_{|d|_p <= 1} <d, g> is the dual norm |g|_q: L_1 for L_inf, L_2 for L_2.
  gradient = normal(shape)
  step = np.asarray(
      jax.jit(ThreatModel(norm, epsilon=1.0).linear_maximizer)(gradient))
  np.testing.assert_allclose(
      numpy_distance(norm, step, np.zeros(shape)), 1, rtol=1e-6)
  gain = np.sum((step * gradient).reshape(shape[0], -1), axis=1)
  dual = np.linalg.norm(
      gradient.reshape(shape[0], -1),
      ord=1 if norm == 'Linf' else 2, axis=1)
  np.testing.assert_allclose(gain, dual, rtol=1e-5)


@pytest.mark.parametrize(
    'norm,scale,dtype',
    list(itertools.product(STEEPEST, [1e-30, 1.0, 1e30], DTYPES)))
def test_linear_maximizer_of_tiny_and_huge_gradients(norm, scale, dtype):
  gradient = (jnp.array([[3.0, -4.0], [0.0, 0.0]]) * scale).astype(dtype)
  step = ThreatModel(norm, epsilon=1.0).linear_maximizer(gradient)
  expected = [[1, -1], [0, 0]] if norm == 'Linf' else [[0.6, -0.8], [0, 0]]
  assert step.dtype == dtype
  np.testing.assert_allclose(
      np.asarray(step, np.float32), expected,
      rtol=1e-6 if dtype == jnp.float32 else 4e-3)


@pytest.mark.parametrize('share,moved', [
    (0.0, 1), (0.1, 1), (0.2, 2), (0.25, 3), (0.5, 5), (1.0, 10)])
def test_sparse_step_moves_the_largest_share(share, moved):
  # |g| = 1, ..., 10, shuffled; signs alternate.
  size = np.random.default_rng(0).permutation(10) + 1.0
  gradient = np.where(size % 2, size, -size)
  wanted = np.sign(gradient) * (size > 10 - moved) / moved
  got = threat.sparse_signs(jnp.asarray(gradient).reshape(1, 2, 5), share)
  np.testing.assert_allclose(got, wanted.reshape(1, 2, 5), rtol=1e-6)
  both = threat.sparse_signs(
      jnp.asarray([gradient, gradient]), jnp.array([1.0, share]))
  np.testing.assert_allclose(both[0], np.sign(gradient) / 10, rtol=1e-6)
  np.testing.assert_allclose(both[1], wanted, rtol=1e-6)


def test_sparse_step_of_ties_and_zeros():
  ties = threat.sparse_signs(jnp.array([[3.0, -3.0, 1.0, 0.0]]), 0.2)
  np.testing.assert_allclose(ties, [[0.5, -0.5, 0, 0]])
  zeros = threat.sparse_signs(jnp.zeros((1, 4)), 0.5)
  np.testing.assert_array_equal(zeros, np.zeros((1, 4)))


def test_l1_step_moves_a_fifth():
  gradient = jnp.arange(1.0, 21.0).reshape(1, 20) * jnp.array([1, -1] * 10)
  step = ThreatModel('L1', epsilon=1.0).linear_maximizer(gradient)
  wanted = np.zeros((1, 20))
  wanted[0, 16:] = [0.25, -0.25, 0.25, -0.25]
  np.testing.assert_allclose(step, wanted)


def test_gradient_floor_is_added_to_the_norm():
  step = ThreatModel('L2', epsilon=1.0).linear_maximizer(
      jnp.array([[3.0, -4.0], [0.0, 0.0]]), floor=5.0)
  np.testing.assert_allclose(step, [[0.3, -0.4], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize('norm,shape', list(itertools.product(NORMS, SHAPES)))
def test_projection_is_inside_and_leaves_inner_points(norm, shape):
  model = ThreatModel(norm, epsilon=0.1)
  project = jax.jit(model.project)
  x = uniform(shape)
  far = x + normal(shape, seed=1)
  near = np.asarray(project(far, x))
  assert near.min() >= 0 and near.max() <= 1
  assert numpy_distance(norm, near, x).max() <= 0.1 + 1e-6
  # Projecting again changes nothing, and neither does it move inner points.
  np.testing.assert_allclose(project(near, x), near, atol=1e-7)
  scale = np.float32(1e-3 / numpy_distance(norm, far, x).max())
  inner = np.clip(x + scale * (far - x), 0, 1)
  np.testing.assert_allclose(project(inner, x), inner, atol=1e-7)


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


def numpy_l1_projection(delta, x, epsilon, lower, upper):
  """Shrinks |delta| by the smallest a that brings the norm to epsilon."""
  size = np.abs(delta)
  cap = np.minimum(size, np.where(delta > 0, upper - x, x - lower))

  def shrunk(a):
    return np.clip(size - a, 0, cap)

  if cap.sum() <= epsilon:
    return np.sign(delta) * cap
  low, high = 0.0, size.max()
  for _ in range(200):
    middle = (low + high) / 2
    low, high = ((middle, high) if shrunk(middle).sum() > epsilon
                 else (low, middle))
  return np.sign(delta) * shrunk(high)


@pytest.mark.parametrize('box', [(0.0, 1.0), (-0.5, 0.75)])
@pytest.mark.parametrize('epsilon', [0.05, 0.7, 3.0, 50.0])
def test_l1_projection_is_the_nearest_point(epsilon, box, x64):
  rng = np.random.default_rng(int(10 * epsilon))
  x = rng.uniform(*box, (5, 4, 6))
  x[0, 0, :3] = box[1]
  delta = rng.standard_normal((5, 4, 6)) * rng.choice([0.01, 1], (5, 4, 6))
  wanted = np.stack([
      numpy_l1_projection(d, point, epsilon, *box)
      for d, point in zip(delta, x, strict=True)])
  np.testing.assert_allclose(
      threat.project_l1(delta, x, epsilon, *box), wanted, rtol=0, atol=1e-13)
  near = ThreatModel('L1', epsilon, *box).project(
      jnp.asarray(x + delta), jnp.asarray(x))
  np.testing.assert_allclose(near, x + wanted, rtol=0, atol=1e-13)
  # A radius for each example.
  radii = epsilon * np.array([1.0, 2, 0.5, 1, 1])
  each = threat.project_l1(delta, x, jnp.asarray(radii), *box)
  np.testing.assert_allclose(each[0], wanted[0], rtol=0, atol=1e-13)
  np.testing.assert_allclose(
      each[1], numpy_l1_projection(delta[1], x[1], 2 * epsilon, *box),
      rtol=0, atol=1e-13)


@pytest.mark.parametrize('epsilon', [0.05, 0.7])
def test_l1_projection_in_float32_stays_in_the_ball(epsilon):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.uniform(0, 1, (50, 300)), jnp.float32)
  delta = jnp.asarray(rng.standard_normal((50, 300)), jnp.float32)
  total = np.abs(np.asarray(
      threat.project_l1(delta, x, epsilon), np.float64)).sum(axis=1)
  assert total.max() <= epsilon * (1 + 1e-6)
  assert total.min() >= epsilon * (1 - 1e-5)
  default = threat.project_l1(delta, x, epsilon)
  np.testing.assert_array_equal(
      default, threat.project_l1(delta, x, epsilon, 0.0, 1.0))


def test_l2_projection_has_the_margin_of_the_reference(x64):
  # epsilon delta / (|delta| + 1e-7) outside; points on the sphere are fixed.
  x = jnp.full((2, 2), 0.5)
  delta = np.array([[0.0018, -0.0024], [0.0006, 0.0008]])
  near = ThreatModel('L2', 1e-3).project(x + delta, x) - x
  np.testing.assert_allclose(
      near[0], delta[0] * 1e-3 / (3e-3 + 1e-7), rtol=1e-9)
  on = ThreatModel('L2', 0.25).project(x + jnp.array([0.25, 0]), x) - x
  np.testing.assert_array_equal(on, [[0.25, 0]] * 2)


@pytest.mark.parametrize('norm', threat.NORMS)
def test_custom_box(norm):
  model = ThreatModel(norm, 50.0, lower=-1.0, upper=2.0)
  x = jnp.zeros((1, 8))
  far = jnp.array([[-3.0, 3.0, -1.5, 1.5] * 2])
  wanted = [[-1, 2, -1, 1.5] * 2]
  np.testing.assert_allclose(model.clip(far), wanted)
  np.testing.assert_allclose(
      jax.jit(model.project)(far, x), wanted, atol=1e-6)
  start = np.asarray(jax.jit(model.random_start)(jax.random.key(0), x))
  assert start.min() >= -1 and start.max() <= 2
  assert start.min() == -1 or norm != 'Linf'
  assert ThreatModel(norm, 1.0) == ThreatModel(norm, 1.0, 0.0, 1.0)


def test_random_start_equals_the_reference_draw(x64):
  x = jnp.full((3, 4, 5), 0.5)
  key = jax.random.key(5)
  box = jax.jit(ThreatModel('Linf', 0.2).random_start)(key, x) - x
  np.testing.assert_allclose(
      box, jax.random.uniform(key, x.shape, x.dtype, -0.2, 0.2), atol=1e-12)
  # L_2: direction and length are independent draws.
  delta = np.asarray(jax.jit(ThreatModel('L2', 0.2).random_start)(key, x) - x)
  direction_key, length_key = jax.random.split(key)
  normal = np.asarray(jax.random.normal(direction_key, x.shape, x.dtype))
  length = jax.random.uniform(length_key, (3, 1, 1), x.dtype)
  norms = np.sqrt(np.square(normal).sum(axis=(1, 2), keepdims=True))
  np.testing.assert_allclose(delta, 0.2 * length * normal / norms, atol=1e-12)
  # L_1: normal noise as wide as the box, projected.
  many = jnp.full((2, 6), 0.5)
  noise = 3 * np.asarray(jax.random.normal(key, many.shape, many.dtype))
  np.testing.assert_allclose(
      jax.jit(ThreatModel('L1', 3.0, -1.0, 2.0).random_start)(key, many) - many,
      np.stack([numpy_l1_projection(d, np.full(6, 0.5), 3.0, -1, 2)
                for d in noise]), atol=1e-10)


@pytest.mark.parametrize('norm', threat.NORMS)
def test_distance(norm):
  x, x_adv = uniform((3, 4, 4, 2)), uniform((3, 4, 4, 2), seed=1)
  got = jax.jit(ThreatModel(norm, 1.0).distance)(x_adv, x)
  assert got.shape == (3,)
  np.testing.assert_allclose(got, numpy_distance(norm, x_adv, x), rtol=1e-6)


def test_norms_of_zero_have_no_nan():
  zeros = jnp.zeros((2, 3))
  assert not np.any(l2_norms(zeros))
  assert not np.any(unit_l2(zeros))
  assert not np.any(ThreatModel('L2', 1.0).project(zeros, zeros))


@pytest.mark.parametrize('arguments,message', [
    (('L3', 0.1), "^norm must be one of 'Linf', 'L2', 'L1', got 'L3'"),
    (('linf', 0.1), "Did you mean 'Linf'"),
    (('Linf', 0.0), '^epsilon must be a finite number > 0, got 0.0'),
    (('Linf', -0.1), 'epsilon must be a finite number > 0, got -0.1'),
    (('L2', float('nan')), 'epsilon must be a finite number > 0, got nan'),
    (('L2', float('inf')), 'epsilon must be a finite number > 0, got inf'),
    (('L2', '0.1'), "epsilon must be a finite number > 0, got '0.1'"),
    (('L2', 0.1, 1.0, 1.0), r'lower < upper, got \[1.0, 1.0\]'),
    (('L2', 0.1, 1.0, 0.5), r'lower < upper, got \[1.0, 0.5\]'),
])
def test_bad_models(arguments, message):
  with pytest.raises(ValueError, match=message):
    ThreatModel(*arguments)


def test_inputs_need_a_batch_axis():
  with pytest.raises(ValueError, match=r'rank >= 2.*\(3,\)'):
    ThreatModel('L2', 0.1).linear_maximizer(jnp.ones(3))


@pytest.mark.parametrize('norm', threat.NORMS)
def test_random_start_does_not_depend_on_the_units(norm):
  x = uniform((4, 30))
  small = jax.jit(ThreatModel(norm, 0.25).random_start)(jax.random.key(0), x)
  large = jax.jit(ThreatModel(norm, 64, upper=256).random_start)(
      jax.random.key(0), 256 * x)
  np.testing.assert_allclose(256 * small, large, rtol=1e-4, atol=1e-3)


def test_l1_norms_keep_the_axes_and_steps_take_one_example():
  x = jnp.array([[[1.0, -2.0], [0.0, 0.5]]])
  np.testing.assert_array_equal(threat.l1_norms(x), [[[3.5]]])
  np.testing.assert_array_equal(
      threat.sparse_signs(x, 0.25), [[[0.0, -1.0], [0.0, 0.0]]])
