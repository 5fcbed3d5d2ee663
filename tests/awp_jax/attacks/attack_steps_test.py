"""Steps of PGD and SPSA by closed forms and by optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awp_jax.attacks import fixed_step, spsa
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.evaluation.model import Gradients
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles
from tests.helpers.attack_problem import KEY, QUIET, threshold

LINF = ThreatModel('Linf', 0.1)
examples = functools.partial(attack_oracles.examples, seed=3)


@pytest.mark.parametrize('num_steps', (3, 4))
@pytest.mark.parametrize('loss', ('ce', 'margin'))
def test_pgd_goes_as_far_as_its_steps(num_steps, loss):
  # The margin at the first input is m; n steps of 0.02 break m < 0.02 n.
  margins = np.asarray([0.01, 0.03, 0.05, 0.07, 0.09])
  images = (0.5 - margins[:, None]).astype(np.float32)
  spec = fixed_step.pgd_spec(
      'pgd', step_size=0.02, num_steps=num_steps, loss=loss,
      random_start=False)
  result = evaluate(
      KEY, threshold, images, np.zeros(5, int), LINF, (spec,), options=QUIET)
  np.testing.assert_array_equal(result.robust, margins > 0.02 * num_steps)
  np.testing.assert_allclose(
      result.adversarial[~result.robust],
      images[~result.robust] + 0.02 * num_steps, atol=1e-6)


def test_last_iterate_of_pgd_decides():
  # Misclassified at the second of four points alone.
  seen = []
  state = fixed_step._State(jnp.asarray([[0.48]]), jnp.asarray([0]))
  for time in range(4):
    x = float(state.x[0, 0])
    seen.append(x)
    state, report = fixed_step._advance(
        state, Gradients(
            jnp.ones((1, 1)), jnp.zeros(1), jnp.asarray([abs(x - 0.5) < 0.015]),
            jnp.asarray([time == 1])),
        jnp.asarray([[0.48]]), 0.02, LINF, 3, False)
    assert bool(report.finished[0]) == (time == 3)
    assert not report.broken[0]
    assert not report.zero_gradient[0]
    assert bool(report.nonfinite[0]) == (time == 1)
    np.testing.assert_allclose(report.candidates, [[x]])
  np.testing.assert_allclose(seen, [0.48, 0.5, 0.52, 0.54], atol=1e-6)


@pytest.mark.parametrize('broken, transfer', (
    (True, False), (False, True), (False, False)))
def test_pgd_reports_at_its_last_step(broken, transfer):
  seen = Gradients(
      jnp.zeros((1, 1)), jnp.zeros(1), jnp.asarray([broken]))
  for time in (0, 1, 2, 5):
    _, report = fixed_step._advance(
        fixed_step._State(jnp.asarray([[0.5]]), jnp.asarray([time])), seen,
        jnp.asarray([[0.5]]), 0.02, LINF, 2, transfer)
    assert bool(report.broken[0]) == (time >= 2 and (broken or transfer))
    assert bool(report.zero_gradient[0]) == (time == 0)


def test_l2_steps_have_the_step_size():
  x = jnp.asarray([[0.5, 0.5]])
  state, _ = fixed_step._advance(
      fixed_step._State(x, jnp.asarray([0])),
      Gradients(jnp.asarray([[3.0, -4.0]]), jnp.zeros(1), jnp.zeros(1, bool)),
      x, 0.05, ThreatModel('L2', 0.2), 4, False)
  np.testing.assert_allclose(state.x, [[0.53, 0.46]], atol=1e-6)


def test_the_start_of_a_run_may_be_drawn_in_the_ball():
  images = np.full((3, 4), 0.5, np.float32)
  start = functools.partial(fixed_step._start, examples(images), LINF)
  np.testing.assert_array_equal(start(False).x, images)
  far = np.asarray(LINF.distance(start(True).x, images))
  assert (far > 0).all() and (far <= 0.1).all() and len(set(far)) == 3


def test_spsa_is_adam():
  rng = np.random.default_rng(0)
  x = jnp.full((2, 3), 0.5)
  wide = ThreatModel('Linf', 0.45)
  state = spsa.SPSAState(x, 0 * x, 0 * x, jnp.zeros(2, jnp.int32))
  adam = optax.adam(0.01)
  expected, memory = x, adam.init(x)
  for _ in range(5):
    gradient = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    state = spsa._climb(state, gradient, x, jnp.float32(0.01), wide)
    updates, memory = adam.update(-gradient, memory)
    expected = optax.apply_updates(expected, updates)
    np.testing.assert_allclose(state.x, expected, atol=1e-6)
  np.testing.assert_array_equal(state.time, 5)
  # Each row has its own time: a new row makes a first step, of full size; half
  # of it where the gradient is as small as the floor of its divisor.
  mixed = state._replace(
      time=jnp.asarray([5, 0]), mean=state.mean.at[1].set(0),
      square=state.square.at[1].set(0))
  moved = spsa._climb(
      mixed, jnp.asarray([[1e-3, 1e-8, 1e-3]] * 2), x, jnp.float32(0.01), wide)
  np.testing.assert_allclose(
      moved.x[1] - mixed.x[1], [0.01, 0.005, 0.01], atol=1e-5)


def test_spsa_estimates_the_gradient_of_the_margin():
  # For a linear margin <a, x> each pair gives v <a, v>; here h = 1/2.
  a = jnp.asarray([0.3, -0.2])
  x, labels = jnp.full((1, 2), 0.5), jnp.asarray([1])
  none = spsa._Estimate(jnp.zeros((1, 2)), jnp.zeros(1, bool))

  def logits(points):
    margin = points @ a
    return jnp.stack([margin, jnp.zeros(1)], -1)

  estimate, expected = none, np.zeros(2)
  for signs in ([1, 1], [1, -1], [-1, -1]):
    v = jnp.asarray([signs], jnp.float32)
    above, below = spsa._both_sides(x, v, jnp.float32(0.5))
    np.testing.assert_allclose(above - x, v / 2)
    np.testing.assert_allclose(x - below, v / 2)
    estimate = spsa._add(
        estimate, v, logits(above), logits(below), labels,
        jnp.float32(1 / (2 * 0.5 * 3)))
    expected = expected + np.array(signs) * np.dot(a, signs) / 3
  np.testing.assert_allclose(estimate.total[0], expected, atol=1e-6)
  assert not estimate.nonfinite[0]
  bad = spsa._add(
      estimate, v, logits(above) * jnp.inf, logits(below), labels,
      jnp.float32(1.0))
  np.testing.assert_array_equal(bad.total, estimate.total)
  assert bad.nonfinite[0]


def test_spsa_draws_signs_per_key_and_turn():
  x = jnp.zeros((2, 50))
  keys = jax.random.split(KEY, 2)
  draws = [np.asarray(spsa._signs(keys, turn, x)) for turn in (0, 1)]
  for signs in draws:
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert 20 < np.sum(signs[0] != signs[1]) < 80
  assert 20 < np.sum(draws[0] != draws[1]) < 80
  again = spsa._signs(keys[::-1], 0, x)
  np.testing.assert_array_equal(again, draws[0][::-1])


def test_spsa_reports_every_iterate():
  for time in (2, 3):
    report = spsa._report(
        spsa.SPSAState(jnp.ones((2, 1)), None, None, jnp.full(2, time)),
        jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros(2, jnp.int32),
        jnp.asarray([True, False]), num_steps=3)
    np.testing.assert_array_equal(report.broken, [False, True])
    np.testing.assert_array_equal(report.finished, [time == 3] * 2)
    np.testing.assert_array_equal(report.nonfinite, [True, False])
    assert not report.zero_gradient.any()


def test_spsa_climbs_as_far_as_its_steps():
  # In one dimension the estimate is exact, and Adam moves by its step size.
  margins = np.asarray([0.01, 0.03, 0.05, 0.07])
  result = spsa.spsa(
      KEY, threshold, (0.5 - margins[:, None]).astype(np.float32),
      np.zeros(4, int), LINF, num_steps=3, num_samples=2, step_size=0.02,
      options=QUIET)
  np.testing.assert_array_equal(result.robust, margins > 0.06)
