"""Losses at points and the rise of curves, against closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import landscape
from tests.helpers.landscape_problem import (
    POINTS,
    THREAT,
    linear,
    linear_curve,
    linear_problem,
    parameters,
    quadratic,
)


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


def test_center_is_the_model_itself():
  params, images, labels = linear_problem()
  d = landscape.random_direction(jax.random.key(7), params)
  points = linear_curve(params, d, images, labels)
  natural = np.mean(awp_jax.cross_entropy(linear(params, images), labels))
  assert points[2]['natural_loss'] == pytest.approx(float(natural), rel=1e-6)
  displaced = landscape.displaced(params, (d,), jnp.zeros(1))
  for leaf, own in zip(
      jax.tree.leaves(displaced), jax.tree.leaves(params), strict=True):
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
  chex.clear_trace_counter()

  @chex.assert_max_traces(n=1)
  def measure(params, batch, key):
    del key
    return {'loss': awp_jax.cross_entropy(linear(params, batch[0]), batch[1])}

  reported = []
  for seed in range(2):
    d = landscape.random_direction(jax.random.key(seed), params)
    landscape.evaluate_points(
        jax.random.key(0), measure, params, [d], POINTS, (images, labels),
        batch_size=4, progress=lambda *point: reported.append(point))
  landscape.evaluate_points(
      jax.random.key(0), measure, params, [d, d], [[0, 1], [1, 0]],
      (images, labels), batch_size=4)
  assert [number for number, _ in reported] == [*range(5)] * 2


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
    ([-1, 1], [0, 0], 'alphas must include 0'),
    ([0], [1], 'at least two increasing numbers'),
    ([0, 1], [1], 'at least two increasing numbers'),
    ([1, 0], [1, 2], 'at least two increasing numbers')])
def test_mean_rise_refuses(alphas, losses, shown):
  with pytest.raises(ValueError, match=shown):
    awp_jax.mean_rise(alphas, losses)


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
