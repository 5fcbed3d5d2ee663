"""PGD against its closed form on linear models, and what must be rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import (
  cross_entropy,
  cw_margin,
  fgsm,
  kl_divergence,
  pgd,
  pgd_with_state,
)
from awp_jax.attacks.pgd import Attack, run_pgd
from awp_jax.core import loops
from awp_jax.threat import ThreatModel

NORMS = ('Linf', 'L2')

WEIGHTS = jnp.array([0.6, -1.5, 0.2, 0.7])
INSIDE = jnp.array([[0.5, 0.4, 0.55, 0.6], [0.45, 0.5, 0.5, 0.5]])


def linear_loss(x):
  return x.reshape(len(x), -1) @ WEIGHTS


def optimum(norm, epsilon):
  """argmax of <w, x'> over the ball, for a ball inside the box."""
  if norm == 'Linf':
    return INSIDE + epsilon * jnp.sign(WEIGHTS)
  return INSIDE + epsilon * WEIGHTS / jnp.linalg.norm(WEIGHTS)


def attack(norm, epsilon, step_size=0.05, num_steps=20, start='random'):
  return pgd(
      jax.random.key(0), linear_loss, INSIDE, ThreatModel(norm, epsilon),
      step_size=step_size, num_steps=num_steps, start=start)


@pytest.mark.parametrize('start', ['random', 'zero', 'gaussian'])
@pytest.mark.parametrize('norm', NORMS)
def test_reaches_the_optimum_of_a_linear_model(norm, start):
  # From a start at an angle, the L_2 iteration turns towards the optimum but
  # does not land on it in 20 steps; the zero start does.
  tolerance = 1e-6 if norm == 'Linf' or start == 'zero' else 2e-3
  got = attack(norm, 0.1, start=start)
  np.testing.assert_allclose(got, optimum(norm, 0.1), atol=tolerance)


