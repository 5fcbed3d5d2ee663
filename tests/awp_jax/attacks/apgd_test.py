"""APGD: checkpoints, step sizes, momentum; stages by an independent port.

Also the losses and targets that a spec makes it ascend.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import apgd, apgd_steps
from awp_jax.evaluation.model import Gradients, Model
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles

LINF = ThreatModel('Linf', 0.1)
examples = functools.partial(attack_oracles.examples, seed=3)


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
  # A report refers to the point before the step.
  for report, point in zip(reports, x[:3], strict=True):
    np.testing.assert_array_equal(report.candidates[0], point)
  assert not any(bool(report.zero_gradient[0]) for report in reports)


def test_reports():
  zero = [[0, 0]] * 4
  _, reports = run([1, 1, 1, 1], zero, [0.5, 0.5], 3, broken=[0, 1, 0, 1])
  assert [bool(r.broken[0]) for r in reports] == [False, True, False, True]
  assert [bool(r.finished[0]) for r in reports] == [False] * 3 + [True]
  # Reported at the start only.
  assert [bool(r.zero_gradient[0]) for r in reports] == [True] + [False] * 3


#: With 30 steps, checkpoints are at t = 6 (window 6) and t = 11 (window 5).
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
  # With 20 steps the first checkpoint is at t = 4. The first comparison is with
  # a loss of 0.
  for losses, size in (([1, 2, 3, 4, 4], 0.1), ([1, 2, 3, 4, 5], 0.2),
                       ([1, -1, 3, 4, 5], 0.1)):
    states, _ = run(losses, [[1, 1]] * 5, [0.5, 0.5], 20)
    assert float(states[-1].step_size[0]) == pytest.approx(size)


def test_every_fall_of_a_short_run_halves():
  # Each of three steps is a checkpoint.
  states, _ = run([1, 2, 1, 0], [[1, 1]] * 4, [0.5, 0.5], 3)
  sizes = [float(state.step_size[0]) for state in states[1:]]
  assert sizes == pytest.approx([0.2, 0.2, 0.1, 0.05])


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
    begin: random points, not yet inside the ball.
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
  # Steps shrank, some to the smallest size, and were reset.
  ratios = sizes[-9:] / 0.7
  assert ratios.min() < 0.11 and (np.diff(ratios, axis=0) > 0.5).any()


def own_loss(logits, labels, targets):
  rows = jnp.arange(len(labels))
  return logits[rows, targets] - logits[rows, labels]


@pytest.mark.parametrize('loss, targeted, classes, ascended', (
    ('ce', None, 2, 'ce'), ('margin', False, 2, 'margin'),
    ('dlr', None, 2, 'margin'), ('dlr', False, 3, 'dlr'),
    ('dlr-targeted', None, 2, 'difference'),
    ('dlr-targeted', True, 3, 'difference'),
    ('dlr-targeted', None, 4, 'dlr-targeted'),
    (own_loss, None, 2, own_loss), (own_loss, False, 4, own_loss),
    (own_loss, True, 3, own_loss)))
def test_losses_and_targets_of_a_spec(loss, targeted, classes, ascended):
  asked = []

  def gradients(loss, x, labels, targets, keys):
    asked.append((loss, targets.tolist()))
    return Gradients(
        jnp.ones_like(x), jnp.ones(len(x)), jnp.zeros(len(x), bool))

  spec = apgd.apgd_spec(
      'a', loss=loss, num_steps=2, restarts=2, num_targets=2,
      targeted=targeted)
  attack = spec.build(Model(lambda x, keys: x, gradients, classes), LINF)
  batch = examples(
      np.full((4, 2), 0.5, np.float32), targets=np.tile([7, 8, 9], (4, 1)),
      runs=np.arange(4))
  attack.step(batch, attack.init(batch))
  by_target = targeted or loss == 'dlr-targeted'
  assert asked == [(ascended, [7, 7, 8, 8] if by_target else [7] * 4)]
  assert attack.num_runs == (2 * min(2, classes - 1) if by_target else 2)
  assert spec.num_targets == (2 if by_target else 0)
  assert spec.settings['targeted'] is bool(by_target)
  assert spec.min_classes == {'dlr': 3, 'dlr-targeted': 4}.get(loss, 2)


@pytest.mark.parametrize('arguments, message', (
    ({'loss': 'cw'}, "^loss must be one of 'ce', .* got 'cw'"),
    ({'num_steps': 0}, '^num_steps must be a whole number >= 1, got 0'),
    ({'restarts': 0}, '^restarts must be a whole number >= 1, got 0'),
    ({'num_targets': 0}, '^num_targets must be a whole number >= 1, got 0'),
    ({'targeted': True}, "^targeted=True does not match loss='ce': only"),
    ({'loss': 'dlr-targeted', 'targeted': False},
     "^targeted=False does not match loss='dlr-targeted'"),
    ({'loss': lambda z, y, t: z[:, :1]}, r'losses \[B\], got .*\(2, 1\)'),
    ({'loss': lambda z, y, t: (z[:, 0],)}, r'losses \[B\], got \(Shape')))
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    spec = apgd.apgd_spec('a', **{'loss': 'ce'} | arguments)
    spec.build(Model(None, None, 3), LINF)
