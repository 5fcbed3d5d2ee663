"""Networks: published parameter counts, shapes, types, initializers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.models import PreActResNet, WideResNet


def count(model, shape=(1, 32, 32, 3)):
  variables = jax.eval_shape(
      lambda key: model.init(key, jnp.zeros(shape)), jax.random.key(0))
  return sum(np.prod(leaf.shape, dtype=int)
             for leaf in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize('model,parameters', [
    # The counts of the PyTorch networks that the paper trained.
    (PreActResNet(10), 11_172_170),
    (PreActResNet(10, depth=34), 21_280_330),
    (PreActResNet(10, depth=50), 23_513_162),
    (WideResNet(10, depth=28, width=10), 36_479_194),
    (WideResNet(10, depth=34, width=10), 46_160_474),
    (PreActResNet(100), 11_172_170 + 90 * 513),
])
def test_parameter_counts(model, parameters):
  assert count(model) == parameters


@pytest.mark.parametrize('model', [
    PreActResNet(7, width=4), PreActResNet(2, depth=34, width=4),
    PreActResNet(7, depth=50, width=4), WideResNet(3, depth=10, width=1)])
@pytest.mark.parametrize(
    'shape', [(2, 32, 32, 3), (1, 8, 8, 1), (3, 40, 24, 3)])
def test_any_size_and_number_of_classes(model, shape):
  logits = jax.eval_shape(
      lambda key: model.init_with_output(key, jnp.zeros(shape))[0],
      jax.random.key(0))
  assert logits.shape == (shape[0], model.num_classes)


@pytest.mark.parametrize('make', [PreActResNet, WideResNet])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_types(make, dtype):
  depth = {PreActResNet: 18, WideResNet: 10}[make]
  model = make(
      5, depth=depth, width=2, dtype=jnp.dtype(dtype),
      param_dtype=jnp.dtype(dtype), activation='silu')
  x = jnp.ones((2, 8, 8, 3))
  variables = jax.eval_shape(
      lambda key: model.init(key, x), jax.random.key(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables['params'])} == {
      jnp.dtype(dtype)}
  logits = jax.eval_shape(lambda v: model.apply(v, x), variables)
  assert logits.dtype == jnp.float32


def test_normalization_is_inside():
  plain = PreActResNet(3, width=2)
  inside = PreActResNet(3, width=2, mean=(0.2, 0.3, 0.4), std=(0.5, 0.25, 2.0))
  x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
  variables = jax.jit(plain.init)(jax.random.key(1), x)
  normalized = (x - jnp.array([0.2, 0.3, 0.4])) / jnp.array([0.5, 0.25, 2.0])
  apply = jax.jit(plain.apply)
  expected = apply(variables, normalized)
  np.testing.assert_allclose(
      jax.jit(inside.apply)(variables, x), expected, atol=1e-5)
  assert np.abs(apply(variables, x) - expected).max() > 1e-3


def test_initializers_have_their_scale():
  x = jnp.ones((1, 8, 8, 3))
  params = jax.jit(PreActResNet(10, width=32).init)(
      jax.random.key(0), x)['params']
  kernel = np.asarray(params['layer1_0']['conv1']['kernel'])
  bound = (9 * 32) ** -0.5
  assert np.abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3 ** 0.5, rtol=0.05)
  bias = np.asarray(params['linear']['bias'])
  assert 0 < np.abs(bias).max() <= 256 ** -0.5
  params = jax.jit(WideResNet(10, depth=10, width=2).init)(
      jax.random.key(0), x)['params']
  kernel = np.asarray(params['block1_0']['conv2']['kernel'])
  np.testing.assert_allclose(kernel.std(), (2 / (9 * 32)) ** 0.5, rtol=0.05)
  assert not np.any(params['fc']['bias'])


def test_dropout_acts_in_train_mode_only():
  model = WideResNet(3, depth=10, width=1, dropout_rate=0.5)
  x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  apply = jax.jit(model.apply)
  np.testing.assert_array_equal(apply(variables, x), apply(variables, x))

  @jax.jit
  def train(key):
    return model.apply(
        variables, x, train=True, mutable=['batch_stats'],
        rngs={'dropout': key})[0]

  assert np.abs(train(jax.random.key(1)) - train(jax.random.key(2))).max() > 0


@pytest.mark.parametrize('make', [
    lambda remat: PreActResNet(3, depth=10, width=2, remat=remat),
    lambda remat: WideResNet(
        3, depth=10, width=1, dropout_rate=0.5, remat=remat)])
def test_rematerialization(make):
  models = make(False), make(True)
  x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
  variables, same = (
      jax.jit(model.init)(jax.random.key(1), x) for model in models)
  chex.assert_trees_all_equal(same, variables)

  def pullback(model, params):
    def loss_fn(params):
      logits, moved = model.apply(
          {**variables, 'params': params}, x, train=True,
          mutable=['batch_stats'], rngs={'dropout': jax.random.key(2)})
      return jnp.sum(jnp.square(logits)), moved

    loss, gradients_of, moved = jax.vjp(loss_fn, params, has_aux=True)
    return loss, moved, gradients_of

  def gradients(model, params):
    loss, moved, gradients_of = pullback(model, params)
    return loss, moved, gradients_of(jnp.ones(()))

  wanted, got = (
      jax.jit(functools.partial(gradients, model))(variables['params'])
      for model in models)
  chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
  # The pullback holds what the backward pass needs of the forward pass.
  held = [
      sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
          jax.eval_shape(functools.partial(pullback, model), params)[2]))
      for model, params in zip(models, [variables['params']] * 2, strict=True)]
  parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(variables))
  assert held[1] - parameters < (held[0] - parameters) / 2


@pytest.mark.parametrize('make,message', [
    (lambda: PreActResNet(10, depth=20), r'one of \[10, 18, 34, 50\], got 20'),
    (lambda: WideResNet(10, depth=30), r'6 n \+ 4 .*, got 30'),
    (lambda: WideResNet(10, dropout_rate=1.0), r'in \[0, 1\), got 1.0'),
    (lambda: PreActResNet(10, activation='swish'), "one of 'relu', 'silu'"),
    (lambda: PreActResNet(0), 'num_classes must be a whole number >= 1'),
    (lambda: PreActResNet(10, mean=(0.0,), std=(0.0,)), 'std > 0'),
    (lambda: PreActResNet(10, mean=(0.0, 0.0)), 'same number of channels'),
])
def test_bad_arguments(make, message):
  with pytest.raises(ValueError, match=message):
    make()
