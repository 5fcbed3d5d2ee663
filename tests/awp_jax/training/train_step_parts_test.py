"""Parts of the step on models so small that each number has a formula."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import methods
from awp_jax.perturbation import perturbed_step
from tests.helpers.train_step_problem import (
    AT,
    NATURAL,
    REVEALING,
    THREAT,
    affine,
    batch_of,
    counting,
    plain_state,
    state_of,
    step,
)


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


def test_skipped_steps_make_one_round(x64):
  # Steps 1, 3, ... perturb.
  method = methods.start_after(methods.every_k(methods.awp(0.1), 2), 1)
  keywords = {'statistics': 'reference'}
  alternating = jax.jit(functools.partial(
      step, perturbation=method, alternations=3, **keywords))
  plain = jax.jit(functools.partial(step, **keywords))
  always = jax.jit(functools.partial(
      step, perturbation=methods.awp(0.1), alternations=3, **keywords))
  state, batch = state_of(counting, jnp.float64(0)), batch_of()
  for number in range(4):
    state = state.replace(step=jnp.int32(number), batch_stats=jnp.float64(0))
    got, metrics = alternating(state, batch)
    wanted, wanted_metrics = (always if number % 2 else plain)(state, batch)
    # Three passes per attack, the pass at w + v, the pass after the update.
    assert got.batch_stats == (3 * 3 if number % 2 else 3) + 1 + 1
    chex.assert_trees_all_close(
        (got, metrics), (wanted, wanted_metrics), rtol=1e-7, atol=1e-12)
  assert metrics.perturbation_ratio > 0


def loss_at(params, x, y):
  return jnp.mean(awp_jax.cross_entropy(affine(params, x), y))


def test_mask_and_update(x64):
  # Optimizer and metrics use v of the chosen leaf only.
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
  chex.assert_trees_all_close(out.opt_state, gradient, rtol=1e-7, atol=1e-12)
  np.testing.assert_allclose(
      metrics.gradient_norm, np.sqrt(sum(
          np.square(leaf).sum() for leaf in gradient.values())), rtol=1e-10)
  logits = affine(w | {'kernel': w['kernel'] + v['kernel']}, x)
  assert metrics.robust_accuracy == np.mean(logits.argmax(axis=1) == y)
  assert 0 < metrics.robust_accuracy < 1


@pytest.mark.parametrize('update_at', ['natural', 'perturbed'])
def test_the_optimizer_gets_the_loss_and_the_weights_asked_for(update_at, x64):
  # An optimizer that adds the weights it is given and keeps the loss.
  tx = optax.GradientTransformationExtraArgs(
      lambda params: jnp.float64(0),
      lambda gradients, state, params, *, value, grad: (params, value))
  state = plain_state(tx=tx)
  out, metrics = step(
      state, batch_of(), objective=NATURAL,
      perturbation=methods.awp(0.1, update_at=update_at))
  assert out.opt_state == metrics.loss > 0
  v = jax.tree.map(lambda new, w: new - 2 * w, out.params, state.params)
  largest = max(np.abs(leaf).max() for leaf in v.values())
  assert largest > 0.01 if update_at == 'perturbed' else largest < 1e-12


def with_dropout(params, batch_stats, x, train, key):
  if train:
    params = params | {'kernel': params['kernel'] * 2 * jax.random.bernoulli(
        key, 0.5, (1, 5))}
  return affine(params, x), batch_stats


@pytest.mark.parametrize('num_steps', [1, 3])
def test_ascent_and_descent_share_their_dropout_mask(num_steps, x64):
  # The loss rises by gamma sum_l |w_l| |g_l| if v follows the gradient of the
  # descended loss, and by less if v follows that of other masks.
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


def recording(params, batch_stats, x, train, key):
  """A forward function whose statistics are its last input and key."""
  seen = {'x': x, 'key': jax.random.key_data(key)} if train else batch_stats
  return affine(params, x), seen


def expected_keys(key, number, device=None):
  """The attack and dropout keys of a step, from their definition."""
  key = jax.random.fold_in(jax.random.key(key), number)
  if device is not None:
    key = jax.random.fold_in(key, device)
  attack_key, dropout_key = jax.random.split(key)
  start_key, _ = jax.random.split(jax.random.split(attack_key, 1)[0])
  return start_key, dropout_key


@pytest.mark.parametrize('key,number', [(0, 0), (0, 1), (1, 0)])
def test_noise_and_masks_derive_from_key_and_step(key, number, x64):
  (x, y) = batch_of()
  state = state_of(recording, {'x': x, 'key': jnp.zeros(2, jnp.uint32)})
  out, _ = step(
      state.replace(step=number), (x, y), key=key,
      attack=awp_jax.Attack(1e-9, 1))
  start_key, dropout_key = expected_keys(key, number)
  np.testing.assert_allclose(
      out.batch_stats['x'], THREAT.random_start(start_key, x), atol=1e-8)
  np.testing.assert_array_equal(
      out.batch_stats['key'], jax.random.key_data(dropout_key))
  # The published code ends with a natural pass, which has the same masks.
  out, _ = step(
      state.replace(step=number), (x, y), key=key, statistics='reference',
      attack=awp_jax.Attack(1e-9, 1))
  np.testing.assert_array_equal(out.batch_stats['x'], x)
  np.testing.assert_array_equal(
      out.batch_stats['key'], jax.random.key_data(dropout_key))


def test_devices_draw_different_noise(x64):
  x, y = batch_of(8)
  state = state_of(
      lambda params, stats, x, train, key: (affine(params, x), x),
      x[:2])

  def on_device(x, y):
    out, metrics = step(
        state.replace(step=3), (x, y), axis_name='d',
        attack=awp_jax.Attack(1e-9, 1))
    return out.batch_stats, metrics.robust_accuracy

  # Statistics are averaged over devices: here the starts of the attacks.
  got, _ = jax.vmap(on_device, axis_name='d')(
      x.reshape(4, 2, 2, 2), y.reshape(4, 2))
  starts = [
      THREAT.random_start(expected_keys(0, 3, device)[0], x[2 * device:][:2])
      for device in range(4)]
  for device in range(4):
    np.testing.assert_allclose(got[device], np.mean(starts, axis=0), atol=1e-8)


def test_devices_share_the_noise_of_the_weights(x64):
  x, y = batch_of(8)
  method = methods.random(0.1)
  state = plain_state(method=method)

  def on_device(x, y):
    return step(state.replace(step=3), (x, y), axis_name='d',
                perturbation=method)[0].params

  wanted = perturbed_step.find_perturbation(method, loss_at)(
      state.params, awp_jax.MethodState(jnp.int32(3), ()),
      noise_key=jax.random.fold_in(jax.random.key(0), 2**32 - 1))
  got = jax.vmap(on_device, axis_name='d')(
      x.reshape(4, 2, 2, 2), y.reshape(4, 2))
  for name, w in state.params.items():
    given = w + wanted[name] if method.update_at == 'perturbed' else w
    np.testing.assert_allclose(got[name], [w + given] * 4, atol=1e-12)


def test_methods_of_two_batches_halve_the_batch(x64):
  (x, y), method = batch_of(), methods.frwp(0.1, alpha=0.25)
  state = plain_state(method=method)
  out, metrics = step(state, (x, y), objective=NATURAL, perturbation=method)
  v = perturbed_step.find_perturbation(method, loss_at)(
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
  # Methods with noise or a threshold on examples do not evaluate it.
  for method in (methods.random(0.1), methods.rwp(0.1, c_min=0.5)):
    _, metrics = step(state, (x, y), attack=attack, perturbation=method)
    assert np.isposinf(metrics.unperturbed_loss) and np.isfinite(metrics.loss)


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
  # A floor f on |grad of the mean loss| equals B f on the gradient of a single
  # example's loss, with B the global batch size.
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
  # Only the gradient of the first pixel is NaN.
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
  chex.assert_tree_all_finite((out, metrics.loss, metrics.gradient_norm))


def test_a_step_outside_jit_is_the_compiled_one(x64):
  state, batch = plain_state(), batch_of()
  keywords = {'objective': NATURAL, 'perturbation': methods.awp(0.1)}
  chex.assert_trees_all_close(
      awp_jax.train_step(
          state, batch, jax.random.key(0), threat=THREAT,
          attack=awp_jax.Attack(0.05, 2), **keywords),
      step(state, batch, **keywords), rtol=1e-12, atol=1e-14)


def test_logits_that_are_not_finite_are_not_robust():
  x, y = batch_of()
  # Class 0 everywhere, which is also the argmax of NaN.
  state = state_of(lambda params, stats, x, train, key: (
      affine(params, x).at[:, 0].set(9).at[1, 1].set(jnp.nan), stats))
  _, metrics = step(state, (x, 0 * y), objective=NATURAL)
  np.testing.assert_allclose(metrics.robust_accuracy, 5 / 6, rtol=1e-6)
