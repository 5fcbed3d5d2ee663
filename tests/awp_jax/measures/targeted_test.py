"""Targeted attacks against the closed form of a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.uniform(0.3, 0.7, (36, 12)).astype(np.float32)
W = RNG.normal(size=(12, 3)).astype(np.float32)
BIAS = -(X @ W).mean(0)
TARGETS = np.arange(36) % 3
THREAT = awp_jax.ThreatModel('Linf', 0.03, -9.0, 9.0)


def logits_fn(x):
  return x @ W + BIAS


def reachable():
  """Whether a point of the ball has z_t > z_k for both k, by enumeration.

  With two rivals the minimum over the ball of the larger gap is attained on the
  segment of directions between both; a fine grid of mixtures gives its value:
  min_x max_k gap_k(x) = max_a (a gap_1 + (1 - a) gap_2 - eps |a d_1 + (1 - a)
  d_2|_1) by duality, with gap_k = z_k - z_t.
  """
  z, found = X @ W + BIAS, []
  for row, target in enumerate(TARGETS):
    one, two = [k for k in range(3) if k != target]
    mixtures = np.linspace(0, 1, 2001)[:, None]
    slopes = mixtures * (W[:, one] - W[:, target]) + (1 - mixtures) * (
        W[:, two] - W[:, target])
    gaps = mixtures[:, 0] * (z[row, one] - z[row, target]) + (
        1 - mixtures[:, 0]) * (z[row, two] - z[row, target])
    found.append(np.max(gaps - 0.03 * np.abs(slopes).sum(1)))
  return np.array(found)


@pytest.fixture(scope='module')
def found():
  return awp_jax.targeted_attack(KEY, logits_fn, X, TARGETS, THREAT)


def test_success_where_the_class_is_reachable(found):
  least = reachable()
  clear = np.abs(least) > 1e-3
  assert clear.sum() > 30
  np.testing.assert_array_equal(found.success[clear], least[clear] < 0)
  assert 0.2 < found.success_rate < 0.9
  assert found.success_rate == found.success.mean()
  np.testing.assert_array_equal(
      found.natural_success, np.argmax(X @ W + BIAS, 1) == TARGETS)


def test_examples_are_in_the_ball_and_at_the_target(found):
  assert np.abs(found.adversarial - X).max() <= 0.03 + 1e-6
  reached = np.argmax(found.adversarial @ W + BIAS, 1) == TARGETS
  np.testing.assert_array_equal(reached, found.success)
  still = ~found.success | found.natural_success
  np.testing.assert_array_equal(found.adversarial[still], X[still])


def test_an_untargeted_success_does_not_count(found):
  """More examples can be misclassified than moved to their target."""
  labels = np.argmax(X @ W + BIAS, 1)
  untargeted = awp_jax.auto_attack(
      KEY, logits_fn, X, labels, THREAT, attacks=('apgd-ce',))
  rows = TARGETS != labels
  assert (~untargeted.robust[rows]).sum() > found.success[rows].sum()


def test_results_by_target(found):
  assert list(found.results) == [0, 1, 2]
  assert sum(len(result.robust) for result in found.results.values()) == 36


def test_a_store_and_another_model_for_the_attacks(tmp_path):
  seen = []
  options = awp_jax.EvalOptions(
      store=tmp_path, progress=seen.append, keep_images=False,
      attack_fn=lambda x: 1.001 * logits_fn(x))
  results = [awp_jax.targeted_attack(
      KEY, logits_fn, X, TARGETS, THREAT, attacks=('apgd-ce',),
      options=options) for _ in range(2)]
  assert len(seen) == 3 and results[0].adversarial is None
  np.testing.assert_array_equal(results[0].success, results[1].success)


def test_randomized_models():
  def noisy(x, key):
    return logits_fn(x) + 1e-4 * jax.random.normal(key, (len(x), 3))

  found = awp_jax.targeted_attack(
      KEY, noisy, X[:6], TARGETS[:6], THREAT, attacks=('apgd-ce',),
      options=awp_jax.EvalOptions(takes_key=True))
  assert found.success.dtype == bool and len(found.success) == 6


@pytest.mark.parametrize('change, shown', [
    ({'targets': np.zeros(35, int)}, 'targets must have shape'),
    ({'targets': np.full(36, 3)}, r'targets must be in \[0, 3\)'),
    ({'targets': np.zeros(36)}, 'targets must be integers'),
    ({'images': X + 10}, 'images must be in'),
    ({'options': awp_jax.EvalOptions(share=awp_jax.Share(0, 1, list))},
     'neither EvalOptions.done nor share')])
def test_wrong_arguments(change, shown):
  given = {'images': X, 'targets': TARGETS} | change
  with pytest.raises(ValueError, match=shown):
    awp_jax.targeted_attack(
        KEY, logits_fn, given.pop('images'), given.pop('targets'), THREAT,
        **given)


def test_two_classes_raise_no_warning(recwarn):
  awp_jax.targeted_attack(
      KEY, lambda x: logits_fn(x)[:, :2] * jnp.array([1.0, 2.0]), X[:4],
      TARGETS[:4] % 2, THREAT, attacks=('apgd-ce',))
  assert not [w for w in recwarn if issubclass(
      w.category, awp_jax.RobustnessWarning)]
