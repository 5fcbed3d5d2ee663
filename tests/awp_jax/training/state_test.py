"""The training state, and steps for models of several libraries."""

import functools

import chex
import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import methods
from awp_jax.models import PreActResNet, WideResNet

TX = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9))
STEP = functools.partial(
    awp_jax.train_step, objective=awp_jax.trades(),
    threat=awp_jax.ThreatModel('L2', 0.2), attack=awp_jax.Attack(0.1, 1))


class LinenNet(nn.Module):
  """Six inputs, a hidden layer with batch normalization, three classes."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4, name='hidden')(x)
    x = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, name='norm')(x)
    return nn.Dense(3, name='out')(nn.tanh(x))


class NNXNet(nnx.Module):
  """`LinenNet` in nnx."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(6, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.out = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x, train):
    x = self.norm(self.hidden(x), use_running_average=not train)
    return self.out(nnx.tanh(x))


class EquinoxNet(eqx.Module):
  """`LinenNet` in Equinox, with manual batch normalization."""

  hidden: eqx.nn.Linear
  scale: jax.Array
  offset: jax.Array
  out: eqx.nn.Linear

  def __init__(self, params):
    def linear(layer):
      made = eqx.nn.Linear(*layer['kernel'].shape, key=jax.random.key(0))
      return eqx.tree_at(
          lambda m: (m.weight, m.bias), made,
          (layer['kernel'].T, layer['bias']))

    self.hidden, self.out = linear(params['hidden']), linear(params['out'])
    self.scale, self.offset = params['norm']['scale'], params['norm']['bias']

  def __call__(self, x, stats, train):
    x = jax.vmap(self.hidden)(x)
    mean, var = stats['mean'], stats['var']
    if train:
      mean, var = x.mean(axis=0), x.var(axis=0)
      stats = {'mean': 0.9 * stats['mean'] + 0.1 * mean,
               'var': 0.9 * stats['var'] + 0.1 * var}
    x = (x - mean) / jnp.sqrt(var + 1e-5) * self.scale + self.offset
    return jax.vmap(self.out)(jnp.tanh(x)), stats


def linen_state(variables):
  return awp_jax.TrainState.create(
      apply_fn=LinenNet().apply, tx=TX, **variables)


