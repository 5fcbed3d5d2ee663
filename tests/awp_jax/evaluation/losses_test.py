"""Losses of logits, gradients of models, signs of an unreliable evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.evaluation import diagnostics, losses, protocol, results
from awp_jax.evaluation import model as models

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def random_logits(count=12, classes=5):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(count, classes)).astype(np.float32)
  labels = rng.integers(classes, size=count)
  return logits, labels, (labels + rng.integers(1, classes, count)) % classes


def test_losses_by_their_formulas():
  logits, labels, targets = random_logits()
  expected = {name: [] for name in ('difference', 'dlr', 'targeted', 'margin')}
  for z, y, t in zip(logits, labels, targets, strict=True):
    down = sorted(z, reverse=True)
    best = max(v for k, v in enumerate(z) if k != y)
    expected['difference'].append(z[t] - z[y])
    expected['margin'].append(best - z[y])
    expected['dlr'].append((best - z[y]) / (down[0] - down[2] + 1e-12))
    expected['targeted'].append(
        (z[t] - z[y]) / (down[0] - (down[2] + down[3]) / 2 + 1e-12))
  ours = {
      'difference': losses.difference(logits, labels, targets),
      'dlr': losses.dlr(logits, labels),
      'targeted': losses.targeted_dlr(logits, labels, targets)}
  for name, values in ours.items():
    np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6)
  functions = losses.loss_functions(5)
  assert len(functions) == len(losses.LOSSES)
  cross_entropy = [
      np.log(np.exp(z).sum()) - z[y]
      for z, y in zip(logits, labels, strict=True)]
  named = dict(zip(losses.LOSSES, functions, strict=True))
  for name, values in (
      ('ce', cross_entropy), ('margin', expected['margin']),
      ('difference', expected['difference']), ('dlr', expected['dlr']),
      ('dlr-targeted', expected['targeted'])):
    np.testing.assert_allclose(
        named[name](logits, labels, targets), values, rtol=1e-5, atol=1e-6)


def test_dlr_of_equal_logits_is_zero():
  equal = jnp.ones((2, 4))
  np.testing.assert_array_equal(losses.dlr(equal, jnp.array([0, 3])), 0)
  np.testing.assert_array_equal(
      losses.targeted_dlr(equal, jnp.array([0, 3]), jnp.array([1, 1])), 0)


def test_few_classes_have_fewer_losses():
  assert [len(losses.loss_functions(c)) for c in (2, 3, 4, 5)] == [
      3, 4, 5, 5]


def test_misclassified():
  logits = jnp.asarray([
      [2.0, 1, 0], [1, 2, 0], [jnp.nan, 1, 0], [5, jnp.inf, 0],
      [5, -jnp.inf, 0], [5, 1, jnp.nan]])
  np.testing.assert_array_equal(
      models.misclassified(logits, jnp.zeros(6, int)),
      [False, True, True, True, True, True])


def linear_gradients(name, weights, x, labels, targets):
  """Gradient of a loss of x @ W, from the gradient with respect to logits."""
  z = x @ weights
  rows = np.arange(len(x))
  slope = np.zeros_like(z)
  if name == 'ce':
    slope = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  else:
    others = z.copy()
    others[rows, labels] = -np.inf
    slope[rows, targets if name == 'difference' else others.argmax(-1)] = 1
  slope[rows, labels] -= 1
  return slope @ weights.T


@pytest.fixture(scope='module')
def linear_model():
  rng = np.random.default_rng(1)
  weights = rng.normal(size=(6, 5)).astype(np.float32)
  return weights, models.make_model(lambda x: x @ weights, 5)


@pytest.mark.parametrize('name', ('ce', 'margin', 'difference'))
def test_gradients_of_a_linear_model(name, linear_model):
  weights, model = linear_model
  _, labels, targets = random_logits()
  x = np.random.default_rng(2).normal(size=(12, 6)).astype(np.float32)
  keys = jax.random.split(jax.random.key(0), 12)
  seen = model.gradients(name, x, jnp.asarray(labels), jnp.asarray(targets),
                         keys)
  np.testing.assert_allclose(
      seen.gradient, linear_gradients(name, weights, x, labels, targets),
      atol=1e-5)
  np.testing.assert_array_equal(
      seen.broken, (x @ weights).argmax(-1) != labels)
  assert not seen.nonfinite.any()
  np.testing.assert_allclose(model.logits(x, keys), x @ weights, atol=1e-5)


def test_entries_that_are_not_finite_become_zero():
  # d sqrt(u) is infinite at u = 0; the first row has one such entry.
  model = models.make_model(
      lambda x: jnp.stack([jnp.sum(jnp.sqrt(x), -1), 0 * x[:, 0]], -1), 2)
  x = jnp.asarray([[0.0, 0.25], [1.0, 0.25]])
  seen = model.gradients(
      'margin', x, jnp.zeros(2, int), jnp.ones(2, int),
      jax.random.split(jax.random.key(0), 2))
  np.testing.assert_allclose(seen.gradient, [[0, -1], [-0.5, -1]], atol=1e-6)
  np.testing.assert_array_equal(seen.nonfinite, [True, False])


def test_losses_that_are_nan_are_the_smallest():
  model = models.make_model(lambda x: x, 2)
  seen = model.gradients(
      'ce', jnp.asarray([[jnp.nan, 0.0], [1.0, 0.0]]), jnp.zeros(2, int),
      jnp.ones(2, int), jax.random.split(jax.random.key(0), 2))
  assert seen.losses[0] == -jnp.inf and np.isfinite(seen.losses[1])
  np.testing.assert_array_equal(seen.broken, [True, False])


def test_gradients_are_averaged_over_draws():
  # The margin of x u with a draw u per image: its gradient is u.
  def logits_fn(x, key):
    margin = x[:, 0] * jax.random.uniform(key, x.shape[:1])
    return jnp.stack([-margin, 0 * margin], -1)

  model = models.make_model(logits_fn, 2, takes_key=True)
  keys = jax.random.split(jax.random.key(5), 3)
  x, labels = jnp.ones((3, 1)), jnp.zeros(3, int)
  draws = np.asarray([
      [jax.random.uniform(jax.random.fold_in(key, turn), (1,))[0]
       for turn in range(4)] for key in keys])
  averaged = models.average_gradients(model, 4)
  seen = averaged.gradients('margin', x, labels, labels + 1, keys)
  np.testing.assert_allclose(seen.gradient[:, 0], draws.mean(-1), rtol=1e-5)
  np.testing.assert_allclose(seen.losses, draws[:, -1], rtol=1e-5)
  assert models.average_gradients(model, 1) is model


def test_a_flag_of_one_draw_is_a_flag():
  def gradients(loss, images, labels, targets, keys):
    odd = jax.random.key_data(keys)[:, 0] % 2 == 0
    return models.Gradients(
        images, jnp.zeros(labels.shape), labels > 0, odd)

  model = models.Model(lambda x, k: x, gradients, 2)
  keys = jax.random.split(jax.random.key(0), 2)
  seen = models.average_gradients(model, 8).gradients(
      'ce', jnp.zeros((2, 1)), jnp.zeros(2, int), jnp.zeros(2, int), keys)
  assert seen.nonfinite.all()
  flag = jnp.array([True])
  assert models.either(None, None) is None
  assert models.either(flag, None) is models.either(None, flag) is flag
  assert not models.either(~flag, ~flag)[0] and models.either(flag, ~flag)[0]


SPEC = protocol.AttackSpec('square', None, num_targets=3, min_classes=4)


@pytest.mark.parametrize('anomalies, kinds', (
    (results.Anomalies(), []), (results.Anomalies(refused=5), []),
    (results.Anomalies(2, 3, 4, 5, 6),
     [('zero-gradients', 2), ('non-finite-gradient', 3), ('non-finite', 4),
      ('outside', 5)])))
def test_warnings_after_an_attack(anomalies, kinds):
  found = diagnostics.after_attack(SPEC, anomalies, 0.002, True)
  assert [(w.kind, w.num_examples) for w in found] == kinds
  assert all(w.attack == 'square' for w in found)


@pytest.mark.parametrize('name, gain, any_white_box, warned', (
    ('square', 0.0021, True, True), ('square', 0.002, True, False),
    ('square', 0.5, False, False), ('fab', 0.5, True, False)))
def test_square_may_gain_little(name, gain, any_white_box, warned):
  found = diagnostics.after_attack(
      SPEC._replace(name=name), results.Anomalies(), gain, any_white_box)
  assert [w.kind for w in found] == ['square-stronger'] * warned


@pytest.mark.parametrize('classes, parts', (
    (3, ('needs 4 classes', '2 target classes')), (4, ()),
    (2, ('needs 4 classes', '1 target classes'))))
def test_warnings_of_few_classes(classes, parts):
  found = diagnostics.check_classes([SPEC], classes)
  assert len(found) == bool(parts)
  for part in parts:
    assert part in found[0].message


def test_logits_that_are_probabilities_or_not_finite():
  fine = np.array([[0.2, 0.8], [1.0, 0.0]])
  assert diagnostics.check_logits(fine) == (0, True)
  assert diagnostics.check_logits(fine * (1 + 1e-4)) == (0, False)
  assert diagnostics.check_logits(
      np.array([[1.5, -0.5], [0.5, 0.5]])) == (0, False)
  odd = np.array([[np.nan, 1], [0.5, 0.5], [np.inf, 0]])
  assert diagnostics.check_logits(odd) == (2, True)
  assert diagnostics.check_logits(odd[:1]) == (1, False)


def test_anomalies_add_up():
  one = results.Anomalies(1, 2, 3, 4, 5)
  assert one.plus(results.Anomalies(10, 20, 30, 40, 50)) == (
      11, 22, 33, 44, 55)
  assert results.Anomalies() == (0, 0, 0, 0, 0)


def test_batch_dependence_needs_more_than_rounding():
  images = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  for scale, warned in ((0.0, 0), (1e-5, 0), (0.1, 1)):
    found = diagnostics.check_batch_dependence(
        lambda x, scale=scale: x + scale * jnp.mean(x), images, jnp.asarray)
    assert len(found) == warned
    if found:
      assert found[0].kind == 'batch-dependent'
      assert 0 < found[0].num_examples <= 4


@pytest.mark.parametrize('arguments, message', [
    ((1, 0), '^count must be .* got 0'),
    ((-1, 3), '^successes must be .* got -1'),
    ((4, 3), 'at most count, got 4 of 3'), ((1, 3, 1.0), 'level .* got 1.0'),
    ((1, 3, 0.0), 'level .* got 0.0')])
def test_bad_fractions(arguments, message):
  with pytest.raises(ValueError, match=message):
    awp_jax.confidence_interval(*arguments)


def test_interval_of_95_per_cent_and_records_of_plain_values():
  assert awp_jax.confidence_interval(5, 9) == awp_jax.confidence_interval(
      5, 9, 0.95)
  # Exactly, though in floats the formula exceeds 1 here.
  assert awp_jax.confidence_interval(9, 9)[1] == 1
  record = awp_jax.BatchResult(
      'a', np.arange(2), np.zeros(2, bool), np.zeros((0, 1)), np.zeros(0),
      results.Anomalies(1, 2, 3, 4, 5), 1.5, 'hash')
  again = awp_jax.BatchResult.from_arrays(record.to_arrays())
  assert [type(value) for value in (
      again.attack, again.seconds, again.identity)] == [str, float, str]
  assert (again.attack, again.seconds, again.anomalies, again.identity) == (
      'a', 1.5, results.Anomalies(1, 2, 3, 4, 5), 'hash')