@pytest.mark.parametrize('norm', NORMS)
def test_path_before_the_boundary_is_the_sum_of_steps(norm):
  got = attack(norm, 0.1, step_size=0.01, num_steps=3, start='zero')
  np.testing.assert_allclose(got, optimum(norm, 0.03), atol=1e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_oracle_rejects_another_epsilon_or_step(norm):
  def differs(a, b):
    return np.abs(np.asarray(a - b)).max() > 1e-3

  assert differs(attack(norm, 0.11, start='zero'), optimum(norm, 0.1))
  short = attack(norm, 0.1, step_size=0.012, num_steps=3, start='zero')
  assert differs(short, optimum(norm, 0.03))


@pytest.mark.parametrize('norm', NORMS)
def test_stays_in_the_box(norm):
  x = jnp.array([[0.95, 0.02, 1.0, 0.0]])
  got = pgd(
      jax.random.key(0), linear_loss, x, ThreatModel(norm, 0.5),
      step_size=0.1, num_steps=30)
  assert got.min() >= 0 and got.max() <= 1
  assert ThreatModel(norm, 0.5).distance(got, x).max() <= 0.5 + 1e-6
  if norm == 'Linf':
    np.testing.assert_allclose(got, [[1, 0, 1, 0.5]], atol=1e-6)


def test_default_start_is_a_draw_by_the_key():
  threat, key = ThreatModel('L2', 0.1), jax.random.key(4)
  options = {'step_size': 1e-9, 'num_steps': 1}
  out = run_pgd(
      key, lambda x, state: (linear_loss(x), state), (), INSIDE, threat,
      **options)
  for got in (pgd(key, linear_loss, INSIDE, threat, **options), out.x_adv):
    np.testing.assert_allclose(
        got, threat.random_start(key, INSIDE), atol=1e-7)
  starts = jnp.stack([threat.random_start(k, INSIDE)
                      for k in jax.random.split(key, 3)])
  best = jnp.argmax(jax.vmap(linear_loss)(starts), axis=0)
  np.testing.assert_allclose(
      pgd(key, linear_loss, INSIDE, threat, **options, restarts=3),
      starts[best, jnp.arange(2)], atol=1e-7)
  assert Attack(0.1, 2) == (0.1, 2, 'random', 1, None, None)


def test_fgsm_is_one_step_of_epsilon():
  threat = ThreatModel('Linf', 0.1)
  np.testing.assert_allclose(
      fgsm(linear_loss, INSIDE, threat), optimum('Linf', 0.1), atol=1e-6)
  np.testing.assert_allclose(
      fgsm(linear_loss, INSIDE, threat, step_size=0.04),
      optimum('Linf', 0.04), atol=1e-6)


@pytest.mark.parametrize('options, length', [
    ({}, 0.02), ({'gradient_floor': jnp.linalg.norm(WEIGHTS)}, 0.01)])
def test_a_floor_of_the_gradient_shortens_l2_steps(options, length):
  for attack_fn in (run_pgd, pgd_with_state):
    x_adv, *_ = attack_fn(
        jax.random.key(0), lambda x, state: (linear_loss(x), state), (), INSIDE,
        ThreatModel('L2', 0.1), step_size=0.02, num_steps=1, start='zero',
        **options)
    np.testing.assert_allclose(x_adv, optimum('L2', length), atol=1e-6)


def test_given_start_is_taken_as_it_is():
  start = INSIDE + 0.03
  got = pgd(
      jax.random.key(0), linear_loss, INSIDE, ThreatModel('Linf', 0.1),
      step_size=0.01, num_steps=1, start=start)
  np.testing.assert_allclose(got, start + 0.01 * jnp.sign(WEIGHTS), atol=1e-6)


def test_gaussian_start_has_its_standard_deviation():
  seen = []

  def loss_fn(x, state):
    jax.debug.callback(lambda v: seen.append(np.asarray(v)), x)
    return jnp.sum(x, axis=1) * 0, state

  x = jnp.full((10, 1000), 0.5)
  pgd_with_state(
      jax.random.key(0), loss_fn, (), x, ThreatModel('Linf', 0.1),
      step_size=0.01, num_steps=1, start='gaussian')
  jax.effects_barrier()
  np.testing.assert_allclose(np.std(seen[0] - x), 0.001, rtol=0.05)


def test_restarts_keep_the_highest_loss_of_each_example():
  # Two maxima, at 0 and at 1; from 0.45 the attack runs to the nearer side of
  # wherever it starts. The loss is higher on the right.
  def loss_fn(x):
    return jnp.where(x[:, 0] < 0.45, 0.45 - x[:, 0], 2 * (x[:, 0] - 0.45))

  x = jnp.full((64, 1), 0.45)
  threat = ThreatModel('Linf', 0.4)

  def best(restarts):
    x_adv = pgd(
        jax.random.key(1), loss_fn, x, threat, step_size=0.1, num_steps=8,
        restarts=restarts)
    return loss_fn(x_adv)

  once, often = best(1), best(8)
  assert 0.2 < np.mean(np.asarray(once) > 0.5) < 0.8
  assert np.mean(np.asarray(often) > 0.5) > 0.95
  assert np.all(often >= 0.4 - 1e-5)


def test_state_moves_once_a_step():
  def loss_fn(x, state):
    return linear_loss(x), state + 1

  _, state = pgd_with_state(
      jax.random.key(0), loss_fn, jnp.int32(0), INSIDE,
      ThreatModel('Linf', 0.1), step_size=0.01, num_steps=7)
  assert state == 7
  _, state = pgd_with_state(
      jax.random.key(0), loss_fn, jnp.int32(0), INSIDE,
      ThreatModel('Linf', 0.1), step_size=0.01, num_steps=7, restarts=3)
  assert state == 3 * (7 + 1)


@pytest.mark.parametrize(
    'start,restarts', [('gaussian', 1), ('gaussian', 2), ('given', 1)])
def test_no_gradient_flows_through_the_attack(start, restarts):
  # x, the start, the loss and its state all depend on the argument, and the
  # attack stays inside the ball, so that each of them would show.
  def attacked(scale):
    x = INSIDE * scale
    return pgd_with_state(
        jax.random.key(0),
        lambda x, state: (scale * linear_loss(x), state * scale), scale, x,
        ThreatModel('L2', 0.3), step_size=0.05, num_steps=1,
        start=x + 0.01 * scale if start == 'given' else start,
        restarts=restarts)

  def total(outputs):
    return sum(jnp.sum(output) for output in outputs)

  assert jax.grad(lambda scale: total(attacked(scale)))(1.0) == 0
  # The same sum, taken by differences, does depend on it.
  up, down = total(attacked(1.01)), total(attacked(0.99))
  assert (up - down) / 0.02 > 1


@pytest.mark.parametrize('norm', [*NORMS, 'L1'])
@pytest.mark.parametrize('restarts', [1, 3])
def test_gradient_entries_that_are_not_finite_count_as_zero(norm, restarts):
  def without_the_entry(x):
    return linear_loss(x.at[:, 0].set(0))

  def with_nan(x):
    # The square root's value is 0 and its derivative 0 * inf.
    return without_the_entry(x) + jnp.sqrt(0 * x[:, 0])

  def run(loss_fn):
    return run_pgd(
        jax.random.key(0), lambda x, state: (loss_fn(x), state), (), INSIDE,
        ThreatModel(norm, 0.1), step_size=0.03, num_steps=4,
        start='random' if restarts > 1 else 'zero', restarts=restarts)

  got = run(with_nan)
  wanted = run(without_the_entry)
  np.testing.assert_allclose(got.x_adv, wanted.x_adv, atol=1e-6)
  assert np.abs(got.x_adv - INSIDE).max() > 0.01
  assert got.nonfinite.tolist() == [True, True]
  assert wanted.nonfinite.tolist() == [False, False]


def test_examples_with_a_gradient_that_is_not_finite_are_named():
  # Infinite for the second example, in the second step only.
  def loss_fn(x, step):
    bad = (jnp.arange(3) == 1) & (step == 1)
    slope = jnp.where(bad, jnp.inf, 1.0)
    return jnp.sum(x, axis=1) * slope, step + 1

  x = jnp.full((3, 2), 0.5).at[2, 0].set(jnp.nan)
  got = run_pgd(
      jax.random.key(0), loss_fn, jnp.int32(0), x, ThreatModel('Linf', 0.1),
      step_size=0.01, num_steps=3, start='zero')
  assert got.nonfinite.tolist() == [False, True, True]
  np.testing.assert_allclose(
      got.x_adv[:2], [[0.53, 0.53], [0.52, 0.52]], atol=1e-6)


def test_restarts_prefer_a_point_at_which_the_loss_is_nan():
  def loss_fn(x):
    return jnp.where(x[:, 0] > 0.55, jnp.nan, x[:, 0])

  x = jnp.full((16, 1), 0.5)
  got = pgd(
      jax.random.key(0), loss_fn, x, ThreatModel('Linf', 0.1), step_size=1e-6,
      num_steps=1, restarts=12)
  assert np.all(got > 0.55)


def test_restarts_prefer_a_misclassified_point_to_a_higher_loss():
  got = run_pgd(
      jax.random.key(0), lambda x, state: (x[:, 0], state), (),
      jnp.full((16, 1), 0.5), ThreatModel('Linf', 0.1), step_size=1e-6,
      num_steps=1, restarts=12, broken_fn=lambda x: x[:, 0] < 0.45)
  assert np.all(got.x_adv < 0.45)


@pytest.mark.parametrize('norm', NORMS)
def test_loop_and_unrolled_agree(norm, monkeypatch):
  weights = jax.random.normal(jax.random.key(2), (4, 3))
  labels = jnp.array([0, 2])

  def run():
    return pgd(
        jax.random.key(0),
        lambda x: cross_entropy(jnp.tanh(x) @ weights, labels), INSIDE,
        ThreatModel(norm, 0.2), step_size=0.03, num_steps=10)

  assert loops.unrolls()
  unrolled = run()
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  np.testing.assert_allclose(run(), unrolled, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_attacks_half_precision_in_float32(dtype):
  # Steps of 0.001 at 0.75 are lost in bfloat16, whose numbers lie 0.004 apart.
  x = jnp.full((1, 2), 0.75, dtype)
  got = pgd(
      jax.random.key(0), lambda x: x @ jnp.array([1.0, -2.0]), x,
      ThreatModel('Linf', 0.1), step_size=0.001, num_steps=8, start='zero')
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(np.abs(got - 0.75), 0.008, rtol=1e-3)


def test_bytes_are_no_inputs():
  with pytest.raises(ValueError, match=r'^x must be .*, got dtype uint8'):
    pgd(jax.random.key(0), linear_loss, jnp.ones((1, 2), jnp.uint8),
        ThreatModel('Linf', 0.1), step_size=0.001, num_steps=8)


@pytest.mark.parametrize('loss', ['ce', 'kl', 'margin'])
def test_attacks_raise_their_loss(loss):
  weights = jax.random.normal(jax.random.key(3), (4, 5))
  labels = jnp.argmax(INSIDE @ weights, axis=1)
  clean = INSIDE @ weights
  loss_fn = {
      'ce': lambda x: cross_entropy(x @ weights, labels),
      'kl': lambda x: kl_divergence(clean, x @ weights),
      'margin': lambda x: cw_margin(x @ weights, labels)}[loss]
  x_adv = pgd(
      jax.random.key(0), loss_fn, INSIDE, ThreatModel('Linf', 0.3),
      step_size=0.05, num_steps=10)
  assert np.all(loss_fn(x_adv) > loss_fn(INSIDE) + 0.1)


@pytest.mark.parametrize('keywords,message', [
    ({'step_size': 0}, '^step_size must be a finite number > 0, got 0'),
    ({'step_size': -1.0}, '^step_size must be a finite number > 0, got -1.0'),
    ({'num_steps': 0}, '^num_steps must be a whole number >= 1, got 0'),
    ({'num_steps': 2.5}, '^num_steps must be a whole number >= 1, got 2.5'),
    ({'restarts': 0}, '^restarts must be a whole number >= 1, got 0'),
    ({'start': 'radnom'}, "^start must be .* Did you mean 'random'"),
    ({'start': 'zero', 'restarts': 2}, 'restarts=2 needs a random start'),
    ({'start': INSIDE, 'restarts': 2}, 'restarts=2 needs a random start'),
    ({'start': jnp.zeros((1, 4))}, r'shape of x, \(2, 4\), got \(1, 4\)'),
    ({'start': jnp.zeros((4, 2))}, r'shape of x, \(2, 4\), got \(4, 2\)'),
    ({'start': None}, '^start must be .* got None'),
])
def test_bad_arguments(keywords, message):
  good = {'step_size': 0.1, 'num_steps': 2}
  with pytest.raises(ValueError, match=message):
    pgd(jax.random.key(0), linear_loss, INSIDE, ThreatModel('Linf', 0.1),
        **(good | keywords))
