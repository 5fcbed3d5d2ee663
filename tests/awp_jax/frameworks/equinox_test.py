"""AWP for Equinox modules: gradients, and forward functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax.frameworks import equinox as awp_eqx

X = jax.random.normal(jax.random.key(0), (8, 6))
Y = jnp.arange(8) % 3


class Net(eqx.Module):
  """Two layers, dropout, a static field and integers."""

  layers: list
  dropout: eqx.nn.Dropout
  count: jax.Array
  name: str = eqx.field(static=True)

  def __init__(self, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    self.layers = [eqx.nn.Linear(6, 5, key=keys[0]),
                   eqx.nn.Linear(5, 3, key=keys[1])]
    self.dropout, self.count = eqx.nn.Dropout(0.4), jnp.arange(3)
    self.name = 'net'

  def __call__(self, x, key=None):
    x = self.dropout(jax.nn.relu(self.layers[0](x)), key=key)
    return self.layers[1](x)


def loss_fn(model, x, y, key):
  logits = jax.vmap(model)(x, jax.random.split(key, len(x)))
  return awp_jax.cross_entropy(logits, y).mean(), logits


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      np.array_equal(x, y) for x, y in zip(
          jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_gamma_zero_is_filter_value_and_grad():
  key = jax.random.key(1)
  got = awp_eqx.awp_value_and_grad(loss_fn, gamma=0, has_aux=True)(
      Net(), X, Y, key)
  wanted = eqx.filter_value_and_grad(loss_fn, has_aux=True)(Net(), X, Y, key)
  assert same(got, wanted)
  assert got[1].count is None and got[1].name == 'net'


@pytest.mark.parametrize('mask, chosen', [
    (awp_jax.is_weight, (0, 1)), ('layers/1/weight', (1,))])
def test_gradients_at_perturbed_weights(mask, chosen):
  """By hand: w + gamma |w| g / |g|, with the same dropout masks."""
  key, model = jax.random.key(1), Net()
  gradient_fn = eqx.filter_value_and_grad(lambda *args: loss_fn(*args)[0])
  plain, gradients = gradient_fn(model, X, Y, key)
  shifted = model
  for number in chosen:
    w, g = (tree.layers[number].weight for tree in (model, gradients))
    v = 0.5 * jnp.linalg.norm(w) * g / jnp.linalg.norm(g)
    shifted = eqx.tree_at(
        lambda tree, n=number: tree.layers[n].weight, shifted, w + v)
  expected = gradient_fn(shifted, X, Y, key)
  got = eqx.filter_jit(awp_eqx.awp_value_and_grad(
      lambda *args: loss_fn(*args)[0], gamma=0.5, mask=mask))(
          model, X, Y, key)
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for ours, theirs in zip(
      jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
  assert got[0] > plain + 0.05


def test_other_methods():
  method = awp_jax.methods.sam(rho=0.5)
  model, key = Net(), jax.random.key(1)
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def pure(params, *args):
    return loss_fn(eqx.combine(params, static), *args)[0]

  wanted, _ = awp_jax.perturbed_value_and_grad(method, pure)(
      params, method.init(params), X, Y, key)
  got, state = awp_eqx.perturbed_value_and_grad(
      method, lambda *args: loss_fn(*args)[0])(
          model, method.init(params), X, Y, key)
  assert same(got, wanted) and int(state.step) == 1


def test_wrong_arguments():
  with pytest.raises(ValueError, match='gamma must be'):
    awp_eqx.awp_value_and_grad(loss_fn, gamma=float('nan'))
  with pytest.raises(
      ValueError, match='matches no leaf; there are: layers/0/weight'):
    awp_eqx.awp_value_and_grad(loss_fn, gamma=0.1, mask='head/*')(
        Net(), X, Y, jax.random.key(0))


def test_forward_function():
  model = Net()
  functions = awp_eqx.as_functions(model)
  logits, stats = functions.forward_fn(functions.params, {}, X, False, None)
  assert stats == {}
  np.testing.assert_allclose(
      logits, jax.vmap(eqx.nn.inference_mode(model))(X), rtol=1e-6)
  key = jax.random.key(2)
  trained, _ = functions.forward_fn(functions.params, {}, X, True, key)
  np.testing.assert_allclose(
      trained, jax.vmap(model)(X, jax.random.split(key, len(X))), rtol=1e-6)
  back = eqx.combine(functions.params, model)
  assert same(eqx.filter(back, eqx.is_array), eqx.filter(model, eqx.is_array))


def test_forward_function_with_a_state():
  class Stateful(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self):
      self.norm = eqx.nn.BatchNorm(
          6, axis_name=awp_eqx.AXIS, momentum=0.75, mode='batch')

    def __call__(self, x, state):
      return self.norm(x, state)

  model, state = eqx.nn.make_with_state(Stateful)()
  functions = awp_eqx.as_functions(model, state)
  logits, moved = functions.forward_fn(
      functions.params, functions.batch_stats, X, True, None)
  np.testing.assert_allclose(logits.mean(0), 0, atol=1e-5)
  assert jax.tree.structure(moved) == jax.tree.structure(functions.batch_stats)
  means = [leaf for leaf in jax.tree.leaves(moved) if np.allclose(
      leaf, X.mean(0), atol=1e-5) or np.allclose(
          leaf, 0.25 * X.mean(0), atol=1e-5)]
  assert len(means) == 1
  _, same_stats = functions.forward_fn(
      functions.params, moved, X, False, None)
  assert same(same_stats, moved)


def test_counters_and_flags_of_a_state_keep_their_types():
  """In a step on one and on two devices, in parts, and in an average."""
  def forward_fn(params, batch_stats, x, train, key):
    moved = {'count': batch_stats['count'] + 1, 'started': jnp.array(True),
             'mean': x.mean(0)} if train else batch_stats
    return x @ params['w'], moved

  stats = {'count': jnp.int32(0), 'started': jnp.array(False),
           'mean': jnp.zeros(6)}
  state = awp_jax.TrainState.create(
      forward_fn=forward_fn, params={'w': jnp.ones((6, 3))},
      tx=optax.sgd(0.1), batch_stats=stats)
  settings = {
      'objective': awp_jax.natural(), 'attack': awp_jax.Attack(0.1, 1),
      'threat': awp_jax.ThreatModel('Linf', 0.1)}
  x = jax.nn.sigmoid(X)
  key = jax.random.key(0)
  one, _ = awp_jax.train_step(state, (x, Y), key, **settings)
  parts, _ = awp_jax.train_step(
      state, (x, Y), key, accumulate=2, **settings)
  devices, _ = jax.pmap(
      lambda x, y: awp_jax.train_step(
          state, (x, y), key, axis_name='batch', **settings),
      axis_name='batch', out_axes=None)(
          x.reshape(2, 4, 6), Y.reshape(2, 4))
  for moved in (one, parts, devices):
    found = moved.batch_stats
    assert (int(found['count']), bool(found['started'])) == (1, True)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [
        leaf.dtype for leaf in jax.tree.leaves(stats)]
    np.testing.assert_allclose(found['mean'], x.mean(0), rtol=1e-6)
  average = awp_jax.update_average(
      awp_jax.Average(state.params, stats), one.params, one.batch_stats, 0.75)
  assert int(average.batch_stats['count']) == 1
  assert bool(average.batch_stats['started'])
  np.testing.assert_allclose(
      average.batch_stats['mean'], 0.25 * x.mean(0), rtol=1e-6)


@pytest.mark.parametrize('name', [
    'noise_key', 'natural_args', 'method_state', 'args', 'kwargs'])
def test_keywords_of_the_loss_have_any_name(name):
  def keyword_loss(model, x, y, key, **options):
    return loss_fn(model, x, y, key)[0] + 100 * options[name]

  given, key = {name: jnp.float32(1)}, jax.random.key(1)
  got = awp_eqx.awp_value_and_grad(keyword_loss, gamma=0)(
      Net(), X, Y, key, **given)
  assert same(got, eqx.filter_value_and_grad(keyword_loss)(
      Net(), X, Y, key, **given))
