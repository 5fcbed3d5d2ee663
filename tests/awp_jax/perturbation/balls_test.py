"""Balls against NumPy: groups, linear maximizers and projections."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.perturbation import balls
from awp_jax.perturbation.balls import Ball

RNG = np.random.default_rng(0)
SHAPES = {'a': (2, 3, 4), 'b': (3, 4), 'c': (5,), 'd': ()}
W = {path: RNG.standard_normal(shape) for path, shape in SHAPES.items()}
D = {path: RNG.standard_normal(shape) for path, shape in SHAPES.items()}
W['a'][:, 1, 2] = 0.0  # single weights of zero,
W['b'][:, 1] = 0.0  # and a filter of zeros
D['b'][0] = 0.0
D['c'][:] = 0.0
#: The number of stack axes of each leaf, for each `stack_axes`.
STACKS = {
    0: dict.fromkeys(SHAPES, 0), 1: {'a': 1, 'b': 1, 'c': 1, 'd': 0},
    (('a', 1),): {'a': 1, 'b': 0, 'c': 0, 'd': 0}}


def group_of(ball, path, index):
  """The group of an entry."""
  stacked = STACKS[ball.stack_axes][path]
  layer, own = index[:stacked], index[stacked:]
  if ball.norm == 'tree':
    return ()
  if ball.norm == 'element':
    return (path, index)
  if ball.norm == 'filter' and len(own) > 1:
    return (path, layer, own[ball.filter_axis])
  return (path, layer)


def group_norms(ball, values):
  """|x_i| of the group of each entry, in the shapes of the values."""
  squares = {}
  for path, leaf in values.items():
    for index in np.ndindex(leaf.shape):
      key = group_of(ball, path, index)
      squares[key] = squares.get(key, 0.0) + leaf[index] ** 2
  norms = {path: np.zeros(leaf.shape) for path, leaf in values.items()}
  for path, leaf in values.items():
    for index in np.ndindex(leaf.shape):
      norms[path][index] = np.sqrt(squares[group_of(ball, path, index)])
  return norms


def stretch(ball, stretched):
  return {path: np.abs(w) + ball.floor
          if stretched is None or path in stretched else np.ones(w.shape)
          for path, w in W.items()}


def numpy_lengths(ball, stretched=None):
  if ball.scale == 'absolute':
    return {path: np.ones(w.shape) for path, w in W.items()}
  if ball.scale == 'adaptive':
    return stretch(ball, stretched)
  return {path: n + ball.floor for path, n in group_norms(ball, W).items()}


def numpy_maximizer(ball, size, stretched=None):
  s = numpy_lengths(ball, stretched)
  t = s if ball.scale == 'adaptive' else dict.fromkeys(W, 1.0)
  pull = {path: t[path] * d for path, d in D.items()}
  norms = {path: n + ball.eps for path, n in group_norms(ball, pull).items()}
  return {path: size * s[path] * np.divide(
      d, norms[path], out=np.zeros(d.shape), where=norms[path] > 0)
          for path, d in pull.items()}


def numpy_project(ball, v, size, stretched=None):
  s = numpy_lengths(ball, stretched)
  if ball.scale == 'adaptive':
    x = {path: np.divide(v[path], s[path], out=np.zeros(v[path].shape),
                         where=s[path] > 0) for path in v}
    radius, back = dict.fromkeys(v, size), s
  else:
    x, radius = v, {path: size * s[path] for path in v}
    back = dict.fromkeys(v, 1.0)
  norms = group_norms(ball, x)
  return {path: back[path] * x[path] * np.minimum(1, np.divide(
      radius[path], norms[path], out=np.ones(x[path].shape),
      where=norms[path] > 0)) for path in v}


def as_arrays(values):
  return {path: jnp.asarray(leaf) for path, leaf in values.items()}


def assert_close(got, wanted):
  assert list(got) == list(wanted)
  for path, leaf in wanted.items():
    np.testing.assert_allclose(
        np.broadcast_to(got[path], leaf.shape), leaf, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('norm,scale', list(itertools.product(
    balls.NORM_GROUPS, balls.SCALES)))
def test_entry_by_entry(norm, scale, x64):
  w, d = as_arrays(W), as_arrays(D)
  for (filter_axis, stack_axes), (eps, floor) in itertools.product(
      [(-1, 0), (0, 0), (-1, 1), (0, (('a', 1),))], [(0.0, 0.0), (0.3, 0.2)]):
    ball = Ball(9.0, norm, scale, filter_axis=filter_axis, eps=eps,
                floor=floor, stack_axes=stack_axes)
    for stretched in (None, {'b', 'd'}) if scale == 'adaptive' else (None,):
      assert_close(
          balls.lengths(ball, w, stretched), numpy_lengths(ball, stretched))
      assert_close(
          balls.linear_maximizer(ball, d, w, 0.7, stretched),
          numpy_maximizer(ball, 0.7, stretched))
      # At the median radius about half of the groups are outside.
      v = {path: 3 * leaf for path, leaf in D.items()}
      ratios = np.concatenate([
          (n / (s + 1e-9)).ravel() for n, s in zip(
              group_norms(ball, v).values(),
              numpy_lengths(ball, stretched).values(), strict=True)])
      size = float(np.median(ratios))
      assert_close(
          balls.project(ball, as_arrays(v), w, size, stretched),
          numpy_project(ball, v, size, stretched))


@pytest.mark.parametrize('scale', balls.SCALES)
@pytest.mark.parametrize('norm', balls.NORM_GROUPS)
def test_projection_fixes_inner_points_and_maximizers_are_on_the_sphere(
    norm, scale, x64):
  ball = Ball(1.0, norm, scale, floor=0.1)
  w, v = as_arrays(W), numpy_maximizer(ball, 0.5)
  for factor, wanted in ((0.9, 0.9), (1.0, 1.0), (7.0, 1.0)):
    got = balls.project(ball, as_arrays(
        {path: factor * leaf for path, leaf in v.items()}), w, 0.5)
    assert_close(got, {path: wanted * leaf for path, leaf in v.items()})


def test_size_zero_is_the_point_zero():
  w, d = as_arrays(W), as_arrays(D)
  for scale in balls.SCALES:
    ball = Ball(0.0, scale=scale)
    for got in (balls.linear_maximizer(ball, d, w, 0.0),
                balls.project(ball, d, w, 0.0)):
      assert not any(np.any(leaf) for leaf in got.values())


def test_zeros_of_a_stretched_ball_are_excluded():
  # t = 0 at the first entry: v is 0 there and the others use the full radius.
  ball = Ball(1.0, scale='adaptive')
  w, v = {'w': jnp.array([0.0, 2.0])}, {'w': jnp.array([100.0, 4.0])}
  np.testing.assert_allclose(balls.project(ball, v, w, 0.5)['w'], [0, 1])
  np.testing.assert_allclose(balls.project(ball, v, w, 5.0)['w'], [0, 4])


def test_directions_that_are_not_finite_are_not_hidden():
  d = {'a': jnp.array([jnp.inf, 1.0]), 'b': jnp.array([jnp.nan, 1.0])}
  v = balls.linear_maximizer(Ball(1.0, scale='absolute'), d, d, 1.0)
  assert np.isnan(v['a'][0]) and np.all(np.isnan(v['b']))


@pytest.mark.parametrize('filter_axis,stacked,wanted', [
    (-1, 0, [[[12, 15, 18, 21]]]), (0, 0, [[[66]]]), (1, 0, None),
    (-1, 1, [[[12, 15, 18, 21]]]), (0, 1, [[[6], [22], [38]]])])
def test_filter_sums(filter_axis, stacked, wanted):
  leaf = jnp.arange(12.0).reshape(1, 3, 4)
  if wanted is None:
    wanted = [[[6], [22], [38]]]
  np.testing.assert_array_equal(
      balls.filter_sums(leaf, filter_axis, stacked), wanted)


@pytest.mark.parametrize('shape,stacked', [((), 0), ((3,), 0), ((2, 3), 1)])
def test_leaves_of_one_axis_have_no_filters(shape, stacked):
  leaf = jnp.arange(float(np.prod(shape))).reshape(shape)
  np.testing.assert_array_equal(
      balls.filter_sums(leaf, stacked=stacked), leaf)


def test_filter_sums_count_the_last_axis_by_default():
  np.testing.assert_array_equal(
      balls.filter_sums(jnp.arange(12.0).reshape(2, 3, 2)), [[[30, 36]]])


def test_defaults_and_sizes():
  assert Ball(0.1) == Ball(
      size=0.1, norm='tensor', scale='relative', filter_axis=-1, eps=0.0,
      floor=0.0, stretched=None, stack_axes=0)
  assert Ball(0.1).size_at(jnp.int32(3)) == 0.1
  assert Ball(lambda step: 2 * step).size_at(jnp.int32(3)) == 6
  by_pattern = Ball(0.1, stack_axes={'a/*': 1, 'b': 2})
  assert by_pattern.stack_axes == (('a/*', 1), ('b', 2))
  assert hash(by_pattern) == hash(Ball(0.1, stack_axes={'a/*': 1, 'b': 2}))
  with pytest.raises(AttributeError):
    by_pattern.size = 0.2


@pytest.mark.parametrize('keywords,message', [
    ({'size': -1}, '^size must be a finite number >= 0, got -1'),
    ({'size': 1, 'norm': 'layer'},
     "^norm must be one of 'tensor', 'filter', 'tree', 'elem"),
    ({'size': 1, 'scale': 'rel'},
     "^scale must be one of 'relative', 'absolute', 'adaptive'"),
    ({'size': 1, 'eps': -1}, '^eps must be a finite number >= 0, got -1'),
    ({'size': 1, 'floor': -1}, '^floor must be a finite number >= 0, got -1'),
    ({'size': 1, 'stack_axes': -1}, '^stack_axes must be a whole number >= 0'),
    ({'size': 1, 'stack_axes': {'a': 0.5}},
     "^stack_axes of 'a' must be a whole number >= 0, got 0.5")])
def test_bad_balls(keywords, message):
  with pytest.raises(ValueError, match=message):
    Ball(**keywords)
