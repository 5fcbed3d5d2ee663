"""`eval_step` on models with known results, finite or not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax

THREAT = awp_jax.ThreatModel('Linf', 0.1)
ATTACK = awp_jax.Attack(0.1, 1, start='zero')


def make_state(logits_fn, **fields):
  def forward_fn(params, batch_stats, x, train, key):
    assert train is False and key is None
    return logits_fn(params, batch_stats, x), batch_stats

  return awp_jax.TrainState.create(
      forward_fn=forward_fn, tx=optax.sgd(0.1), **fields)


def evaluate(state, x, y, valid=None, key=0, compiled=True, **keywords):
  arguments = {'threat': THREAT, 'attack': ATTACK} | keywords
  if valid is None:
    valid = jnp.ones(len(x), bool)
  step = functools.partial(awp_jax.eval_step, **arguments)
  return (jax.jit(step) if compiled else step)(
      state, (x, y, valid), jax.random.key(key))


def waves():
  """Logits [0, sin(36 x) + 0.4]: one step overshoots hills and valleys."""
  state = make_state(
      lambda params, stats, x: jnp.concatenate(
          [0 * x, jnp.sin(params['rate'] * x) + stats['offset']], axis=1),
      params={'rate': jnp.asarray(36.0)},
      batch_stats={'offset': jnp.asarray(0.4)})
  x = np.linspace(0.15, 0.85, 24)
  y = np.arange(24) // 2 % 2
  valid = np.arange(24) % 3 > 0
  # The attack follows the slope of the wave; the box is out of reach.
  sign = np.where(y == 1, 1, -1)
  x_adv = x - 0.1 * sign * np.sign(np.cos(36 * x))
  margins = [sign * (np.sin(36 * point) + 0.4) for point in (x, x_adv)]
  return state, jnp.asarray(x)[:, None], jnp.asarray(y), jnp.asarray(
      valid), margins


def test_sums_are_those_of_the_valid_examples(x64):
  state, x, y, valid, (at_x, at_x_adv) = waves()
  kept = np.asarray(valid)
  natural, robust = at_x > 0, (at_x > 0) & (at_x_adv > 0)
  # All four kinds occur among the valid and the invalid examples.
  for rows in (kept, ~kept):
    kinds = set(zip(natural[rows], at_x_adv[rows] > 0, strict=True))
    assert len(kinds) == 4
  got = evaluate(state, x, y, valid)
  assert got.examples == 16 and got.nonfinite == 0
  assert got.natural_correct == natural[kept].sum()
  assert got.robust_correct == robust[kept].sum()
  for loss, margin in ((got.natural_loss, at_x), (got.robust_loss, at_x_adv)):
    np.testing.assert_allclose(
        loss, np.log1p(np.exp(-margin[kept])).sum(), rtol=1e-6)
  soft = evaluate(state, x, jax.nn.one_hot(y, 2), valid)
  np.testing.assert_allclose(soft, got, rtol=1e-6)


def test_sums_run_over_devices(x64):
  state, x, y, valid, _ = waves()
  wanted = evaluate(state, x, y, valid)
  got = jax.vmap(
      functools.partial(evaluate, state, axis_name='d'), axis_name='d')(
          x.reshape(8, 3, 1), y.reshape(8, 3), valid.reshape(8, 3))
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, np.full(8, b), rtol=1e-6)


def test_devices_and_keys_draw_their_own_noise():
  state = make_state(
      lambda params, stats, x: jnp.concatenate([-x, x], axis=1),
      params={'unused': jnp.zeros(1)})
  x, y = jnp.full((8, 1, 1), 0.5), jnp.zeros((8, 1), int)

  def losses(key, start):
    return jax.vmap(
        lambda x, y: evaluate(
            state, x, y, key=key, axis_name='d',
            attack=awp_jax.Attack(1e-9, 1, start=start)).robust_loss,
        axis_name='d')(x, y)[0]

  # The sum over devices of log(1 + exp(2 x')). Equal noise would give eight
  # times the loss of one device.
  start = THREAT.random_start
  keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(8)]
  wanted = sum(float(jnp.logaddexp(0, 2 * start(key, x[0])).sum())
               for key in keys)
  np.testing.assert_allclose(losses(3, 'random'), wanted, rtol=1e-5)
  assert losses(3, 'random') != losses(4, 'random')
  np.testing.assert_allclose(
      losses(3, 'zero'), 8 * np.logaddexp(0, 1), rtol=1e-5)


def linear(params, stats, x):
  return x @ params['w']


def with_nan_gradient(params, stats, x):
  # The value of the square root is 0 and its derivative is 0 * inf.
  return x @ params['w'] + jnp.sqrt(0 * x[:, :1])


def test_a_nan_in_a_gradient_is_reported():
  # Label 0 is the argmax of NaN logits.
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.uniform(0.2, 0.8, (64, 5)), jnp.float32)
  w = rng.standard_normal((5, 3))
  # At the middle of the images, class 0 ties with the best other class.
  w[:, 0] += (w.sum(axis=0).max() - w[:, 0].sum()) / 5
  w = jnp.asarray(w, jnp.float32).at[0].set(0)
  y = jnp.zeros(64, int)
  attack = awp_jax.Attack(0.04, 5, start='zero')
  plain, broken = (
      evaluate(make_state(fn, params={'w': w}), x, y, attack=attack)
      for fn in (linear, with_nan_gradient))
  assert 0 < plain.robust_correct < plain.natural_correct
  assert plain.nonfinite == 0 and broken.nonfinite == 64
  np.testing.assert_allclose(broken[:5], plain[:5], rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_logits_that_are_not_finite_are_wrong(bad):
  # Class 0 everywhere, with a bad logit to the right of a threshold. The attack
  # moves to the right.
  def logits(params, stats, x):
    both = jnp.concatenate([2 - x, 0 * x], axis=1)
    return jnp.where(x > 0.5, jnp.asarray([bad, 0.0]), both)

  state = make_state(logits, params={'w': jnp.zeros(1)})
  x = jnp.array([[0.3], [0.45], [0.7]])
  got = evaluate(state, x, jnp.zeros(3, int))
  assert got.natural_correct == 2 and got.robust_correct == 1
  assert got.nonfinite == 2
  # Restarts keep a point where the model fails.
  often = evaluate(
      state, jnp.full((32, 1), 0.49), jnp.zeros(32, int),
      attack=awp_jax.Attack(1e-6, 1, restarts=8))
  assert often.natural_correct == 32 and often.robust_correct <= 2


def test_inputs_that_are_not_finite_are_wrong():
  state = make_state(
      lambda params, stats, x: jnp.concatenate([1 - x, 0 * x], axis=1),
      params={'w': jnp.zeros(1)})
  got = evaluate(state, jnp.array([[0.1], [jnp.nan]]), jnp.zeros(2, int))
  assert got.natural_correct == got.robust_correct == got.nonfinite == 1


def test_products_run_in_float32():
  state = make_state(linear, params={'w': jnp.ones((5, 3))})
  text = str(jax.make_jaxpr(functools.partial(evaluate, state))(
      jnp.ones((2, 5)), jnp.zeros(2, int)))
  products = text.count('dot_general[')
  assert products >= 4  # two in the attack, two evaluations
  assert text.count('Precision.HIGHEST, Precision.HIGHEST') + text.count(
      'precision=HIGHEST') == products, text


@pytest.mark.parametrize('x,keywords,message', [
    (jnp.ones((2, 5), jnp.uint8), {}, 'divided by 255, got dtype uint8'),
    (jnp.ones((2, 5), jnp.int32), {}, 'divided by 255, got dtype int32'),
    (jnp.ones((2, 5)), {'attack': awp_jax.Attack(0, 1)}, 'step_size .* got 0'),
])
def test_bad_arguments(x, keywords, message):
  state = make_state(linear, params={'w': jnp.ones((5, 3))})
  with pytest.raises(ValueError, match=message):
    evaluate(state, x, jnp.zeros(2, int), **keywords)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_images_in_half_precision_are_attacked_in_float32(dtype):
  # Steps of 0.001 at 0.75 vanish in bfloat16, whose spacing there is 0.004.
  state = make_state(
      lambda params, stats, x: jnp.concatenate([x - 0.745, 0 * x], axis=1),
      params={'w': jnp.zeros(1)})
  images = jnp.full((4, 1), 0.75, dtype)
  got = evaluate(
      state, images, jnp.zeros(4, int), attack=awp_jax.Attack(0.001, 8, 'zero'))
  assert got.natural_correct == 4 and got.robust_correct == 0


def test_any_restart_that_breaks_an_example_counts():
  # At the left end the loss is large and the label correct. In the middle the
  # loss is small and the label wrong.
  def logits(params, stats, x):
    label = jnp.where(jnp.abs(x - 0.5) < 0.02, 0.0, 1.0)
    spread = jnp.where(x < 0.45, 0.9, -5.0)
    return jnp.concatenate(
        [label, jnp.where(label > 0, spread, 0.01), spread], axis=1)

  state = make_state(logits, params={'w': jnp.zeros(1)})
  # Not compiled: the restarts would be written out.
  got = evaluate(
      state, jnp.full((16, 1), 0.47), jnp.zeros(16, int), compiled=False,
      attack=awp_jax.Attack(1e-9, 1, restarts=30))
  once = evaluate(
      state, jnp.full((16, 1), 0.47), jnp.zeros(16, int),
      attack=awp_jax.Attack(1e-9, 1))
  assert got.natural_correct == once.natural_correct == 16
  assert got.robust_correct == 0 and once.robust_correct > 0
