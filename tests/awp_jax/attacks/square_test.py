"""Square Attack: schedule, patterns and proposals against loops in NumPy."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import square, square_patterns
from awp_jax.attacks.square_patterns import SquareSchedule
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles

NORMS = ('Linf', 'L2', 'L1')


@pytest.mark.parametrize('rescale, queries', (
    (False, (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)),
    # Of 5000 queries: half as many.
    (True, (5, 25, 100, 250, 500, 1000, 2000, 3000, 4000))))
def test_share_halves_after_the_published_numbers_of_queries(rescale, queries):
  schedule = SquareSchedule(5000, 0.8, rescale)
  assert square_patterns.window_share(0, schedule) == 0.8
  for number, query in enumerate(queries):
    before = square_patterns.window_share(query, schedule)
    after = square_patterns.window_share(query + 1, schedule)
    assert before == pytest.approx(0.8 / 2 ** number, rel=1e-12)
    assert after == pytest.approx(0.8 / 2 ** (number + 1), rel=1e-12)


def test_a_rescaled_schedule_rounds_queries_down():
  # Queries 8000.8 and 8001.2 of the 10,000 of the schedule, rounded down.
  schedule = SquareSchedule(25000, 0.8, True)
  shares = [
      square_patterns.window_share(k, schedule) for k in (20002, 20003)]
  np.testing.assert_allclose(shares, [0.8 / 2 ** 8, 0.8 / 2 ** 9], rtol=1e-12)


@pytest.mark.parametrize('height, width, odd, expected', (
    (32, 32, False, (29, 20, 14, 10)), (32, 32, True, (29, 21, 15, 11)),
    (7, 40, False, (7, 7, 7, 5)), (4, 4, True, (4, 3, 3, 3)),
    (2, 2, False, (2, 1, 1, 1)), (1, 1, True, (1, 1, 1, 1))))
def test_sides(height, width, odd, expected):
  # sqrt(p h w), rounded, of p = 0.8, 0.4, 0.2, 0.1.
  schedule = SquareSchedule(202, 0.8, False)
  sides = square_patterns.window_sides(schedule, height, width, odd)
  assert sides.shape == (202,)
  assert tuple(sides[[10, 11, 51, 201]]) == expected
  assert sides[0] == sides[10]


@pytest.mark.parametrize('height, width', ((1, 1), (2, 5), (5, 4), (3, 9)))
@pytest.mark.parametrize('power', (2, 4))
def test_bumps(height, width, power):
  rings = max(height // 2, width // 2) + 1
  expected = np.zeros((height, width))
  for i in range(height):
    for j in range(width):
      ring = max(abs(i - height // 2), abs(j - width // 2))
      expected[i, j] = sum((k + 1.0) ** -power for k in range(ring, rings))
  np.testing.assert_allclose(
      square_patterns.bump(height, width, power), expected, rtol=1e-12)


@pytest.mark.parametrize('side', (1, 2, 3, 6, 7))
@pytest.mark.parametrize('norm, power', (('L2', 2), ('L1', 4)))
def test_patterns_are_two_opposite_bumps_of_equal_norm(side, norm, power):
  parts = []
  for height, sign in ((side // 2, 1), (side - side // 2, -1)):
    hill = square_patterns.bump(height, side, power) if height else (
        np.zeros((0, side)))
    size = np.sqrt(np.sum(hill ** 2)) if norm == 'L2' else np.sum(hill)
    parts.append(sign * hill / max(size, 1e-9))
  halves = 2 if side > 1 else 1
  scale = np.sqrt(halves) if norm == 'L2' else halves
  ours = square_patterns.pattern(side, norm)
  np.testing.assert_allclose(ours, np.concatenate(parts) / scale, atol=1e-6)
  assert ours.dtype == np.float32
  padded = square_patterns.patterns((1, side, 8), norm)
  assert padded.shape == (3, 8, 8)
  np.testing.assert_array_equal(padded[1, :side, :side], ours)
  assert not padded[1, side:].any() and not padded[1, :, side:].any()


def corner(uniform, side, shape):
  """Every place where a window fits is as likely."""
  return [int(u * (n - side + 1)) for u, n in zip(uniform, shape, strict=True)]


def proposal(key, best, x, side, threat):
  """The next candidate of one example, from the draws of its key."""
  height, width, channels = x.shape
  draws = np.asarray(jax.random.uniform(key, (5 + channels,)), np.float64)
  signs = np.where(draws[5:] < 0.5, -1.0, 1.0)
  row, column = corner(draws[:2], side, (height, width))
  window = (slice(row, row + side), slice(column, column + side))
  delta, epsilon = best - x, threat.epsilon
  if threat.norm == 'Linf':
    delta[window] += 2 * epsilon * signs
    return np.clip(x + np.clip(delta, -epsilon, epsilon), 0, 1)
  row, column = corner(draws[2:4], side, (height, width))
  given_up = (slice(row, row + side), slice(column, column + side))
  power = 2 if threat.norm == 'L2' else 1
  hill = square_patterns.pattern(side, threat.norm).astype(np.float64)
  hill = hill.T if draws[4] > 0.5 else hill
  union = np.zeros((height, width), bool)
  union[window] = union[given_up] = True
  spare = max(epsilon ** power - np.sum(np.abs(delta) ** power), 0) / channels
  new = np.zeros((side, side, channels))
  for c in range(channels):
    old = delta[..., c][window]
    size = np.sum(np.abs(old) ** power) ** (1 / power)
    mixed = signs[c] * hill + old / (1e-12 + size)
    moved = np.sum(np.abs(delta[..., c][union]) ** power)
    target = (spare + moved) ** (1 / power) * (
        channels if power == 1 else 1)
    new[..., c] = mixed * target / np.sum(np.abs(mixed) ** power) ** (1 / power)
  delta[given_up] = 0
  delta[window] = new
  if threat.norm == 'L2':
    return np.clip(x + epsilon * delta / np.sqrt(np.sum(delta ** 2)), 0, 1)
  return x + attack_oracles.project_l1(delta, x, epsilon * (1 - 1e-6))


@pytest.mark.parametrize('norm, epsilon', (
    ('Linf', 0.2), ('L2', 1.0), ('L1', 4.0)))
def test_proposals(norm, epsilon, x64):
  rng = np.random.default_rng(0)
  count, shape = 24, (7, 9, 2)
  threat = ThreatModel(norm, epsilon)
  schedule = SquareSchedule(52, 0.5, False)
  x = rng.uniform(size=(count, *shape))
  best = np.array(threat.project(x + rng.normal(size=x.shape) * 0.2, x))
  # Some keep less than the whole radius, and some windows hold nothing.
  best[::3] = x[::3] + (best[::3] - x[::3]) * 0.5
  best[1] = x[1]
  queries = rng.permutation(np.arange(count) * 3)
  queries[0] = 200  # past the end
  keys = jax.random.split(jax.random.key(3), count)
  propose = jax.jit(square.propose, static_argnums=(4, 5))
  ours = np.asarray(propose(
      keys, jnp.asarray(best), jnp.asarray(x), jnp.asarray(queries), threat,
      schedule))
  sides = square_patterns.window_sides(schedule, 7, 9, norm != 'Linf')
  assert len(set(sides)) > 2 and sides[51] < sides[50]
  for i in range(count):
    expected = proposal(
        keys[i], best[i], x[i], sides[min(queries[i], 51)], threat)
    np.testing.assert_allclose(ours[i], expected, atol=1e-6)
  # In other units.
  bytes_ = propose(
      keys, jnp.asarray(255 * best), jnp.asarray(255 * x),
      jnp.asarray(queries), ThreatModel(norm, 255 * epsilon, 0.0, 255.0),
      schedule)
  np.testing.assert_allclose(bytes_, 255 * ours, atol=1e-4)


def test_starts_with_vertical_stripes_of_random_sign(x64):
  x = np.full((12, 5, 8, 3), 0.5)
  threat = ThreatModel('Linf', 0.1)
  state = square.start(attack_oracles.examples(x), threat)
  delta = np.asarray(state.x) - x
  np.testing.assert_allclose(np.abs(delta), 0.1, rtol=1e-12)
  assert (delta == delta[:, :1]).all()
  # Columns, channels and examples are independent: half of all pairs agree.
  stripes = np.sign(delta[:, 0])
  for pair in ((stripes[:, 1:], stripes[:, :-1]),
               (stripes[..., 1:], stripes[..., :-1]),
               (stripes[1:], stripes[:-1]), (stripes, 1)):
    assert abs(np.mean(pair[0] * pair[1])) < 0.2
  np.testing.assert_array_equal(state.best, state.x)
  np.testing.assert_array_equal(state.margin, np.full(12, -np.inf))
  np.testing.assert_array_equal(state.time, np.zeros(12))


@pytest.mark.parametrize('norm, shape', (
    ('L2', (13, 16, 2)), ('L1', (11, 11, 1)), ('L2', (3, 2, 1)),
    ('L2', (17, 23, 1)), ('L2', (10, 3, 1))))
def test_starts_with_tiles(norm, shape, x64):
  height, width, channels = shape
  x = np.random.default_rng(0).uniform(0.3, 0.7, size=(8, *shape))
  threat = ThreatModel(norm, 0.5)
  batch = attack_oracles.examples(x)
  ours = np.asarray(square.start(batch, threat).x)
  side = max(height // 5, 1)
  rows, columns = height // side, max(width // side, 1)
  tile = square_patterns.pattern(side, norm)
  for i in range(8):
    draws = np.asarray(jax.random.rademacher(
        batch.keys[i], (rows, columns, channels + 1), float))
    delta = np.zeros(shape)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    for row in range(rows):
      for column in range(columns):
        upright = draws[row, column, -1] > 0
        laid = (tile if upright else tile.T)[..., None]
        begin = top + row * side, left + column * side
        delta[begin[0]:begin[0] + side, begin[1]:begin[1] + side] = (
            laid * draws[row, column, :-1])
    if norm == 'L2':
      expected = x[i] + 0.5 * delta / np.sqrt(np.sum(delta ** 2))
    else:
      expected = x[i] + attack_oracles.project_l1(
          delta, x[i], 0.5 * (1 - 1e-6))
    np.testing.assert_allclose(ours[i], expected, atol=1e-9)
  assert (np.asarray(threat.distance(ours, x)) <= 0.5 + 1e-12).all()


def test_keeps_what_raises_the_margin(x64):
  threat, schedule = ThreatModel('Linf', 0.1), SquareSchedule(5, 0.5, False)
  x = np.full((5, 4, 4, 1), 0.5)
  batch = attack_oracles.examples(x, [0] * 5)
  old, new = jnp.asarray(x), jnp.asarray(x + 0.05)
  # Closer to the boundary, equal, farther, broken, broken less than before.
  logits = np.array([[0.4, 0], [0.5, 0], [0.6, 0], [0, 0.1], [0, 0.1]])
  state = square.SquareState(
      new, old, jnp.asarray([-0.5, -0.5, -0.5, -0.5, 0.2]),
      jnp.asarray([0, 4, 5, 5, 6], jnp.int32))
  after, report = square.advance(
      state, jnp.asarray(logits), batch, threat, schedule)
  better = np.array([True, False, False, True, False])
  np.testing.assert_array_equal(
      after.best, np.where(better[:, None, None, None], new, old))
  np.testing.assert_allclose(
      after.margin, [-0.4, -0.5, -0.5, 0.1, 0.2], rtol=1e-6)
  assert report.broken.tolist() == [False, False, False, True, True]
  assert report.finished.tolist() == [False, False, True, True, True]
  assert not np.asarray(report.zero_gradient).any()
  np.testing.assert_array_equal(report.candidates, new)
  assert after.time.tolist() == [1, 5, 6, 6, 7]
  sides = square_patterns.window_sides(schedule, 4, 4, False)
  for i in range(5):
    time = int(state.time[i])
    expected = proposal(
        jax.random.fold_in(batch.keys[i], time), np.asarray(after.best)[i],
        x[i], sides[min(time, 4)], threat)
    np.testing.assert_allclose(after.x[i], expected, atol=1e-9)


@pytest.mark.parametrize('arguments, allowed', (
    ({'num_queries': 0}, 'a whole number >= 1'),
    ({'restarts': 0}, 'a whole number >= 1'), ({'p_init': 0.0}, 'in (0, 1]'),
    ({'p_init': 1.001}, 'in (0, 1]'), ({'p_init': float('nan')}, 'in (0, 1]')))
def test_bad_settings(arguments, allowed):
  with pytest.raises(ValueError) as error:
    square.square_spec(**arguments)
  ((name, value),) = arguments.items()
  assert str(error.value) == f'{name} must be {allowed}, got {value}.'


def test_what_a_spec_says_of_its_attack():
  spec = square.square_spec(restarts=2)
  assert spec.name == 'square' and spec.needs_images and not spec.white_box
  assert spec.num_targets == 0
  assert spec.build(None, ThreatModel('Linf', 0.1)).num_runs == 2
