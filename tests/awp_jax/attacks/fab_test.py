"""FAB and its projections, step by step, against formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import fab, hyperplanes
from awp_jax.evaluation import model as models
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles

NORMS = ('Linf', 'L2', 'L1')
ORDER = {'Linf': np.inf, 'L2': 2, 'L1': 1}
DUAL = {'Linf': 1, 'L2': 2, 'L1': np.inf}


def shortest_way(point, normal, offset, norm, lower=0.0, upper=1.0):
  """To the hyperplane inside the box, one example, from the conditions of KKT.

  L_inf and L_2: s_i = min(l pace_i, room_i), with l found by bisection.
  L_1: a fractional knapsack.
  """
  gap = normal @ point - offset
  against = -np.sign(gap) * np.sign(normal)
  room = np.where(against > 0, upper - point, point - lower)
  weight = np.abs(normal)
  if weight @ room <= abs(gap):
    return against * room
  if norm == 'L1':
    moved, missing = np.zeros_like(point), abs(gap)
    for i in sorted(range(point.size), key=lambda i: -weight[i]):
      moved[i] = min(room[i], missing / weight[i])
      missing = max(missing - moved[i] * weight[i], 0)
      if not missing:
        break
    return against * moved
  pace = weight if norm == 'L2' else np.ones_like(weight)
  low, high = 0.0, 1e6
  for _ in range(300):
    middle = (low + high) / 2
    if weight @ np.minimum(middle * pace, room) < abs(gap):
      low = middle
    else:
      high = middle
  return against * np.minimum(high * pace, room)


def step_of(x, image, value, gradient, norm, lower=0.0, upper=1.0):
  """The published step from x, given the linearised boundary there."""
  offset = gradient @ x - value
  ours = shortest_way(x, gradient, offset, norm, lower, upper)
  theirs = shortest_way(image, gradient, offset, norm, lower, upper)
  lengths = [max(np.linalg.norm(d, ORDER[norm]), 1e-8) for d in (ours, theirs)]
  bias = min(lengths[0] / sum(lengths), 0.1)
  return np.clip(
      (1 - bias) * (x + 1.05 * ours) + bias * (image + 1.05 * theirs),
      lower, upper), bias


@pytest.mark.parametrize('norm', NORMS)
def test_projections(norm, x64):
  rng = np.random.default_rng(0)
  lower, upper = -1.0, 2.0
  points = rng.uniform(lower, upper, size=(40, 12))
  points[:10, :6] = upper  # without room on one side
  points[10:15, :6] = lower
  normals = rng.normal(size=(40, 12)) * np.exp(rng.normal(size=(40, 1)) * 4)
  normals[::3, ::4] = 0
  reached = rng.uniform(lower, upper, size=(40, 12))
  offsets = np.sum(normals * reached, -1)
  offsets[30:] += 30 * np.abs(normals[30:]).sum(-1) * np.where(
      np.arange(10) % 2, 1, -1)  # further than the box
  ours = np.asarray(hyperplanes.project(
      jnp.asarray(points), jnp.asarray(normals), jnp.asarray(offsets), norm,
      lower, upper))
  expected = np.stack([
      shortest_way(*row, norm, lower, upper)
      for row in zip(points, normals, offsets, strict=True)])
  np.testing.assert_allclose(ours, expected, atol=2e-5)
  assert (points + ours >= lower - 1e-12).all()
  assert (points + ours <= upper + 1e-12).all()
  missing = np.abs(np.sum(normals * (points + ours), -1) - offsets)[:30]
  # As far as it counts as arrived: a millionth of the way.
  away = np.abs(np.sum(normals * points, -1) - offsets)[:30]
  assert (missing <= 1e-6 * away * (1 + 1e-6)).all()
  # Points of the hyperplane stay.
  on = hyperplanes.project(
      jnp.asarray(reached), jnp.asarray(normals),
      jnp.asarray(np.sum(normals * reached, -1)), norm, lower, upper)
  np.testing.assert_allclose(on, 0, atol=1e-12)


def test_projections_that_miss_by_more_than_a_millionth_go_on(x64):
  # Half of the way exceeds the room of the second entry by 1.5e-6 of the way,
  # which the first entry adds.
  way, room = 0.008, 0.004 - 1.5e-6 * 0.008
  step = hyperplanes.project(
      jnp.array([[0.0, 1 - room]]), jnp.ones((1, 2)),
      jnp.array([1 - room + way]), 'Linf')
  np.testing.assert_allclose(step, [[way - room, room]], atol=1e-12)


@pytest.mark.parametrize('norm', NORMS)
def test_approach(norm, x64):
  rng = np.random.default_rng(1)
  lower, upper = -0.5, 1.5
  images = rng.uniform(0, 1, size=(12, 3, 4))
  x = images + rng.normal(size=images.shape) * 0.05
  gradients = rng.normal(size=images.shape)
  gradients[-1] = 0
  # From points on the boundary, where the bias is small, to ones far away.
  values = np.linspace(-4, 3, 12)
  values[3:6] *= 1e-2
  ours = np.asarray(fab.approach(
      jnp.asarray(x), jnp.asarray(images), jnp.asarray(values),
      jnp.asarray(gradients), ThreatModel(norm, 0.1, lower, upper)))
  pairs = [
      step_of(x[i].ravel(), images[i].ravel(), values[i], gradients[i].ravel(),
              norm, lower, upper) for i in range(12)]
  np.testing.assert_allclose(
      ours.reshape(12, -1), [point for point, _ in pairs], atol=2e-6)
  biases = np.asarray([bias for _, bias in pairs])
  assert (biases == 0.1).any() and (biases < 0.09).any()


@functools.cache
def linear():
  """A linear model of four classes, its weights, images, and right labels."""
  rng = np.random.default_rng(2)
  weights = rng.normal(size=(12, 4)) * np.exp(rng.normal(size=(12, 4)))
  images = rng.uniform(0.3, 0.7, size=(6, 12))
  labels = (images @ weights).argmax(-1)
  return models.make_model(lambda x: x @ weights, 4), weights, images, labels


@pytest.mark.parametrize('norm', NORMS)
def test_untargeted_goes_to_the_boundary_nearest_in_the_dual_norm(norm, x64):
  model, weights, images, labels = linear()
  logits = images @ weights
  batch = attack_oracles.examples(images, labels)
  _, reports = attack_oracles.iterate(
      fab.fab_spec('fab', targeted=False), model, ThreatModel(norm, 1e-3),
      batch, 1)
  chosen = []
  for i, label in enumerate(labels):
    distance = [
        np.inf if k == label else (logits[i, label] - logits[i, k])
        / np.linalg.norm(weights[:, k] - weights[:, label], DUAL[norm])
        for k in range(4)]
    chosen.append(int(np.argmin(distance)))
    gradient = weights[:, chosen[-1]] - weights[:, label]
    expected, _ = step_of(
        images[i], images[i],
        logits[i, chosen[-1]] - logits[i, label], gradient, norm)
    np.testing.assert_allclose(
        reports[0].candidates[i], expected, atol=1e-6)
  # Not simply the second likeliest class.
  second = np.argsort(-logits, -1)[:, 1]
  assert (np.asarray(chosen) != second).any()


@pytest.mark.parametrize('dtype, tolerance', (
    (jnp.float32, 1e-6), (jnp.float16, 1e-3)))
def test_the_nearest_boundary_of_one_example_depends_on_no_other(
    dtype, tolerance):
  # From the first example, class 1 begins 0.1 to the right and class 2 begins
  # 0.12 to the left. From the second, of class 1, the slope to class 2 is 7.
  def logits_fn(x):
    right = x[:, 0] - 0.5
    z = jnp.stack([0 * right, 4 * right - 0.4, -3 * right - 0.36], -1)
    return z.astype(dtype)

  images = np.float32([[0.5, 0.5], [0.9, 0.5]])
  _, reports = attack_oracles.iterate(
      fab.fab_spec('fab', targeted=False), models.make_model(logits_fn, 3),
      ThreatModel('L1', 0.01), attack_oracles.examples(images, [0, 1]), 1)
  np.testing.assert_allclose(
      reports[0].candidates, [[0.605, 0.5], [0.585, 0.5]], atol=tolerance)


def test_untargeted_asks_a_randomized_model_for_every_class():
  asked = []

  def gradients(loss, x, labels, targets, keys):
    asked.append((loss, targets.tolist()))
    # The gradient of the zero z_y - z_y counts for nothing.
    return models.Gradients(
        jnp.ones_like(x), -jnp.ones(2), jnp.zeros(2, bool),
        targets == jnp.asarray([2, 1]))

  model = models.Model(
      lambda x, keys: jnp.eye(2, 3), gradients, 3, takes_key=True)
  images = np.full((2, 2), 0.5, np.float32)
  _, reports = attack_oracles.iterate(
      fab.fab_spec('fab', targeted=False), model, ThreatModel('L1', 0.01),
      attack_oracles.examples(images, [0, 1]), 1)
  assert asked == [('difference', [k, k]) for k in range(3)]
  assert reports[0].nonfinite.tolist() == [True, False]


def test_targeted_takes_the_targets_in_turn(x64):
  model, weights, images, labels = linear()
  logits = images @ weights
  targets = np.argsort(-logits, -1)[:, 1:]
  runs = [0, 1, 2, 3, 4, 5]  # three targets, each twice
  batch = attack_oracles.examples(images, labels, targets, runs)
  attack, reports = attack_oracles.iterate(
      fab.fab_spec('fab-t', targeted=True, restarts=2, num_targets=9),
      model, ThreatModel('L2', 1e-9), batch, 1)
  assert attack.num_runs == 6  # three targets of four classes
  for i, run in enumerate(runs):
    target = targets[i, run // 2]
    # The second start is half a radius away: nowhere.
    expected, _ = step_of(
        images[i], images[i], logits[i, target] - logits[i, labels[i]],
        weights[:, target] - weights[:, labels[i]], 'L2')
    np.testing.assert_allclose(
        reports[0].candidates[i], expected, atol=1e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_starts_at_the_image_and_again_half_way_to_the_sphere(norm, x64):
  images = np.full((6, 20, 3), 0.5)
  threat = ThreatModel(norm, 0.1)
  runs = np.arange(6)
  state = fab.start(
      attack_oracles.examples(images, runs=runs), threat, restarts=3)
  delta = np.asarray(state.x) - images
  again = runs % 3 > 0
  np.testing.assert_allclose(
      threat.distance(state.x, images), np.where(again, 0.05, 0), rtol=1e-12)
  flat = delta[again].reshape(4, -1)
  assert (np.mean(flat > 0, -1) > 0.25).all()
  assert (np.mean(flat < 0, -1) > 0.25).all()
  assert abs(np.mean(flat > 0) - 0.5) < 0.1  # three standard errors
  assert len(np.unique(flat, axis=0)) == 4
  if norm == 'Linf':
    assert (np.mean(np.abs(flat) > 0.025, -1) > 0.25).all()
  assert (np.asarray(state.time) == 0).all()


def test_checks_the_ball_and_moves_back(x64):
  images = np.full((4, 2), 0.5)
  threat = ThreatModel('Linf', 0.125)
  x = images + np.array([[0.1, 0], [0.125, 0], [0.2, 0], [0.1, 0]])
  logits = np.array([[0, 1.0], [0, 1.0], [0, 1.0], [1.0, 0]])
  batch = attack_oracles.examples(images, [0, 0, 0, 0])
  boundary = fab._Boundary(
      jnp.zeros(4), jnp.asarray([[0.0, 0], [0, 1], [1, 1], [0, 0]]),
      jnp.zeros(4), jnp.asarray([False, False, True, False]))
  state = fab.FABState(
      jnp.asarray(images), jnp.asarray([0, 0, 8, 9], jnp.int32))
  after, report = fab.advance(
      state, jnp.asarray(x), jnp.asarray(logits), boundary, batch, threat, 10)
  assert report.broken.tolist() == [True, True, False, False]
  assert report.finished.tolist() == [False, False, False, True]
  assert report.zero_gradient.tolist() == [True, False, False, False]
  assert report.nonfinite.tolist() == [False, False, True, False]
  assert after.time.tolist() == [1, 1, 9, 10]
  expected = images + (x - images) * [[0.9], [0.9], [0.9], [1.0]]
  np.testing.assert_allclose(after.x, expected, rtol=1e-12)
  np.testing.assert_array_equal(report.candidates, x)


@pytest.mark.parametrize('targeted', (False, True))
def test_a_step_makes_two_forward_passes(targeted):
  # One with the gradients of all classes, one at the new point.
  passes = []

  def logits_fn(x):
    jax.debug.callback(lambda: passes.append(1))
    return x @ jnp.eye(4, 7)

  images = np.full((3, 4), 0.5, np.float32) + np.eye(3, 4) * np.float32(0.1)
  model = models.make_model(logits_fn, 7)
  batch = attack_oracles.examples(images, [0, 1, 2], np.full((3, 1), 3))
  attack_oracles.iterate(
      fab.fab_spec('fab', targeted=targeted), model, ThreatModel('L2', 0.01),
      batch, 3)
  jax.effects_barrier()
  assert len(passes) == 6


def test_gradients_that_are_not_finite_are_reported_and_taken_for_0():
  def logits_fn(x):
    # The square root of 0 has no gradient.
    return jnp.stack([x[:, 0], x[:, 1] + jnp.sqrt(x[:, 2])], -1)

  images = np.float32([[0.6, 0.5, 0.0], [0.6, 0.3, 0.04]])
  for targeted in (False, True):
    _, reports = attack_oracles.iterate(
        fab.fab_spec('fab', targeted=targeted), models.make_model(logits_fn, 2),
        ThreatModel('L2', 0.3), attack_oracles.examples(
            images, [0, 0], np.ones((2, 1), np.int32)), 1)
    assert reports[0].nonfinite.tolist() == [True, False]
    moved = reports[0].candidates - images
    np.testing.assert_allclose(
        moved[0], [-0.0525, 0.0525, 0], rtol=1e-5, atol=1e-7)
    assert np.isfinite(reports[0].candidates).all()


def test_no_step_goes_to_a_class_with_a_logit_that_is_not_finite():
  def logits_fn(x):
    return jnp.stack(
        [x[:, 0], jnp.where(x[:, 2] < 0.2, -jnp.inf, x[:, 1]),
         jnp.where(x[:, 2] < 0.1, -jnp.inf, x[:, 1] - 0.1)], -1)

  images = np.float32([[0.6, 0.5, last] for last in (0, 0.15, 0.3)])
  batch = attack_oracles.examples(
      images, [0, 0, 0], np.ones((3, 1), np.int32))
  none, near, far = [0, 0, 0], [-0.0525, 0.0525, 0], [-0.105, 0.105, 0]
  for targeted, second in ((True, none), (False, far)):
    _, reports = attack_oracles.iterate(
        fab.fab_spec('fab', targeted=targeted), models.make_model(logits_fn, 3),
        ThreatModel('L2', 0.3), batch, 1)
    np.testing.assert_allclose(
        reports[0].candidates - images, [none, second, near], atol=1e-6)
    assert reports[0].zero_gradient.tolist() == [True, targeted, False]


@pytest.mark.parametrize('name', ('num_steps', 'restarts', 'num_targets'))
def test_bad_settings(name):
  message = f'^{name} must be a whole number >= 1, got 0'
  with pytest.raises(ValueError, match=message):
    fab.fab_spec('fab', targeted=True, **{name: 0})
