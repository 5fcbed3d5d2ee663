"""Tests of directions and of the loss along them, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import landscape

POINTS = [[-1.0], [-0.25], [0.0], [0.5], [1.0]]
EPSILON = 0.05
THREAT = awp_jax.ThreatModel('Linf', EPSILON)


def parameters(seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)

  def leaf(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  return {'conv': {'kernel': leaf(3, 3, 2, 5), 'bias': leaf(5)},
          'scale': leaf(5), 'out': leaf(7, 4)}


def quadratic(params, batch, key):
  """1/2 sum_l (a_i |w_l|)^2 of example a_i."""
  del key
  squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
  return {'loss': jnp.square(batch) * squares / 2}


def inner(a, b):
  return sum(
      float(np.vdot(x, y))
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def values(points, name='loss'):
  return np.array([point[name] for point in points])


def test_quadratic_curve_is_the_closed_form(x64):
  params = parameters(dtype='float64')
  d = landscape.random_direction(jax.random.key(1), params)
  rows = np.array([1.0, 2.0, 3.0])
  points = landscape.evaluate_points(
      jax.random.key(0), quadratic, params, [d], POINTS, rows, batch_size=2)
  alphas = np.array(POINTS)[:, 0]
  wanted = np.mean(rows ** 2) / 2 * (
      inner(params, params) + 2 * alphas * inner(params, d)
      + alphas ** 2 * inner(d, d))
  np.testing.assert_allclose(values(points), wanted, rtol=1e-13)


def test_quadratic_plane_is_the_closed_form(x64):
  params = parameters(dtype='float64')
  d, e = (
      landscape.random_direction(jax.random.key(i), params) for i in (1, 2))
  grid = [[a, b] for a in (-1, 0, 0.5) for b in (-0.5, 0, 2)]
  points = landscape.evaluate_points(
      jax.random.key(0), quadratic, params, [d, e], grid, np.ones(1))
  wanted = [
      (inner(params, params) + a * a * inner(d, d) + b * b * inner(e, e)
       + 2 * (a * inner(params, d) + b * inner(params, e)
              + a * b * inner(d, e))) / 2 for a, b in grid]
  np.testing.assert_allclose(values(points), wanted, rtol=1e-13)


@pytest.mark.parametrize('axis', [-1, 0])
def test_filters_have_the_norms_of_the_weights(axis, x64):
  params = parameters(dtype='float64')
  d = landscape.random_direction(jax.random.key(3), params, filter_axis=axis)
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
  d = landscape.normalised(v, params, norm='layer')
  for got, tiny, w in ((d['out'], v['out'], params['out']),
                       (d['conv']['kernel'], v['conv']['kernel'],
                        params['conv']['kernel'])):
    ratio = np.linalg.norm(w) / np.linalg.norm(tiny)
    np.testing.assert_allclose(got, ratio * tiny, rtol=1e-13)
  assert not np.any(d['conv']['bias'])


def test_directions_are_gaussian_and_differ():
  params = {'w': jnp.ones((4000, 2))}
  d, e = (landscape.random_direction(jax.random.key(i), params)['w']
          for i in (0, 1))
  # All weights are 1: so is the variance of d, filter by filter.
  np.testing.assert_allclose(np.mean(np.square(d), axis=0), 1, rtol=1e-5)
  assert abs(float(np.mean(d))) < 0.05 and abs(float(np.mean(d * e))) < 0.05
  assert abs(float(np.mean(np.square(d) ** 2)) - 3) < 0.3
  again = landscape.random_direction(
      jax.random.key(0), {'w': 2 * jnp.ones((4000, 2))})['w']
  np.testing.assert_allclose(again, 2 * d, rtol=1e-6)


def test_zeros_stay_zeros():
  params = {'w': jnp.array([[1.0, 0.0], [2.0, 0.0]])}
  d = landscape.normalised({'w': jnp.array([[0.0, 1.0], [0.0, 1.0]])}, params)
  assert not np.any(d['w'])


def test_mask_chooses_leaves():
  params = parameters()
  d = landscape.random_direction(
      jax.random.key(0), params, mask=lambda path, leaf: path == 'out')
  assert np.any(d['out']) and not np.any(d['conv']['kernel'])


# A linear model of two classes, for which the worst case is known: every pixel
# goes epsilon against the sign of the difference of the two weight columns.


def linear(params, images):
  return images @ params['w'] + params['b']


def linear_problem(num=11):
  rng = np.random.default_rng(4)
  params = {'w': jnp.asarray(rng.standard_normal((6, 2))),
            'b': jnp.asarray(rng.standard_normal(2))}
  images = rng.uniform(0.2, 0.8, (num, 6))  # the box is out of reach
  return params, images, np.arange(num) % 2


def margins(params, images, labels):
  """z_y - z_other and what an attack takes off it, by NumPy."""
  sign = 1 - 2 * labels
  difference = np.asarray(params['w'][:, 0] - params['w'][:, 1])
  offset = float(params['b'][0] - params['b'][1])
  natural = sign * (images @ difference + offset)
  return natural, EPSILON * np.abs(difference).sum()


def linear_curve(params, direction, images, labels):
  measure = landscape.robust_measure(
      linear, THREAT, step_size=2 * EPSILON, num_steps=2)
  return landscape.evaluate_points(
      jax.random.key(0), measure, params, [direction], POINTS,
      (images, labels), batch_size=4)


def test_examples_are_made_afresh_at_every_point(x64):
  params, images, labels = linear_problem()
  d = landscape.random_direction(jax.random.key(7), params)
  points = linear_curve(params, d, images, labels)
  step = np.asarray(params['w'][:, 0] - params['w'][:, 1])
  fixed = images - EPSILON * np.sign(step) * (1 - 2 * labels)[:, None]
  for (alpha,), point in zip(POINTS, points, strict=True):
    moved = jax.tree.map(lambda w, e, a=alpha: w + a * e, params, d)
    natural, taken = margins(moved, images, labels)
    robust = natural - taken
    wanted = {
        'natural_loss': np.mean(np.log1p(np.exp(-natural))),
        'robust_loss': np.mean(np.log1p(np.exp(-robust))),
        'natural_accuracy': np.mean(natural > 0),
        'robust_accuracy': np.mean(robust > 0), 'nonfinite': 0}
    assert point.keys() == wanted.keys()
    for name, value in wanted.items():
      assert point[name] == pytest.approx(value, rel=1e-12), name
    # Those of w, kept fixed, would show a lower loss: this tells them apart.
    stale = np.mean(np.log1p(np.exp(-margins(moved, fixed, labels)[0])))
    if alpha == 0:
      assert stale == pytest.approx(point['robust_loss'], rel=1e-12)
    elif abs(alpha) == 1:
      assert stale < point['robust_loss'] - 0.01


def test_centre_is_the_model_itself():
  params, images, labels = linear_problem()
  d = landscape.random_direction(jax.random.key(7), params)
  points = linear_curve(params, d, images, labels)
  natural = np.mean(awp_jax.cross_entropy(linear(params, images), labels))
  assert points[2]['natural_loss'] == pytest.approx(float(natural), rel=1e-6)
  there = landscape.displaced(params, (d,), jnp.zeros(1))
  for leaf, own in zip(
      jax.tree.leaves(there), jax.tree.leaves(params), strict=True):
    assert np.asarray(leaf).tobytes() == np.asarray(own).tobytes()


def test_devices_change_nothing(x64):
  params, images, labels = linear_problem(num=21)
  d = landscape.random_direction(jax.random.key(7), params)
  measure = landscape.robust_measure(
      linear, THREAT, step_size=0.01, num_steps=1)  # the start shows
  one, eight = (
      landscape.evaluate_points(
          jax.random.key(0), measure, params, [d], POINTS, (images, labels),
          batch_size=8, devices=devices)
      for devices in (None, jax.devices()))
  assert len(jax.devices()) == 8
  for a, b in zip(one, eight, strict=True):
    assert a == pytest.approx(b, rel=1e-12)


def test_compiles_once_for_all_points_and_directions():
  params, images, labels = linear_problem()
  traced = 0

  def measure(params, batch, key):
    nonlocal traced
    traced += 1
    del key
    return {'loss': awp_jax.cross_entropy(linear(params, batch[0]), batch[1])}

  heard = []
  for seed in range(2):
    d = landscape.random_direction(jax.random.key(seed), params)
    landscape.evaluate_points(
        jax.random.key(0), measure, params, [d], POINTS, (images, labels),
        batch_size=4, progress=lambda *point: heard.append(point))
  landscape.evaluate_points(
      jax.random.key(0), measure, params, [d, d], [[0, 1], [1, 0]],
      (images, labels), batch_size=4)
  assert traced == 1
  assert [number for number, _ in heard] == [*range(5)] * 2


def test_examples_stay_on_the_host(monkeypatch):
  """However many there are, two batches at most lie on the device."""
  examples = np.arange(40 * 7, dtype=np.float32).reshape(40, 7)
  put, wait, alive, waits = jax.device_put, jax.block_until_ready, [], []

  def device_put(tree, *args, **kwargs):
    found = put(tree, *args, **kwargs)
    alive.append(sum(x.shape == (4, 7) for x in jax.live_arrays()))
    return found

  def block_until_ready(tree):
    waits.append(len(alive))
    return wait(tree)

  monkeypatch.setattr(jax, 'device_put', device_put)
  monkeypatch.setattr(jax, 'block_until_ready', block_until_ready)
  points = landscape.evaluate_points(
      jax.random.key(0), sum_of_batch, {'w': jnp.ones((2, 2))},
      [{'w': jnp.ones((2, 2))}], [[0.0], [1.0]], examples, batch_size=4)
  mean = examples.astype(np.float64).sum(axis=1).mean()
  assert [p['sum'] for p in points] == pytest.approx([4 * mean, 8 * mean])
  assert len(alive) >= 20 and 1 <= max(alive) <= 2, alive
  # A slow device keeps what is sent to it: the host waits from batch to batch.
  assert len(waits) == 2 * 9 and max(np.diff(waits)) <= 3, waits


def sum_of_batch(params, batch, key):
  del key
  return {'sum': batch.sum(axis=1) * params['w'].sum()}


def test_logits_that_are_not_finite_are_never_right():
  images = jnp.array([[0.2], [0.8], [0.4]])

  def logits_fn(params, x):
    good = jnp.concatenate([jnp.ones_like(x), jnp.zeros_like(x)], axis=1)
    # NaN at the second image, and wherever the third one is moved.
    is_bad = (x > 0.5) | ((x > 0.3) & (x != 0.4))
    return jnp.where(is_bad, jnp.nan, good) * params

  measure = landscape.robust_measure(
      logits_fn, awp_jax.ThreatModel('Linf', 0.05), step_size=0.05, num_steps=1)
  found = measure(
      jnp.float32(1), (images, jnp.zeros(3, int)), jax.random.key(0))
  np.testing.assert_array_equal(found['natural_accuracy'], [True, False, True])
  np.testing.assert_array_equal(found['robust_accuracy'], [True, False, False])


def test_mean_rise():
  a = np.linspace(-2, 2, 9)
  assert awp_jax.mean_rise(a, np.full(9, 3.0)) == 0
  assert awp_jax.mean_rise(a, 7 + np.abs(a)) == pytest.approx(1, rel=1e-14)
  assert awp_jax.mean_rise(a, 7 + 5 * a) == pytest.approx(0, abs=1e-14)
  fine = np.linspace(-1, 2, 30001)
  # c (b^2 + ab + a^2) / 6
  assert awp_jax.mean_rise(fine, 4 * fine ** 2 / 2) == pytest.approx(
      4 * (4 - 2 + 1) / 6, rel=1e-7)
  assert np.isnan(awp_jax.mean_rise([-1, 0, 1], [np.nan, 0, 1]))


@pytest.mark.parametrize('alphas,losses,shown', [
    ([-1, 1], [0, 0], 'must have 0 among them'),
    ([0], [1], 'at least two rising numbers'),
    ([0, 1], [1], 'at least two rising numbers'),
    ([1, 0], [1, 2], 'at least two rising numbers')])
def test_mean_rise_refuses(alphas, losses, shown):
  with pytest.raises(ValueError, match=shown):
    awp_jax.mean_rise(alphas, losses)


@pytest.mark.parametrize('changes,shown', [
    ({'points': np.zeros((0, 1))}, r'P >= 1.* got shape \(0, 1\)'),
    ({'points': [[0.0, 1.0]]}, r'\[P, 1\]'),
    ({'points': [0.0]}, r'got shape \(1,\)'),
    ({'points': [[np.nan]]}, 'points must be finite'),
    ({'directions': []}, 'at least one direction'),
    ({'directions': [{'w': 1}]}, 'a pytree like the parameters'),
    ({'examples': np.zeros(0)}, 'first axis of at least 1'),
    ({'examples': (np.zeros(2), np.zeros(3))}, 'the same first axis'),
    ({'batch_size': 0}, 'batch_size must be a whole number >= 1, got 0'),
    ({'batch_size': 12, 'devices': True}, 'multiple of the 8 devices, got 12'),
])
def test_evaluate_points_refuses(changes, shown):
  params = parameters()
  fields = {
      'directions': [params], 'points': [[0.0]], 'examples': np.ones(3),
      'batch_size': 8} | changes
  if 'devices' in fields:
    fields['devices'] = jax.devices()
  with pytest.raises(ValueError, match=shown):
    landscape.evaluate_points(
        jax.random.key(0), quadratic, params, **fields)


def test_other_arguments_are_refused():
  params = parameters()
  with pytest.raises(ValueError, match=r"norm must be one of .* got 'weight'"):
    landscape.random_direction(jax.random.key(0), params, norm='weight')
  with pytest.raises(ValueError, match='direction must be a pytree like'):
    landscape.normalised({'w': jnp.ones(2)}, params)
  with pytest.raises(ValueError, match=r'step_size must be .* got -1'):
    landscape.robust_measure(linear, THREAT, step_size=-1, num_steps=1)
  with pytest.raises(ValueError, match=r'num_steps must be .* got 0'):
    landscape.robust_measure(linear, THREAT, step_size=1, num_steps=0)


def test_nan_gradients_are_counted():
  params, images, labels = linear_problem()

  def with_nan_gradient(params, x):
    return linear(params, x) + jnp.sqrt(0 * x[:, :1])

  found = []
  for logits_fn in (linear, with_nan_gradient):
    measure = landscape.robust_measure(
        logits_fn, THREAT, step_size=EPSILON, num_steps=2)
    found.append(measure(params, (images, labels), jax.random.key(0)))
  assert not found[0]['nonfinite'].any() and found[1]['nonfinite'].all()


def test_measures_in_float32():
  params, images, labels = linear_problem()
  measure = landscape.robust_measure(
      linear, THREAT, step_size=EPSILON / 4, num_steps=4, start='zero')
  text = str(jax.make_jaxpr(measure)(
      params, (images, labels), jax.random.key(0)))
  assert text.count('dot_general[') >= 3
  assert text.count('Precision.HIGHEST, Precision.HIGHEST') + text.count(
      'precision=HIGHEST') == text.count('dot_general[')
  half = images.astype(jnp.bfloat16)
  for got, wanted in zip(*(
      measure(params, (x, labels), jax.random.key(0)).values()
      for x in (half, half.astype(jnp.float32))), strict=True):
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('norm', ['filter', 'layer'])
def test_stacked_layers_have_norms_of_their_own(norm):
  rng = np.random.default_rng(0)
  w, d = (jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
          for _ in range(2))
  params = {'layers/kernel': w, 'layers/gain': w[:, 0]}
  direction = {'layers/kernel': d, 'layers/gain': d[:, 0]}
  whole = landscape.normalised(direction, params, norm=norm, stack_axes=1)
  assert not np.any(whole['layers/gain'])  # [L, D]: a vector in each layer
  for layer in range(2):
    alone = landscape.normalised(
        {'kernel': d[layer]}, {'kernel': w[layer]}, norm=norm)
    np.testing.assert_allclose(
        whole['layers/kernel'][layer], alone['kernel'], rtol=1e-6)


def test_batches_draw_for_themselves_and_points_alike():

  def measure(params, batch, key):
    del params
    draws = jax.random.uniform(key, batch.shape)
    return {str(turn): draws * (batch == turn) for turn in range(2)}

  points = landscape.evaluate_points(
      jax.random.key(0), measure, {'w': jnp.ones((2, 2))},
      [{'w': jnp.ones((2, 2))}], [[0.0], [1.0]], np.repeat([0, 1], 4),
      batch_size=4)
  assert points[0] == points[1]
  assert abs(points[0]['0'] - points[0]['1']) > 1e-3
