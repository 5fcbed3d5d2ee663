"""Curves over epsilon and smallest perturbations, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.measures import minimal

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(12, 4)).astype(np.float32)
X = RNG.uniform(0.3, 0.7, (40, 12)).astype(np.float32)
Y = np.argmax(X @ W, axis=1)
Y[:4] = (Y[:4] + 1) % 4  # misclassified

ORDERS = {'Linf': 1, 'L2': 2, 'L1': np.inf}  # of the dual norms


def logits_fn(x):
  return x @ W


def closed_form(norm):
  """min_k (z_y - z_k) / |w_y - w_k|_dual; the box is far away."""
  z = X @ W
  found = np.full(len(X), np.inf)
  for i, label in enumerate(Y):
    for k in range(4):
      if k != label:
        slope = np.linalg.norm(W[:, label] - W[:, k], ord=ORDERS[norm])
        found[i] = min(found[i], (z[i, label] - z[i, k]) / slope)
  return np.maximum(found, 0)


def distance(norm, x):
  return {'Linf': np.abs(x - X).max(1), 'L1': np.abs(x - X).sum(1),
          'L2': np.sqrt(((x - X) ** 2).sum(1))}[norm]


@pytest.mark.parametrize('norm', ORDERS)
@pytest.mark.parametrize('targeted', [True, False])
def test_minimal_perturbations_of_a_linear_model(norm, targeted):
  exact = closed_form(norm)
  found = awp_jax.minimal_perturbations(
      KEY, logits_fn, X, Y, norm, num_steps=30, targeted=targeted,
      lower=-9.0, upper=9.0, batch_size=16)
  np.testing.assert_array_equal(found.natural, exact > 0)
  assert not found.distances[:4].any()
  np.testing.assert_allclose(found.distances, exact, rtol=2e-3, atol=1e-5)
  assert (found.distances >= exact - 1e-5).all()
  # The points are there, at these distances, and misclassified.
  np.testing.assert_allclose(
      distance(norm, found.adversarial), found.distances, atol=1e-5)
  z = found.adversarial.astype(np.float64) @ W
  own = z[np.arange(40), Y]
  z[np.arange(40), Y] = -np.inf
  assert (z.max(1) - own > -1e-5).all()


def test_a_box_that_binds():
  """Near the border the smallest perturbation is larger than without a box."""
  x = np.array([[0.95, 0.5]], np.float32)

  def fn(x):
    return 9 * jnp.stack([x[:, 0] + x[:, 1] - 1.6, 0 * x[:, 0]], 1)

  found = awp_jax.minimal_perturbations(
      KEY, fn, x, np.array([1]), 'Linf', num_steps=50)
  # x_0 can rise by 0.05 only, so x_1 rises by 0.1.
  np.testing.assert_allclose(found.distances, [0.1], rtol=5e-3)
  assert found.adversarial.max() <= 1


def test_nothing_is_found_for_a_constant_model():

  def fn(x):
    return jnp.zeros((len(x), 1)) + jnp.array([1.0, 0.0])

  found = awp_jax.minimal_perturbations(
      KEY, fn, X, np.zeros(40, int), 'L2', num_steps=3)
  assert np.isinf(found.distances).all() and found.natural.all()
  np.testing.assert_array_equal(found.adversarial, X)


def test_bisection_finds_what_fab_passes(monkeypatch):
  """A step in the logits, which no linearization sees."""
  edge = 0.123456

  def fn(x):
    return jnp.stack(
        [x[:, 0], jnp.where(x[:, 0] < 0.5 - edge, 1e3, -x[:, 0])], 1)

  x, y = np.full((1, 1), 0.5, np.float32), np.zeros(1, int)
  found = awp_jax.minimal_perturbations(KEY, fn, x, y, 'Linf', num_steps=20)
  np.testing.assert_allclose(found.distances, [edge], rtol=1e-4)
  monkeypatch.setattr(minimal, '_bisect', lambda model, threat, e, best: best)
  coarse = awp_jax.minimal_perturbations(KEY, fn, x, y, 'Linf', num_steps=20)
  assert coarse.distances[0] > 1.001 * edge


@pytest.mark.parametrize('change, shown', [
    ({'norm': 'L3'}, "norm must be one of 'Linf', 'L2', 'L1'"),
    ({'labels': np.zeros(39, int)}, 'labels must have shape'),
    ({'labels': np.full(40, 4)}, 'labels must be in'),
    ({'images': X * 5}, 'images must be in'),
    ({'images': (X * 255).astype(np.uint8)}, 'must be floating point'),
    ({'num_steps': 0}, 'num_steps must be'),
    ({'num_targets': 0}, 'num_targets must be'),
    ({'lower': 1.0, 'upper': 0.0}, 'lower must be below upper'),
    ({'batch_size': 0}, 'batch_size must be')])
def test_wrong_arguments_of_the_search(change, shown):
  given = {'images': X, 'labels': Y, 'norm': 'Linf'} | change
  with pytest.raises(ValueError, match=shown):
    awp_jax.minimal_perturbations(
        KEY, logits_fn, given.pop('images'), given.pop('labels'),
        given.pop('norm'), **given)


EPSILONS = (0.01, 0.03, 0.06, 0.1)


@pytest.fixture(scope='module')
def curve():
  return awp_jax.robust_curve(
      KEY, logits_fn, X, Y, 'Linf', EPSILONS, attacks=('apgd-ce',))


def test_the_curve_of_a_linear_model(curve):
  exact = closed_form('Linf')
  np.testing.assert_array_equal(curve.robust_accuracy, [
      np.mean(exact > epsilon) for epsilon in EPSILONS])
  np.testing.assert_array_equal(curve.natural, exact > 0)
  rises = np.array([*EPSILONS, np.inf])
  np.testing.assert_array_equal(curve.smallest_epsilon, np.where(
      exact > 0, rises[np.searchsorted(rises, exact)], 0))
  assert (np.diff(curve.robust_accuracy) <= 0).all()
  assert 0 < curve.robust_accuracy[-1] < curve.robust_accuracy[0] <= 0.9
  for share, (low, high) in zip(
      curve.robust_accuracy, curve.intervals, strict=True):
    assert (low, high) == awp_jax.confidence_interval(round(40 * share), 40)


@pytest.mark.parametrize('number', [0, 1, 3])
def test_the_curve_equals_separate_evaluations(curve, number):
  threat = awp_jax.ThreatModel('Linf', EPSILONS[number])
  alone = awp_jax.auto_attack(
      KEY, logits_fn, X, Y, threat, attacks=('apgd-ce',))
  assert alone.robust_accuracy == curve.robust_accuracy[number]
  np.testing.assert_array_equal(
      alone.robust, curve.smallest_epsilon > EPSILONS[number])


def test_only_survivors_are_attacked(curve):
  sizes = [len(result.robust) for result in curve.results]
  assert sizes == [40, *(round(40 * share)
                         for share in curve.robust_accuracy[:-1])]


def test_nothing_left_to_attack():
  found = awp_jax.robust_curve(
      KEY, logits_fn, X[:8], Y[:8], 'Linf', (5.0, 6.0), lower=-9, upper=9,
      attacks=('apgd-ce',))
  assert found.results[1] is None
  np.testing.assert_array_equal(found.robust_accuracy, [0, 0])
  np.testing.assert_array_equal(
      found.smallest_epsilon, [0] * 4 + [5.0] * 4)


def test_a_curve_resumes(tmp_path):
  """The second call attacks nothing."""
  seen = []
  options = awp_jax.EvalOptions(
      store=tmp_path, progress=lambda record: seen.append(record.attack))
  first, second = (awp_jax.robust_curve(
      KEY, logits_fn, X, Y, 'Linf', EPSILONS[:2], attacks=('apgd-ce',),
      options=options) for _ in range(2))
  assert seen == ['apgd-ce'] * 2
  np.testing.assert_array_equal(first.smallest_epsilon, second.smallest_epsilon)


@pytest.mark.parametrize('epsilons, shown', [
    ((), 'must rise'), ((0.1, 0.1), 'must rise'), ((0.2, 0.1), 'must rise'),
    ((0.0, 0.1), 'must be a finite number > 0'),
    (0.1, 'must be a sequence'), ('0.1', 'must be a sequence'),
    ((float('nan'),), 'must be a finite number > 0')])
def test_wrong_epsilons(epsilons, shown):
  with pytest.raises(ValueError, match=shown):
    awp_jax.robust_curve(KEY, logits_fn, X, Y, 'Linf', epsilons)


@pytest.mark.parametrize('labels, shown', [
    (Y[:20], 'labels must have shape'), (np.r_[Y, Y], 'labels must have shape'),
    (np.float32(Y), 'labels must be integers'), (Y + 4, 'labels must be in'),
    (np.int64(3), 'labels must have shape')])
def test_wrong_labels_of_a_curve(labels, shown):
  with pytest.raises(ValueError, match=shown):
    awp_jax.robust_curve(KEY, logits_fn, X, labels, 'Linf', (0.1,))


def test_every_broken_example_of_a_randomized_model_has_an_epsilon():
  """Also those whose natural image is misclassified at a later epsilon only."""
  def noisy(x, key):
    return logits_fn(x) + jax.random.normal(key, (len(x), 4))

  found = awp_jax.robust_curve(
      KEY, noisy, X, Y, 'Linf', (0.005, 0.01, 0.015), attacks=('apgd-ce',),
      options=awp_jax.EvalOptions(takes_key=True, check_model=False))
  assert np.mean(np.isinf(found.smallest_epsilon)) == found.robust_accuracy[-1]


def test_printed_lines_name_the_epsilon(capsys):
  awp_jax.robust_curve(
      KEY, logits_fn, X, Y, 'Linf', (0.05, 0.1), attacks=('apgd-ce',),
      options=awp_jax.EvalOptions(verbose=True))
  lines = [line for line in capsys.readouterr().out.splitlines()
           if line.startswith('epsilon')]
  assert lines[0] == 'epsilon 0.05, 40 of 40 examples left:'
  assert lines[1].startswith('epsilon 0.1, ')
