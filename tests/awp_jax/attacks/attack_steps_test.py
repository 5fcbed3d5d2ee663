"""Steps of APGD, PGD and SPSA by closed forms and by independent ports."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awp_jax.attacks import apgd_steps, fixed_step, spsa
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.evaluation.model import Gradients
from awp_jax.evaluation.protocol import Examples
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import KEY, QUIET, threshold

LINF = ThreatModel('Linf', 0.1)


def examples(images):
  count = len(images)
  none = jnp.zeros(count, jnp.int32)
  return Examples(
      jnp.asarray(images), none, none[:, None],
      jax.random.split(jax.random.key(3), count), none)


@pytest.mark.parametrize('num_steps, expected', (
    (50, {11: 11, 21: 10, 30: 9, 38: 8, 45: 7}),
    (34, {7: 7, 13: 6, 18: 5, 22: 4, 25: 3, 27: 2, 29: 2, 31: 2, 33: 2}),
    (10, {2: 2, **{t: 1 for t in range(3, 11)}}),
    (1, {1: 1})))
def test_checkpoints(num_steps, expected):
  windows = apgd_steps.checkpoint_windows(num_steps)
  assert len(windows) == num_steps + 1
  assert {t: w for t, w in enumerate(windows) if w} == expected


def test_schedules():
  plain = apgd_steps.make_schedule(LINF, 10, staged=False)
  assert plain.first == (True,) + (False,) * 10
  assert plain.last_stage == (True,) * 11 and set(plain.epsilon) == {0.1}
  assert plain.window == apgd_steps.checkpoint_windows(10)
  threat = ThreatModel('L1', 2.0)
  staged = apgd_steps.make_schedule(threat, 11, staged=True)
  # Stages of ceil(3.3), ceil(3.3) and the remaining 3 iterations.
  assert [t for t, first in enumerate(staged.first) if first] == [0, 5, 10]
  assert staged.epsilon == (6.0,) * 5 + (4.0,) * 5 + (2.0,) * 4
  assert staged.last_stage == (False,) * 10 + (True,) * 4
  assert staged.window == (0, 1, 1, 1, 1) * 2 + (0, 1, 1, 1)
  # Every 4 % of a stage's iterations.
  long = apgd_steps.make_schedule(threat, 60, staged=False).window
  assert [t for t, w in enumerate(long) if w] == list(range(2, 61, 2))
  for num_steps, number in ((2, 1), (3, 3)):
    short = apgd_steps.make_schedule(threat, num_steps, staged=True)
    assert len(set(short.epsilon)) == number and short.epsilon[-1] == 2.0


@pytest.mark.parametrize('norm', ('Linf', 'L2', 'L1'))
def test_starts(norm):
  # Small radii at the center of the box: nothing is clipped.
  images = np.full((4, 2, 3), 0.5, np.float32)
  threat = ThreatModel(norm, 0.1)
  distances = {}
  for staged in (False, True):
    schedule = apgd_steps.make_schedule(
        threat, 10, staged=staged and norm == 'L1')
    state = apgd_steps.start(examples(images), threat, schedule)
    distances[staged] = np.asarray(threat.distance(state.x, images))
    if norm != 'L1':
      assert len(np.unique(np.asarray(state.x).round(6))) > 12
    np.testing.assert_array_equal(state.time, 0)
  np.testing.assert_allclose(distances[False], 0.1, rtol=1e-5)
  np.testing.assert_allclose(
      distances[True], 0.3 if norm == 'L1' else 0.1, rtol=1e-5)


def run(losses, gradients, begin, num_steps, broken=None):
  """States and reports of APGD on one example along given losses."""
  images = np.full((1, 2), 0.5, np.float32)
  schedule = apgd_steps.make_schedule(LINF, num_steps, staged=False)
  state = apgd_steps.start(examples(images), LINF, schedule)
  state = state._replace(x=jnp.asarray([begin], jnp.float32))
  states, reports = [state], []
  for time, (loss, gradient) in enumerate(zip(losses, gradients, strict=True)):
    seen = Gradients(
        jnp.asarray([gradient], jnp.float32), jnp.asarray([loss], jnp.float32),
        jnp.asarray([bool(broken and broken[time])]))
    state, report = apgd_steps.advance(
        state, seen, jnp.asarray(images), LINF, schedule)
    states.append(state)
    reports.append(report)
  return states, reports


def inside(x):
  return np.clip(x, 0.4, 0.6)


def test_momentum_and_step_size():
  begin = np.array([0.45, 0.58])
  gradients = [[1, -1], [1, 1], [-1, 1]]
  states, reports = run([0.1, 0.2, 0.3], gradients, begin, 30)
  x = [np.asarray(state.x)[0] for state in states]
  first = inside(begin + 0.2 * np.array([1, -1]))
  np.testing.assert_allclose(x[1], first, atol=1e-6)
  target = inside(x[1] + 0.2 * np.array([1, 1]))
  np.testing.assert_allclose(
      x[2], inside(x[1] + 0.75 * (target - x[1]) + 0.25 * (x[1] - x[0])),
      atol=1e-6)
  target = inside(x[2] + 0.2 * np.array([-1, 1]))
  np.testing.assert_allclose(
      x[3], inside(x[2] + 0.75 * (target - x[2]) + 0.25 * (x[2] - x[1])),
      atol=1e-6)
  # A report is about the point before the step.
  for report, point in zip(reports, x[:3], strict=True):
    np.testing.assert_array_equal(report.candidates[0], point)
  assert not any(bool(report.zero_gradient[0]) for report in reports)


def test_reports():
  zero = [[0, 0]] * 4
  _, reports = run([1, 1, 1, 1], zero, [0.5, 0.5], 3, broken=[0, 1, 0, 1])
  assert [bool(r.broken[0]) for r in reports] == [False, True, False, True]
  assert [bool(r.finished[0]) for r in reports] == [False] * 3 + [True]
  # Looked at at the start only.
  assert [bool(r.zero_gradient[0]) for r in reports] == [True] + [False] * 3


#: With 30 steps, checkpoints stand at t = 6 (window 6) and t = 11 (window 5).
RISING = [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize('losses, halved', (
    # Six rises of six, then five of five.
    ([*RISING, 8, 9, 10, 11, 12], (False, False)),
    # Four of five, and the best loss never rose: stuck.
    ([*RISING, 1, 2, 3, 4, 5], (False, True)),
    # Four of five, the last of them a new best.
    ([*RISING, 1, 2, 3, 4, 8], (False, False)),
    # Four of six; then four of five without a new best, which counts only where
    # the last checkpoint did not halve.
    ([1, 2, 3, 4, 5, 4, 3, -9, 2, 2.5, 3.5, 4.5], (True, False)),
    # Three of five is at most 75 %.
    ([*RISING, 8, 9, 10, 9, 8], (False, True)),
))
def test_halving(losses, halved):
  gradients = [[1, -1]] * len(losses)
  states, _ = run(losses, gradients, [0.5, 0.5], 30)
  sizes = [float(state.step_size[0]) for state in states]
  assert sizes[1:7] == pytest.approx([0.2] * 6)
  factors = (sizes[7] / 0.2, sizes[12] / sizes[7])
  assert factors == pytest.approx(
      tuple(0.5 if was else 1.0 for was in halved))
  assert sizes[7:12] == pytest.approx([sizes[7]] * 5)
  assert float(states[-1].best_loss[0]) == max(losses)


def test_exactly_three_quarters_of_rises_are_too_few():
  # With 20 steps the first checkpoint stands at t = 4. The first comparison is
  # with a loss of 0.
  for losses, size in (([1, 2, 3, 4, 4], 0.1), ([1, 2, 3, 4, 5], 0.2),
                       ([1, -1, 3, 4, 5], 0.1)):
    states, _ = run(losses, [[1, 1]] * 5, [0.5, 0.5], 20)
    assert float(states[-1].step_size[0]) == pytest.approx(size)


def test_halving_goes_back_to_the_best_point():
  gradients = [[1, -1], [-1, -1], [1, 1], [-1, 1], [-1, -1]]
  losses = [1, 9, 3, 2, 1]
  states, _ = run(losses, gradients, [0.5, 0.5], 20)
  best, previous = np.asarray(states[1].x)[0], np.asarray(states[3].x)[0]
  np.testing.assert_array_equal(states[5].best[0], best)
  target = inside(best + 0.1 * np.array([-1, -1]))
  np.testing.assert_allclose(
      states[5].x[0],
      inside(best + 0.75 * (target - best) + 0.25 * (best - previous)),
      atol=1e-6)
  np.testing.assert_array_equal(states[5].previous[0], best)


def l1_projection(point, x, radius):
  """Onto the L1 ball and the unit box, by bisection: one row each."""
  delta = point - x
  room = np.where(delta > 0, 1 - x, x)
  result = np.minimum(np.abs(delta), room)
  for i in range(len(x)):
    if result[i].sum() > radius:
      low, high = 0.0, np.abs(delta[i]).max()
      for _ in range(200):
        shrink = (low + high) / 2
        total = np.clip(np.abs(delta[i]) - shrink, 0, room[i]).sum()
        low, high = (shrink, high) if total > radius else (low, shrink)
      result[i] = np.clip(np.abs(delta[i]) - high, 0, room[i])
  return x + np.sign(delta) * result


def staged_l1(x, begin, epsilon, num_steps, look):
  """Every point that staged L1 APGD evaluates, in NumPy.

  Args:
    x: natural inputs, [B, D].
    begin: random points, not yet inside of the ball.
    epsilon: the radius.
    num_steps: iterations, over all stages.
    look: points -> losses [B], gradients [B, D].

  Returns:
    The points and the step sizes after each evaluation.
  """
  rows, size = np.arange(len(x)), x.shape[1]
  third = math.ceil(0.3 * num_steps)
  points, sizes = [], []
  begin = l1_projection(begin, x, 3 * epsilon)
  for factor, steps in ((3, third), (2, third), (1, num_steps - 2 * third)):
    radius = factor * epsilon
    now = l1_projection(begin, x, radius)
    losses, gradient = look(now)
    best, best_loss, best_gradient = now.copy(), losses, gradient.copy()
    sparsity = (now != x).sum(-1)
    share, step = sparsity / size / 1.5, np.full(len(x), float(radius))
    points.append(now)
    sizes.append(step)
    for t in range(1, steps + 1):
      ranked = np.sort(np.abs(gradient), axis=-1)
      place = np.clip((1 - share) * size, 0, size - 1).astype(int)
      large = np.abs(gradient) >= ranked[rows, place][:, None]
      signs = np.sign(gradient) * large
      signs /= np.maximum(np.abs(signs).sum(-1, keepdims=True), 1)
      now = l1_projection(now + step[:, None] * signs, x, radius)
      points.append(now.copy())
      losses, gradient = look(now)
      up = losses > best_loss
      best[up], best_gradient[up] = now[up], gradient[up]
      best_loss = np.maximum(best_loss, losses)
      if t % max(int(0.04 * steps), 1) == 0:
        moved = (best != x).sum(-1)
        sparser = moved / sparsity < 0.95
        share, sparsity = moved / size / 1.5, moved
        step = np.clip(
            np.where(sparser, radius, step / 1.5), radius / 10, radius)
        now, gradient = now.copy(), gradient.copy()
        now[sparser], gradient[sparser] = best[sparser], best_gradient[sparser]
      sizes.append(step)
    begin = best
  return np.stack(points), np.stack(sizes)


def test_staged_l1_follows_an_independent_port(x64):
  rng = np.random.default_rng(0)
  count, size, num_steps = 5, 24, 30
  first = rng.normal(size=(size, 12)) / np.sqrt(size)
  second = rng.normal(size=(12, 4))
  x = rng.uniform(size=(count, size))
  labels = (np.tanh(3 * (x - 0.5) @ first) @ second).argmax(-1)

  def look(points):
    hidden = np.tanh(3 * (points - 0.5) @ first)
    z = hidden @ second
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    rows = np.arange(count)
    losses = -np.log(p[rows, labels])
    p[rows, labels] -= 1
    return losses, 3 * ((p @ second.T) * (1 - hidden ** 2)) @ first.T

  threat = ThreatModel('L1', 0.7)
  schedule = apgd_steps.make_schedule(threat, num_steps, staged=True)
  batch = examples(x)
  state = apgd_steps.start(batch, threat, schedule)
  noise = jax.vmap(lambda key: jax.random.normal(key, (size,), jnp.float64))(
      batch.keys)
  points, sizes = staged_l1(x, x + np.asarray(noise), 0.7, num_steps, look)
  assert len(points) == len(schedule.first) == num_steps + 3
  for time, (point, step_size) in enumerate(zip(points, sizes, strict=True)):
    np.testing.assert_allclose(state.x, point, atol=1e-9, err_msg=str(time))
    losses, gradient = look(np.asarray(state.x))
    state, report = apgd_steps.advance(
        state, Gradients(
            jnp.asarray(gradient), jnp.asarray(losses), jnp.ones(count, bool)),
        batch.images, threat, schedule)
    np.testing.assert_allclose(state.step_size, step_size, rtol=1e-12)
    # Successes in the larger balls do not count.
    assert bool(report.broken.all()) == (time >= 20), time
    assert bool(report.finished.all()) == (time == num_steps + 2)
  assert (np.asarray(threat.distance(state.best, x)) <= 0.7 + 1e-9).all()
  # Steps shrank, to the smallest in places, and were reset.
  ratios = sizes[-9:] / 0.7
  assert ratios.min() < 0.11 and (np.diff(ratios, axis=0) > 0.5).any()


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


def test_pgd_is_judged_by_its_last_iterate():
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


@pytest.mark.parametrize('broken, unjudged', (
    (True, False), (False, True), (False, False)))
def test_pgd_reports_at_its_last_step(broken, unjudged):
  seen = Gradients(
      jnp.zeros((1, 1)), jnp.zeros(1), jnp.asarray([broken]))
  for time in (0, 1, 2, 5):
    _, report = fixed_step._advance(
        fixed_step._State(jnp.asarray([[0.5]]), jnp.asarray([time])), seen,
        jnp.asarray([[0.5]]), 0.02, LINF, 2, unjudged)
    assert bool(report.broken[0]) == (time >= 2 and (broken or unjudged))
    assert bool(report.zero_gradient[0]) == (time == 0)


def test_l2_steps_have_the_step_size():
  x = jnp.asarray([[0.5, 0.5]])
  state, _ = fixed_step._advance(
      fixed_step._State(x, jnp.asarray([0])),
      Gradients(jnp.asarray([[3.0, -4.0]]), jnp.zeros(1), jnp.zeros(1, bool)),
      x, 0.05, ThreatModel('L2', 0.2), 4, False)
  np.testing.assert_allclose(state.x, [[0.53, 0.46]], atol=1e-6)


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
  # Rows run at their own time: a fresh one makes a first step, of full size.
  mixed = state._replace(
      time=jnp.asarray([5, 0]), mean=state.mean.at[1].set(0),
      square=state.square.at[1].set(0))
  moved = spsa._climb(
      mixed, jnp.asarray([[1e-3] * 3] * 2), x, jnp.float32(0.01), wide)
  np.testing.assert_allclose(moved.x[1] - mixed.x[1], 0.01, atol=1e-5)


def test_spsa_guesses_the_gradient_of_the_margin():
  # Of a linear margin <a, x>, each pair gives v <a, v>, here for h = 1/2.
  a = jnp.asarray([0.3, -0.2])
  x, labels = jnp.full((1, 2), 0.5), jnp.asarray([1])
  none = spsa._Guess(jnp.zeros((1, 2)), jnp.zeros(1, bool))

  def logits(points):
    margin = points @ a
    return jnp.stack([margin, jnp.zeros(1)], -1)

  guess, expected = none, np.zeros(2)
  for signs in ([1, 1], [1, -1], [-1, -1]):
    v = jnp.asarray([signs], jnp.float32)
    above, below = spsa._both_sides(x, v, jnp.float32(0.5))
    np.testing.assert_allclose(above - x, v / 2)
    np.testing.assert_allclose(x - below, v / 2)
    guess = spsa._add(
        guess, v, logits(above), logits(below), labels,
        jnp.float32(1 / (2 * 0.5 * 3)))
    expected = expected + np.array(signs) * np.dot(a, signs) / 3
  np.testing.assert_allclose(guess.total[0], expected, atol=1e-6)
  assert not guess.nonfinite[0]
  bad = spsa._add(
      guess, v, logits(above) * jnp.inf, logits(below), labels,
      jnp.float32(1.0))
  np.testing.assert_array_equal(bad.total, guess.total)
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
  # In one dimension the guess is exact, and Adam moves by its step size.
  margins = np.asarray([0.01, 0.03, 0.05, 0.07])
  result = spsa.spsa(
      KEY, threshold, (0.5 - margins[:, None]).astype(np.float32),
      np.zeros(4, int), LINF, num_steps=3, num_samples=2, step_size=0.02,
      options=QUIET)
  np.testing.assert_array_equal(result.robust, margins > 0.06)


def test_the_start_of_a_run_may_be_drawn_in_the_ball():
  images = np.full((3, 4), 0.5, np.float32)
  start = functools.partial(fixed_step._start, examples(images), LINF)
  np.testing.assert_array_equal(start(False).x, images)
  far = np.asarray(LINF.distance(start(True).x, images))
  assert (far > 0).all() and (far <= 0.1).all() and len(set(far)) == 3
