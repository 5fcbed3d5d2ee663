"""Auto-PGD, step by step, against a port to NumPy of one example at a time.

The port follows the published algorithm: a loop over iterations that counts up
to the next checkpoint. Losses and gradients are made up, so that every branch
of the checkpoints is taken, and no rounding grows along a trajectory.
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import apgd_steps
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles

COUNT, SHAPE = 24, (5, 4, 2)


class Port:
  """One stage of Auto-PGD on one example.

  `events` counts what happened at checkpoints, so that a test can see that its
  data reach every branch.
  """

  def __init__(self, x, norm, radius, steps, events, shares):
    self.x, self.norm, self.radius, self.steps = x, norm, radius, steps
    self.events, self.shares = events, shares
    self.points, self.sizes = [], []

  def moved(self, point):
    """How many entries have moved, and the share of a step that follows.

    Whether an entry at the edge of the projection moves is up to rounding, so
    ours counts where it differs from this by no more than one.
    """
    share, number = self.shares[len(self.points) - 1], self.x.size
    moved = round(share * number * 1.5)
    np.testing.assert_allclose(share, moved / number / 1.5, rtol=1e-9)
    assert abs(moved - np.sum(point != self.x)) <= 1
    return moved, share

  def run(self, begin, evaluations, sparse):
    """Walks on from `begin`; returns the best point."""
    norm, steps, number = self.norm, self.steps, self.x.size
    loss, gradient = next(evaluations)
    current = before = begin
    best, best_gradient, best_loss = begin, gradient, loss
    self.points.append(begin)
    size = self.radius if norm == 'L1' else 2 * self.radius
    self.sizes.append(size)
    old, share = self.moved(begin) if sparse else (number, 0.2)
    # The published code compares the first loss of the loop with 0.
    rises, last_loss, check_loss, reduced = 0, 0.0, best_loss, True
    window, since = max(int((0.04 if norm == 'L1' else 0.22) * steps), 1), 0
    for iteration in range(steps):
      step = size * attack_oracles.direction(gradient, norm, share)
      target = attack_oracles.project(current + step, self.x, norm, self.radius)
      if norm != 'L1' and iteration:
        target = attack_oracles.project(
            current + 0.75 * (target - current) + 0.25 * (current - before),
            self.x, norm, self.radius)
      before, current = current, target
      loss, gradient = next(evaluations)
      self.points.append(current)
      rises, last_loss = rises + (loss > last_loss), loss
      if loss > best_loss:
        best, best_gradient, best_loss = current, gradient, loss
      since += 1
      if since == window:
        if norm == 'L1':
          moved, share = self.moved(best)
          again = moved / old < 0.95
          self.events['sparser' if again else 'not sparser'] += 1
          size = self.radius if again else max(size / 1.5, self.radius / 10)
          old = moved
        else:
          few = rises <= 0.75 * window
          stuck = not reduced and check_loss >= best_loss
          self.events[f'few {few} stuck {stuck}'] += 1
          self.events['exactly 75 %'] += rises == 0.75 * window
          again = few or stuck
          size = size / 2 if again else size
          reduced, check_loss = again, best_loss
          window = max(
              window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        if again:
          current, gradient = best, best_gradient
        rises = since = 0
      self.sizes.append(size)
    return best


def made_up(evaluations, seed=0):
  """Losses [T, B], whole numbers with ties, gradients and images in float64."""
  rng = np.random.default_rng(seed)
  x = rng.uniform(size=(COUNT, *SHAPE))
  # From rows that seldom rise to rows that rise often; in the second half a
  # fall undoes many rises, so that the best loss stays where it was.
  rate = np.tile(np.linspace(0.6, 0.95, COUNT // 2), 2)
  fall = np.repeat([2, 25], COUNT // 2)
  up = rng.integers(0, 3, (evaluations, COUNT))
  walk = np.where(
      rng.uniform(size=(evaluations, COUNT)) < rate, 1 + up, -up * fall)
  gradients = rng.normal(size=(evaluations, COUNT, *SHAPE))
  # Entries differ in weight, so that L1 steps of several sparsities differ.
  gradients *= np.exp(rng.normal(size=SHAPE) * 2)
  # Gradients near the floor of the divisor of an L2 step.
  gradients[:, -1] *= 1e-12
  return np.cumsum(walk, axis=0).astype(np.float64) - 3, gradients, x


def ours(threat, schedule, losses, gradients, x):
  """Points, step sizes, shares of the entries, and reports of our steps."""
  batch = attack_oracles.examples(x)
  state = apgd_steps.start(batch, threat, schedule)
  broken = np.arange(COUNT) % 2 == 0
  points, sizes, shares, reports = [], [], [], []
  for loss, gradient in zip(losses, gradients, strict=True):
    points.append(np.asarray(state.x))
    state, report = apgd_steps.advance(
        state, attack_oracles.seen(gradient, loss, broken), batch.images,
        threat, schedule)
    sizes.append(np.asarray(state.step_size))
    shares.append(np.asarray(state.share))
    reports.append(jax.tree.map(np.asarray, report))
  return np.stack(points), np.stack(sizes), np.stack(shares), reports


@pytest.mark.parametrize('norm, epsilon, steps, staged, events', (
    ('Linf', 0.1, 100, False, {
        'few True stuck False', 'few True stuck True', 'few False stuck False',
        'few False stuck True', 'exactly 75 %'}),
    ('L2', 0.8, 60, False, {
        'few True stuck False', 'few True stuck True', 'few False stuck False',
        'few False stuck True', 'exactly 75 %'}),
    ('L1', 3.0, 100, False, {'sparser', 'not sparser'}),
    ('L1', 1.5, 100, True, {'sparser', 'not sparser'}),
    ('L1', 1.5, 3, True, set()),  # stages of one step
))
def test_steps_of_the_published_algorithm(
    norm, epsilon, steps, staged, events, x64):
  threat = ThreatModel(norm, epsilon)
  schedule = apgd_steps.make_schedule(threat, steps, staged)
  stages = [(1, steps)]
  if staged:
    third = math.ceil(0.3 * steps)
    stages = [(3, third), (2, third), (1, steps - 2 * third)]
  total = steps + len(stages)
  assert len(schedule.first) == total
  losses, gradients, x = made_up(total)
  points, sizes, shares, reports = ours(
      threat, schedule, losses, gradients, x)
  assert points.dtype == np.float64
  happened = collections.Counter()
  for row in range(COUNT):
    evaluations = (
        (losses[t, row], gradients[t, row].ravel()) for t in range(total))
    natural = x[row].ravel()
    begin, expected, step_sizes = points[0, row].ravel(), [], []
    for factor, count in stages:
      port = Port(
          natural, norm, factor * epsilon, count, happened,
          shares[len(expected):, row])
      begin = attack_oracles.project(begin, natural, norm, factor * epsilon)
      begin = port.run(begin, evaluations, len(stages) > 1)
      expected += port.points
      step_sizes += port.sizes
    np.testing.assert_allclose(
        points[:, row].reshape(total, -1), expected, atol=2e-6)
    np.testing.assert_allclose(sizes[:, row], step_sizes, rtol=1e-9)
  assert {name for name, number in happened.items() if number} >= events
  # Only the last ball is the real one.
  judged = total - (stages[-1][1] + 1)
  for time, report in enumerate(reports):
    np.testing.assert_array_equal(
        report.broken, (np.arange(COUNT) % 2 == 0) & (time >= judged))
    assert (report.finished == (time == total - 1)).all()
    np.testing.assert_array_equal(report.candidates, points[time])


def test_reports_the_end_and_gradients_of_zero_at_the_start(x64):
  threat = ThreatModel('Linf', 0.1)
  schedule = apgd_steps.make_schedule(threat, 4, False)
  losses, gradients, x = made_up(8)
  gradients[:, 0] = 0
  gradients[:, 1, 1:] = 0
  gradients[2:, 2] = 0
  # The engine may step on a place whose run is over before it looks at it.
  points, _, _, reports = ours(threat, schedule, losses, gradients, x)
  assert np.isfinite(points).all()
  for time, report in enumerate(reports):
    assert (report.finished == (time >= 4)).all()
    zero = np.flatnonzero(report.zero_gradient).tolist()
    assert zero == ([0] if time == 0 else [])


@pytest.mark.parametrize('steps, times', (
    (1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (10, [2, *range(3, 11)]),
    (20, [4, 7, 9, *range(10, 21)]), (50, [11, 21, 30, 38, 45]),
    (100, [22, 41, 57, 70, 80, 87, 93, 99]),
    (200, [44, 82, 114, 140, 160, 174, 186, 198])))
def test_checkpoints(steps, times):
  windows = apgd_steps.checkpoint_windows(steps)
  assert len(windows) == steps + 1
  assert [t for t, window in enumerate(windows) if window] == times
  assert [windows[t] for t in times] == np.diff([0, *times]).tolist()


@pytest.mark.parametrize('steps, lengths', (
    (100, (30, 30, 40)), (250, (75, 75, 100)), (33, (10, 10, 13)),
    (5, (2, 2, 1)), (3, (1, 1, 1)), (4, (4,)), (2, (2,)), (1, (1,))))
def test_stages(steps, lengths):
  schedule = apgd_steps.make_schedule(ThreatModel('L1', 2.0), steps, True)
  factors = (3, 2, 1)[-len(lengths):]
  first, last, epsilon, window = [], [], [], []
  for factor, length in zip(factors, lengths, strict=True):
    every = max(int(0.04 * length), 1)
    first += [True] + length * [False]
    last += (length + 1) * [factor == 1]
    epsilon += (length + 1) * [2.0 * factor]
    window += [0] + [
        0 if t % every else every for t in range(1, length + 1)]
  assert schedule == (
      tuple(first), tuple(last), tuple(epsilon), tuple(window))
  assert set(apgd_steps.make_schedule(
      ThreatModel('L1', 2.0), steps, False).epsilon) == {2.0}


def test_sparsity_must_fall_below_95_percent(x64):
  threat = ThreatModel('L1', 3.0)
  schedule = apgd_steps.make_schedule(threat, 100, False)
  x = np.full((COUNT, *SHAPE), 0.5)
  state = apgd_steps.start(attack_oracles.examples(x), threat, schedule)
  # Row i has moved i entries, where 20 had moved at the last checkpoint.
  best = x.reshape(COUNT, -1) + 0.01 * (
      np.arange(x[0].size) < np.arange(COUNT)[:, None])
  state = state._replace(
      best=jnp.asarray(best.reshape(x.shape)), best_loss=jnp.ones(COUNT),
      sparsity=jnp.full(COUNT, 20.0), step_size=jnp.full(COUNT, 1.2),
      time=jnp.full(COUNT, 4, jnp.int32))
  after, _ = apgd_steps.advance(
      state, attack_oracles.seen(np.ones_like(x), np.zeros(COUNT)), x, threat,
      schedule)
  moved = np.arange(COUNT)
  np.testing.assert_allclose(
      after.step_size, np.where(moved < 19, 3.0, 0.8), rtol=1e-12)
  np.testing.assert_array_equal(after.sparsity, moved)
  np.testing.assert_allclose(after.share, moved / x[0].size / 1.5, rtol=1e-12)


@pytest.mark.parametrize('norm, staged', (
    ('Linf', False), ('L2', False), ('L1', False), ('L1', True)))
def test_starts(norm, staged, x64):
  epsilon = 4.0 if norm == 'L1' else 0.25
  threat = ThreatModel(norm, epsilon)
  schedule = apgd_steps.make_schedule(threat, 10, staged)
  x = np.full((COUNT, 40, 2), 0.5)
  batch = attack_oracles.examples(x)
  state = apgd_steps.start(batch, threat, schedule)
  delta = np.asarray(state.x) - x
  radius = 3 * epsilon if staged else epsilon
  np.testing.assert_allclose(
      threat.distance(state.x, x), radius, rtol=1e-6)
  np.testing.assert_array_equal(state.previous, state.x)
  assert (np.asarray(state.time) == 0).all()
  flat = delta.reshape(COUNT, -1)
  # Each example draws from its own key.
  assert len(np.unique(flat, axis=0)) == COUNT
  assert abs(np.sign(flat).sum()) < 0.2 * np.abs(np.sign(flat)).sum()
  if norm == 'Linf':
    # Uniform: all of [-epsilon, epsilon], and half of it beyond half of it.
    assert (flat.min(-1) < -0.9 * 0.25).all()
    assert (flat.max(-1) > 0.9 * 0.25).all()
    assert 0.4 < np.mean(np.abs(flat) > 0.125) < 0.6
  elif norm == 'L2':
    # Normal: the fourth moment is three times the square of the second.
    kurtosis = np.mean(flat ** 4) / np.mean(flat ** 2) ** 2
    assert 2.6 < kurtosis < 3.4


def test_l1_starts_spread_by_the_width_of_the_box(x64):
  # In a ball of any size, noise is cut off at half a standard deviation.
  threat = ThreatModel('L1', 1e3, -1.0, 1.0)
  schedule = apgd_steps.make_schedule(threat, 10, False)
  x = np.zeros((COUNT, 40, 2))
  state = apgd_steps.start(attack_oracles.examples(x), threat, schedule)
  outside = 1 - math.erf(0.5 / math.sqrt(2))
  # Five standard errors.
  assert abs(np.mean(np.abs(state.x) == 1) - outside) < 5 * np.sqrt(
      outside * (1 - outside) / x.size)
