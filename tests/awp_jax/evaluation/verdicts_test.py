"""Which candidates count: inside the ball, misclassified, without NaN."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.attacks import apgd, fab, fixed_step, spsa
from awp_jax.core import loops
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import (
  KEY,
  QUIET,
  RADII,
  kinds,
  network,
  scripted,
  threshold,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def with_nan_gradient(logits_fn):
  """The same logits; the gradient of the first entry is inf * 0 = NaN."""
  return lambda x: logits_fn(x) + jnp.sqrt(jnp.square(0 * x[:, :1]))


@pytest.mark.parametrize('norm, make', (
    ('Linf', lambda: apgd.apgd_spec('a', loss='ce', num_steps=8)),
    ('L1', lambda: apgd.apgd_spec('a', loss='ce', num_steps=8)),
    ('L2', lambda: fixed_step.pgd_spec('a', step_size=0.05, num_steps=8)),
    ('Linf', lambda: fab.fab_spec('a', targeted=True, num_steps=4))))
def test_nan_in_a_gradient_changes_no_verdict(norm, make):
  # The entry has no effect on the logits, so its gradient is 0 or NaN.
  logits_fn, images, labels = network()
  threat = ThreatModel(norm, RADII[norm])
  clean, nan = (
      evaluate(KEY, f, images, labels, threat, (make(),), options=QUIET)
      for f in (logits_fn, with_nan_gradient(logits_fn)))
  assert 0.1 < clean.robust_accuracy < 0.9
  np.testing.assert_array_equal(nan.robust, clean.robust)
  np.testing.assert_allclose(nan.adversarial, clean.adversarial, atol=1e-6)
  assert ('non-finite-gradient', 'a') not in kinds(clean)
  assert kinds(nan)['non-finite-gradient', 'a'] == len(images)
  assert nan.attacks[0].anomalies.nonfinite_gradient == len(images)


def test_spsa_survives_a_loss_that_is_not_finite():
  # Half of the pairs of points around the image meet logits of NaN.
  def cliff(x):
    low = jnp.sum(x, -1, keepdims=True) < 0.9 - 0.003
    return jnp.where(low, jnp.nan, threshold(x))

  result = spsa.spsa(
      KEY, cliff, np.full((4, 2), 0.45, np.float32), np.zeros(4, int),
      ThreatModel('Linf', 0.1), num_steps=10, num_samples=8, radius=0.002,
      step_size=0.02, options=QUIET)
  assert not result.robust.any()
  assert np.isfinite(result.adversarial).all()
  assert (result.adversarial[:, 0] > 0.5).all()
  assert result.attacks[0].anomalies.nonfinite_gradient == 4
  assert result.attacks[0].anomalies.nonfinite_logits == 0


def test_non_finite_gradients_are_counted_at_every_step():
  # The gradient is not finite at one step of four.
  logits_fn = threshold
  images = np.full((2, 1), 0.3, np.float32)
  for step in range(4):
    nonfinite = np.arange(4) == step
    spec = scripted(
        lambda examples, time: examples.images, [[0] * 4],
        nonfinite=[nonfinite])
    result = evaluate(
        KEY, logits_fn, images, np.zeros(2, int), ThreatModel('Linf', 0.1),
        (spec,), options=QUIET)
    assert result.attacks[0].anomalies.nonfinite_gradient == 2, step
    assert result.robust.all()


def overflowing(x):
  """Logits that are NaN where the first input exceeds 0.55."""
  return jnp.where(x[:, :1] > 0.55, jnp.nan, threshold(x - 0.3))


def test_non_finite_logits_at_an_adversarial_example_are_broken():
  images = np.asarray([[0.5], [0.5], [0.3]], np.float32)
  result = fixed_step.cw_attack(
      KEY, overflowing, images, np.zeros(3, int), ThreatModel('Linf', 0.1),
      step_size=0.1, num_steps=3, options=QUIET)
  np.testing.assert_array_equal(result.robust, [False, False, True])
  assert result.natural.all()
  assert result.attacks[0].anomalies.nonfinite_logits == 2
  assert kinds(result)['non-finite', 'cw-3'] == 2


def test_non_finite_natural_logits_are_misclassified_and_counted():
  images = np.asarray([[0.6], [0.5], [0.7]], np.float32)
  spec = scripted(lambda examples, time: examples.images, [[0]])
  with pytest.warns(awp_jax.RobustnessWarning, match='2 natural images'):
    result = evaluate(
        KEY, overflowing, images, np.zeros(3, int), ThreatModel('Linf', 0.1),
        (spec,), options=QUIET)
  np.testing.assert_array_equal(result.natural, [False, True, False])
  np.testing.assert_array_equal(result.robust, [False, True, False])
  assert kinds(result) == {('non-finite', ''): 2}


@pytest.mark.parametrize('norm', ('Linf', 'L2', 'L1'))
def test_points_outside_of_ball_or_box_do_not_count(norm):
  # Two inputs; the second only adds to the distance or leaves the box.
  candidates = np.asarray([
      [0.55, 0.0], [0.55, 0.05], [0.61, 0.0], [0.5 + 0.1 * (1 + 1e-4), 0.0],
      [0.5 + 0.1 * (1 + 5e-6), 0.0], [0.55, -1e-3], [np.nan, 0.0],
      [0.55, np.nan]], np.float32)
  images = np.tile(np.asarray([[0.5, 0.0]], np.float32), (8, 1))
  labels = np.zeros(8, int)
  inside = np.asarray([1, 1, 0, 0, 1, 0, 0, 0], bool)
  if norm == 'L1':
    candidates[1, 1] = 0.06
    inside[1] = False
  table = jnp.asarray(candidates)

  def points(examples, time):
    return table[examples.labels // 1 + jnp.arange(8)]

  result = evaluate(
      KEY, threshold, images, labels, ThreatModel(norm, 0.1),
      (scripted(points, [[1]]),), options=QUIET)
  np.testing.assert_array_equal(result.robust, ~inside)
  assert result.attacks[0].anomalies.outside == np.sum(~inside)
  assert result.attacks[0].anomalies.refused == 0
  assert kinds(result)['outside', 'scripted'] == np.sum(~inside)
  np.testing.assert_array_equal(result.adversarial[~inside], images[~inside])


@pytest.mark.parametrize('takes_key, when', ((False, 2), (True, 5)))
@pytest.mark.parametrize('chunked', (False, True))
def test_first_or_last_misclassified_iterate(
    takes_key, when, chunked, monkeypatch):
  # The run of a deterministic model ends at the first one. For a randomized
  # model the last one before the end, step 7, is checked.
  def logits_fn(x, key=None):
    return threshold(x)

  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  steps = np.isin(np.arange(8), (2, 5))
  spec = scripted(
      lambda examples, time: examples.images + 0.01 * (
          1 + time[:, None].astype(jnp.float32)), [steps])
  result = evaluate(
      KEY, logits_fn, np.full((3, 1), 0.495, np.float32), np.zeros(3, int),
      ThreatModel('Linf', 0.1), (spec,),
      options=dataclasses.replace(QUIET, takes_key=takes_key))
  assert not result.robust.any()
  np.testing.assert_allclose(
      result.adversarial, 0.495 + 0.01 * (1 + when), atol=1e-6)
  np.testing.assert_allclose(
      result.attacks[0].largest_distance, 0.01 * (1 + when), atol=1e-6)


@pytest.mark.parametrize('chunked', (False, True))
def test_a_refused_claim_does_not_end_the_run(chunked, monkeypatch):
  # The attack claims success at every step; the model agrees from step 5.
  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  spec = scripted(
      lambda examples, time: examples.images + 0.01 * (
          1 + time[:, None].astype(jnp.float32)), [[1] * 8])
  images = np.asarray([[0.445], [0.455], [0.4]], np.float32)
  result = evaluate(
      KEY, threshold, images, np.zeros(3, int), ThreatModel('Linf', 0.2),
      (spec,), options=QUIET)
  np.testing.assert_array_equal(result.robust, [False, False, True])
  assert (result.adversarial[:2] > 0.5).all()
  if not chunked:
    np.testing.assert_allclose(result.adversarial[:2], 0.505, atol=1e-6)
  assert result.attacks[0].anomalies.refused == 3


@pytest.mark.parametrize('takes_key', (False, True))
def test_refused_examples_get_their_remaining_runs(takes_key):
  # Run 0 claims a point that the model classifies correctly; run 1 succeeds.
  def logits_fn(x, key=None):
    return threshold(x)

  def points(examples, time):
    return examples.images + jnp.where(examples.runs, 0.1, 0.02)[:, None]

  spec = scripted(points, [[0, 1]] * 2, runs=2)
  result = evaluate(
      KEY, logits_fn, np.full((20, 1), 0.45, np.float32), np.zeros(20, int),
      ThreatModel('Linf', 0.2), (spec,),
      options=dataclasses.replace(QUIET, takes_key=takes_key))
  assert not result.robust.any()
  np.testing.assert_allclose(result.adversarial, 0.55, atol=1e-6)
  assert result.attacks[0].anomalies.refused == 20
