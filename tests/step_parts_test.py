"""Parts of the step on models so small that each number is a formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import methods
from awp_jax.perturbation import steps

THREAT = awp_jax.ThreatModel('Linf', 0.1)
#: Hands out what the optimizer is shown: w <- w + shown, state <- gradients.
REVEALING = optax.GradientTransformation(
    lambda params: params, lambda gradients, state, params: (params, gradients))


def affine(params, x):
  x = jnp.tanh(x.reshape(len(x), -1) @ params['kernel'] + params['bias'])
  return x @ params['head']


def state_of(forward_fn, batch_stats=None, tx=REVEALING, **fields):
  rng = np.random.default_rng(1)
  shapes = {'kernel': (4, 5), 'bias': (5,), 'head': (5, 3)}
  params = {name: jnp.asarray(rng.standard_normal(shape))
            for name, shape in shapes.items()}
  return awp_jax.TrainState.create(
      forward_fn=forward_fn, params=params, batch_stats=batch_stats, tx=tx,
      **fields)


def plain_state(**fields):
  return state_of(
      lambda params, stats, x, train, key: (affine(params, x), stats), **fields)


def batch_of(size=6):
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.uniform(0.2, 0.8, (size, 2, 2))),
          jnp.asarray(rng.integers(0, 3, size)))


def step(state, batch, *, key=0, objective=None, attack=None, **keywords):
  return awp_jax.train_step(
      state, batch, jax.random.key(key), threat=keywords.pop('threat', THREAT),
      objective=objective or awp_jax.standard(),
      attack=attack or awp_jax.Attack(0.05, 2), **keywords)


def counting(params, batch_stats, x, train, key):
  """Its statistics count the passes in train mode."""
  return affine(params, x), batch_stats + train


AT, TRADES, MART, NATURAL = (
    awp_jax.standard(), awp_jax.trades(), awp_jax.mart(), awp_jax.natural())


# With two steps of the attack; AT's ends with a third pass.
@pytest.mark.parametrize('objective,statistics,attack,passes', [
    (AT, 'perturbed', {}, 1),
    (AT, 'reference', {}, 2 + 1 + 1 + 1),
    (AT, 'reference', {'restarts': 2}, 2 * (2 + 1) + 1 + 1),
    (AT, 'reference', {'mode': 'eval'}, 1 + 1),
    (TRADES, 'perturbed', {}, 2),
    (TRADES, 'reference', {}, 3),
    (TRADES, 'reference', {'mode': 'train'}, 2 + 1 + 3),
    (MART, 'reference', {}, 2),
    (NATURAL, 'perturbed', {}, 1),
    (NATURAL, 'reference', {}, 1),
])
def test_passes_that_move_the_statistics(
    objective, statistics, attack, passes):
  state = state_of(counting, jnp.float32(0))
  # The ascent's pass moves none.
  state, _ = jax.jit(functools.partial(
      step, objective=objective, statistics=statistics,
      attack=awp_jax.Attack(0.05, 2, **attack),
      perturbation=methods.awp(0.1)))(state, batch_of())
  assert state.batch_stats == passes
  assert state.step == 1


@pytest.mark.parametrize('perturbation', [None, methods.frwp(0)])
def test_a_method_that_is_off_makes_one_plain_round(perturbation, x64):
  state, batch = state_of(counting, jnp.float64(0)), batch_of()
  wanted, plain = step(state, batch, statistics='reference')
  got, metrics = step(
      state, batch, statistics='reference', alternations=3,
      perturbation=perturbation)
  assert got.batch_stats == wanted.batch_stats == 5
  assert metrics.loss == plain.loss == plain.unperturbed_loss
  assert metrics.perturbation_ratio == 0


def test_steps_left_out_make_one_round(x64):
  # Steps 1, 3, ... perturb.
  method = methods.start_after(methods.every_k(methods.awp(0.1), 2), 1)
  keywords = {'statistics': 'reference'}
  turns = jax.jit(functools.partial(
      step, perturbation=method, alternations=3, **keywords))
  plain = jax.jit(functools.partial(step, **keywords))
  always = jax.jit(functools.partial(
      step, perturbation=methods.awp(0.1), alternations=3, **keywords))
  state, batch = state_of(counting, jnp.float64(0)), batch_of()
  for number in range(4):
    state = state.replace(step=jnp.int32(number), batch_stats=jnp.float64(0))
    got, metrics = turns(state, batch)
    wanted, wanted_metrics = (always if number % 2 else plain)(state, batch)
    # Three steps of each attack, the pass at w + v, the one after the update.
    assert got.batch_stats == (3 * 3 if number % 2 else 3) + 1 + 1
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-12),
        (got, metrics), (wanted, wanted_metrics))
  assert metrics.perturbation_ratio > 0


def loss_at(params, x, y):
  return jnp.mean(awp_jax.cross_entropy(affine(params, x), y))


def test_mask_and_update(x64):
  # Optimizer and metrics see v of the chosen leaf, and none of the others.
  state, (x, y) = plain_state(), batch_of()
  out, metrics = step(
      state, (x, y), objective=NATURAL,
      perturbation=methods.awp(0.1, mask='kernel'))
  v = jax.tree.map(lambda new, w: new - 2 * w, out.params, state.params)
  w, g = state.params, jax.grad(loss_at)(state.params, x, y)
  length = 0.1 * np.linalg.norm(w['kernel']) / np.linalg.norm(g['kernel'])
  np.testing.assert_allclose(v['kernel'], length * g['kernel'], atol=1e-12)
  assert np.abs(v['kernel']).max() > 0.1
  assert np.abs(v['bias']).max() < 1e-15 > np.abs(v['head']).max()
  np.testing.assert_allclose(metrics.perturbation_ratio, 0.1, rtol=1e-10)
  gradient = jax.grad(loss_at)(w | {'kernel': w['kernel'] + v['kernel']}, x, y)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-12), out.opt_state,
      gradient)
  np.testing.assert_allclose(
      metrics.gradient_norm, np.sqrt(sum(
          np.square(leaf).sum() for leaf in gradient.values())), rtol=1e-10)
  logits = affine(w | {'kernel': w['kernel'] + v['kernel']}, x)
  assert metrics.robust_accuracy == np.mean(logits.argmax(axis=1) == y)
  assert 0 < metrics.robust_accuracy < 1


def test_policies_train_the_same_weights_with_other_statistics(x64):
  state = state_of(counting, jnp.float64(0))
  outs = [
      step(state, batch_of(), statistics=statistics, alternations=2,
           perturbation=methods.awp(0.1))
      for statistics in ('perturbed', 'reference')]
  for a, b in zip(*(jax.tree.leaves((out.params, metrics))
                    for out, metrics in outs), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-14)
  assert outs[0][0].batch_stats == 1
  assert outs[1][0].batch_stats == 2 * (2 + 1) + 1 + 1


def with_dropout(params, batch_stats, x, train, key):
  if train:
    params = params | {'kernel': params['kernel'] * 2 * jax.random.bernoulli(
        key, 0.5, (1, 5))}
  return affine(params, x), batch_stats


@pytest.mark.parametrize('num_steps', [1, 3])
def test_ascent_and_descent_share_their_dropout_mask(num_steps, x64):
  # The loss rises by gamma sum_l |w_l| |g_l| if v follows the gradient of the
  # very loss that is descended; along that of other masks it rises by less.
  state, batch = state_of(with_dropout), batch_of()
  gamma = 1e-6
  for key in range(3):
    plain, before = step(state, batch, key=key, objective=NATURAL)
    _, after = step(
        state, batch, key=key, objective=NATURAL,
        perturbation=methods.awp(gamma, num_steps=num_steps))
    rise = sum(
        np.linalg.norm(state.params[name])
        * np.linalg.norm(plain.opt_state[name]) for name in ('kernel', 'head'))
    np.testing.assert_allclose(
        (after.loss - before.loss) / gamma, rise, rtol=1e-4)


def seeing(params, batch_stats, x, train, key):
  """Its statistics are the last input and key."""
  seen = {'x': x, 'key': jax.random.key_data(key)} if train else batch_stats
  return affine(params, x), seen


def expected_keys(key, number, device=None):
  """The keys of attack and dropout of a step, by their definition."""
  key = jax.random.fold_in(jax.random.key(key), number)
  if device is not None:
    key = jax.random.fold_in(key, device)
  attack_key, dropout_key = jax.random.split(key)
  start_key, _ = jax.random.split(jax.random.split(attack_key, 1)[0])
  return start_key, dropout_key


@pytest.mark.parametrize('key,number', [(0, 0), (0, 1), (1, 0)])
def test_noise_and_masks_derive_from_key_and_step(key, number, x64):
  (x, y) = batch_of()
  state = state_of(seeing, {'x': x, 'key': jnp.zeros(2, jnp.uint32)})
  out, _ = step(
      state.replace(step=number), (x, y), key=key,
      attack=awp_jax.Attack(1e-9, 1))
  start_key, dropout_key = expected_keys(key, number)
  np.testing.assert_allclose(
      out.batch_stats['x'], THREAT.random_start(start_key, x), atol=1e-8)
  np.testing.assert_array_equal(
      out.batch_stats['key'], jax.random.key_data(dropout_key))


def test_devices_draw_noise_of_their_own(x64):
  x, y = batch_of(8)
  state = state_of(
      lambda params, stats, x, train, key: (affine(params, x), x),
      x[:2])

  def on_device(x, y):
    out, metrics = step(
        state.replace(step=3), (x, y), axis_name='d',
        attack=awp_jax.Attack(1e-9, 1))
    return out.batch_stats, metrics.robust_accuracy

  # Statistics are means over the devices: here of their starts.
  got, _ = jax.vmap(on_device, axis_name='d')(
      x.reshape(4, 2, 2, 2), y.reshape(4, 2))
  starts = [
      THREAT.random_start(expected_keys(0, 3, device)[0], x[2 * device:][:2])
      for device in range(4)]
  for device in range(4):
    np.testing.assert_allclose(got[device], np.mean(starts, axis=0), atol=1e-8)


def test_noise_of_the_weights_is_one_for_all_devices(x64):
  x, y = batch_of(8)
  method = methods.random(0.1)
  state = plain_state(method=method)

  def on_device(x, y):
    return step(state.replace(step=3), (x, y), axis_name='d',
                perturbation=method)[0].params

  wanted = steps.find_perturbation(method, loss_at)(
      state.params, awp_jax.MethodState(jnp.int32(3), ()),
      noise_key=jax.random.fold_in(jax.random.key(0), 2**32 - 1))
  got = jax.vmap(on_device, axis_name='d')(
      x.reshape(4, 2, 2, 2), y.reshape(4, 2))
  for name, w in state.params.items():
    shown = w + wanted[name] if method.update_at == 'perturbed' else w
    np.testing.assert_allclose(got[name], [w + shown] * 4, atol=1e-12)


def test_methods_of_two_batches_halve_this_one(x64):
  (x, y), method = batch_of(), methods.frwp(0.1, alpha=0.25)
  state = plain_state(method=method)
  out, metrics = step(state, (x, y), objective=NATURAL, perturbation=method)
  v = steps.find_perturbation(method, loss_at)(
      state.params, awp_jax.MethodState(jnp.int32(0), ()),
      noise_key=jax.random.fold_in(jax.random.key(0), 2**32 - 1))
  value_and_grad = jax.value_and_grad(loss_at)
  moved, g_moved = value_and_grad(
      jax.tree.map(jnp.add, state.params, v), x[::2], y[::2])
  still, g_still = value_and_grad(state.params, x[1::2], y[1::2])
  np.testing.assert_allclose(
      metrics.loss, 0.25 * moved + 0.75 * still, rtol=1e-12)
  jax.eval_shape(functools.partial(
      step, objective=NATURAL, perturbation=method), state, (x[:2], y[:2]))
  for name in state.params:
    np.testing.assert_allclose(
        out.opt_state[name], 0.25 * g_moved[name] + 0.75 * g_still[name],
        atol=1e-12)


def test_unperturbed_loss_is_the_loss_at_the_weights(x64):
  state, (x, y) = plain_state(), batch_of()
  attack = awp_jax.Attack(0.05, 2, start='zero')
  _, plain = step(state, (x, y), attack=attack)
  assert plain.unperturbed_loss == plain.loss
  for alternations in (1, 2):
    _, metrics = step(
        state, (x, y), attack=attack, alternations=alternations,
        perturbation=methods.awp(0.2, num_steps=2))
    np.testing.assert_allclose(
        metrics.unperturbed_loss, plain.loss, rtol=1e-12)
    assert metrics.loss > plain.loss + 0.01
  # Neither noise nor a threshold on the examples evaluates it.
  for method in (methods.random(0.1), methods.rwp(0.1, c_min=0.5)):
    _, metrics = step(state, (x, y), attack=attack, perturbation=method)
    assert np.isnan(metrics.unperturbed_loss) and np.isfinite(metrics.loss)


def test_perturbation_ratio_counts_the_perturbed_leaves_alone(x64):
  # Gains [L, D] of stacked layers are vectors in each layer: no weights.
  def forward_fn(params, stats, x, train, key):
    x, _ = jax.lax.scan(
        lambda x, layer: (jnp.tanh(x @ layer['kernel']) * layer['gain'], None),
        x.reshape(len(x), -1), params['layers'])
    return x @ params['head'], stats

  rng = np.random.default_rng(1)
  params = {
      'layers': {'kernel': jnp.asarray(rng.standard_normal((2, 4, 4))),
                 'gain': jnp.full((2, 4), 3.0)},
      'head': jnp.asarray(rng.standard_normal((4, 3)))}
  state = awp_jax.TrainState.create(
      forward_fn=forward_fn, params=params, batch_stats=None, tx=REVEALING)
  _, metrics = step(
      state, batch_of(), objective=NATURAL,
      perturbation=methods.awp(0.1, stack_axes={'layers/*': 1}))
  np.testing.assert_allclose(metrics.perturbation_ratio, 0.1, rtol=1e-10)


@pytest.mark.parametrize('devices', [None, 4])
def test_gradient_floor_is_that_of_the_mean_loss(devices, x64):
  # A floor f on |grad of the mean| is B f on the gradient of an example's own
  # loss, B being the batch of all devices.
  x, y = batch_of(8)
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.standard_normal((4, 3)))
  objective = AT._replace(
      attack_loss=lambda logits, natural, labels: logits[:, 0],
      gradient_floor=0.25)
  state = awp_jax.TrainState.create(
      forward_fn=lambda params, stats, x, train, key: (
          x.reshape(len(x), -1) @ params['w'], x),
      params={'w': w}, tx=REVEALING,
      batch_stats=x[:8 // (devices or 1)])

  def x_adv(x, y, axis_name=None):
    return step(
        state, (x, y), objective=objective, axis_name=axis_name,
        threat=awp_jax.ThreatModel('L2', 0.3),
        attack=awp_jax.Attack(0.05, 1, start='zero'))[0].batch_stats

  gradient = np.asarray(w[:, 0]).reshape(2, 2)
  wanted = x + 0.05 * gradient / (np.linalg.norm(gradient) + 8 * 0.25)
  if devices is None:
    got = x_adv(x, y)
  else:
    got = jax.vmap(functools.partial(x_adv, axis_name='d'), axis_name='d')(
        x.reshape(4, 2, 2, 2), y.reshape(4, 2))[0]
    wanted = wanted.reshape(4, 2, 2, 2).mean(axis=0)
  np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_a_nan_in_the_attack_leaves_the_weights_finite(x64):
  # The first pixel's gradient is NaN; no other number is.
  def forward_fn(params, stats, x, train, key):
    return affine(params, x) + jnp.sqrt(0 * x[:, 0, :1]), x

  x, y = batch_of()
  out, metrics = step(
      state_of(forward_fn, x), (x, y),
      attack=awp_jax.Attack(0.05, 2, start='zero'))
  x_adv = out.batch_stats
  np.testing.assert_array_equal(x_adv[:, 0, 0], x[:, 0, 0])
  np.testing.assert_allclose(
      np.abs(x_adv - x).reshape(6, 4)[:, 1:], 0.1, rtol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(
      (out, metrics.loss, metrics.gradient_norm)))


def test_logits_that_are_not_finite_are_not_robust():
  x, y = batch_of()
  # Class 0 everywhere, as the argmax of NaN would say, too.
  state = state_of(lambda params, stats, x, train, key: (
      affine(params, x).at[:, 0].set(9).at[1, 1].set(jnp.nan), stats))
  _, metrics = step(state, (x, 0 * y), objective=NATURAL)
  np.testing.assert_allclose(metrics.robust_accuracy, 5 / 6, rtol=1e-6)