def nnx_state(variables):
  graph, params, stats = nnx.split(
      NNXNet(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

  def forward_fn(params, batch_stats, x, train, key):
    del key
    model = nnx.merge(graph, params, batch_stats, copy=True)
    return model(x, train), nnx.state(model, nnx.BatchStat)

  # The names, and hence the order of the leaves, are those of linen.
  params, stats = (
      jax.tree.unflatten(jax.tree.structure(ours), jax.tree.leaves(theirs))
      for ours, theirs in zip((params, stats), variables.values(), strict=True))
  return awp_jax.TrainState.create(
      forward_fn=forward_fn, params=params, batch_stats=stats, tx=TX)


def equinox_state(variables):
  params, static = eqx.partition(
      EquinoxNet(variables['params']), eqx.is_inexact_array)

  def forward_fn(params, batch_stats, x, train, key):
    del key
    return eqx.combine(params, static)(x, batch_stats, train)

  return awp_jax.TrainState.create(
      forward_fn=forward_fn, params=params, tx=TX,
      batch_stats=variables['batch_stats']['norm'])


def named(state):
  """Kernels, biases and statistics of any model, in the order of linen."""
  if isinstance(state.params, EquinoxNet):
    p = state.params
    return [
        p.hidden.bias, p.hidden.weight.T, p.offset, p.scale, p.out.bias,
        p.out.weight.T, *jax.tree.leaves(state.batch_stats)]
  return jax.tree.leaves((state.params, state.batch_stats))


def test_linen_nnx_and_equinox_train_alike(x64):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.uniform(0.2, 0.8, (8, 6)))
  y = jnp.asarray(rng.integers(0, 3, 8))
  variables = LinenNet().init(jax.random.key(0), x)
  variables = {
      name: jax.tree.map(lambda leaf: leaf.astype('float64'), variables[name])
      for name in ('params', 'batch_stats')}
  ends = []
  for make in (linen_state, nnx_state, equinox_state):
    state = make(variables)
    step = jax.jit(functools.partial(
        STEP, perturbation=methods.awp(0.1)))
    for _ in range(5):
      state, metrics = step(state, (x, y), jax.random.key(0))
    ends.append([*named(state), *metrics])
  start = named(linen_state(variables))
  assert len(start) == 8
  for end in ends[1:]:
    for got, wanted in zip(end, ends[0], strict=True):
      np.testing.assert_allclose(got, wanted, atol=1e-6)
  # All changed except the bias before the normalization, which has no effect.
  for before, after in zip(start[1:], ends[0][1:], strict=False):
    assert np.abs(before - after).max() > 1e-3


def linear(params, batch_stats, x, train, key):
  return x @ params['w'], batch_stats


def small(forward_fn=linear, **fields):
  defaults = {'params': {'w': jnp.ones((2, 3))}, 'tx': optax.sgd(0.1)}
  return awp_jax.TrainState.create(forward_fn=forward_fn, **defaults | fields)


BATCH = jnp.array([[0.75, 0.25], [0.25, 0.5]]), jnp.array([0, 1])


def trace(state, batch=BATCH, **keywords):
  """Traces a step, without compiling anything."""
  return jax.eval_shape(
      functools.partial(STEP, **keywords), state, batch, jax.random.key(0))


def test_create_initializes_the_memory():
  method = methods.momentum_awp(0.5, None)
  state = small(method=method)
  assert int(state.step) == 0 and state.batch_stats == {}
  chex.assert_trees_all_equal(
      state.memory, method.init(state.params).memory)
  assert jax.tree.leaves(state.memory)
  moved, first = STEP(state, BATCH, jax.random.key(0), perturbation=method)
  _, second = STEP(moved, BATCH, jax.random.key(0), perturbation=method)
  # The momentum of the first step is zero.
  assert first.perturbation_ratio == 0
  np.testing.assert_allclose(second.perturbation_ratio, 0.5, rtol=1e-3)
  # A plain step in between does not change it.
  plain, _ = STEP(moved, BATCH, jax.random.key(0))
  chex.assert_trees_all_equal(plain.memory, moved.memory)


def test_memory_and_method_must_match():
  momentum = methods.momentum_awp()
  with pytest.raises(ValueError, match=r"memory of the state \(0 arrays\) .*"
                     r"'momentum AWP', which needs 1 .*method=\.\.\."):
    trace(small(), perturbation=momentum)
  with pytest.raises(ValueError, match=r"\(1 arrays\) does not match .*'AWP'"):
    trace(small(method=momentum), perturbation=methods.awp(0.1))
  other = small(params={'w': jnp.ones((2, 4))}, method=momentum)
  with pytest.raises(ValueError, match='does not match'):
    trace(small(memory=other.memory), perturbation=momentum)
  with pytest.raises(ValueError, match='method and memory were both given'):
    small(method=momentum, memory=())


class Untrained(nn.Module):
  """Takes no `train`."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x)


class Broken(nn.Module):
  """Raises an unrelated TypeError."""

  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(3)(x, nonsense=train)


def test_a_model_that_cannot_be_called():
  with pytest.raises(ValueError, match=r'needs the model: apply_fn=model\.app'):
    awp_jax.TrainState.create(params={}, tx=optax.sgd(0.1))
  variables = Untrained().init(jax.random.key(0), BATCH[0])

  def state(model):
    return awp_jax.TrainState.create(
        apply_fn=model.apply, params=variables['params'], tx=optax.sgd(0.1))

  with pytest.raises(TypeError, match=r'no argument `train`.*\(params, batch_'
                     r'stats, x, train, key\) -> \(logits, batch_stats\)'):
    trace(state(Untrained()))
  with pytest.raises(TypeError, match='nonsense'):
    trace(state(Broken()))


@pytest.mark.parametrize('returned,error,message', [
    (lambda logits, stats: logits, TypeError, r'the pair \(logits, batch_stat'),
    (lambda logits, stats: (logits, stats, 0), TypeError, 'got tuple'),
    (lambda logits, stats: (logits[0], stats), ValueError,
     r'logits \[B, C\] for a batch of 2 images, got shape \(3,\)'),
    (lambda logits, stats: (logits[:1], stats), ValueError, r'shape \(1, 3\)'),
    (lambda logits, stats: (logits, {'mean': logits[0]}), ValueError,
     r"it holds \[\], the model returned \['mean'\]"),
])
def test_bad_outputs_of_a_forward_function(
    returned, error, message):
  def forward_fn(params, batch_stats, x, train, key):
    return returned(*linear(params, batch_stats, x, train, key))

  with pytest.raises(error, match=message):
    trace(small(forward_fn), objective=awp_jax.natural())


def test_modes_and_keys_of_the_passes():
  seen = []

  def forward_fn(params, batch_stats, x, train, key):
    seen.append((train, key is not None))
    return linear(params, batch_stats, x, train, key)

  trace(small(forward_fn))  # TRADES attacks in eval mode
  assert set(seen) == {(False, False), (True, True)}
  seen.clear()
  trace(small(forward_fn), objective=awp_jax.adversarial())
  assert set(seen) == {(True, True)}


def test_statistics_keep_their_dtypes(x64):
  def forward_fn(params, batch_stats, x, train, key):
    return x @ params['w'], {'mean': batch_stats['mean'] + x.mean(axis=0)}

  stats = {'mean': jnp.zeros(2, jnp.float32)}
  state, _ = trace(
      small(forward_fn, batch_stats=stats),
      (BATCH[0].astype(jnp.float64), BATCH[1]),
      objective=awp_jax.adversarial(), statistics='reference')
  assert state.batch_stats['mean'].dtype == jnp.float32


def test_images_of_bytes():
  images = np.full((2, 2), 255, np.uint8)
  with pytest.raises(ValueError, match='divided by 255, got dtype uint8'):
    trace(small(), (images, BATCH[1]))
  for model in (PreActResNet(3, width=2), WideResNet(3, depth=10, width=1)):
    with pytest.raises(ValueError, match='divided by 255, got dtype uint8'):
      jax.eval_shape(
          model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8))
