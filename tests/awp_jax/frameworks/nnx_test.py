"""AWP for nnx modules: gradients, updates in place, and forward functions."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax.frameworks import nnx as awp_nnx


class Net(nnx.Module):
  """A convolution, batch statistics, a list of layers, dropout."""

  def __init__(self, seed=0, rate=0.3):
    rngs = nnx.Rngs(seed)
    self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(rate, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(4, n, rngs=rngs) for n in (4, 3)])

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
    for layer in self.layers:
      x = layer(self.dropout(x))
    return x


X = jax.random.normal(jax.random.key(0), (8, 5, 5, 3))
Y = jnp.arange(8) % 3


def loss_fn(model, x, y, metrics=None):
  logits = model(x)
  loss = awp_jax.cross_entropy(logits, y).mean()
  if metrics is not None:
    metrics.update(loss=loss)
  return loss, logits


def plain_loss(model, x, y, metrics=None):
  return loss_fn(model, x, y, metrics)[0]


def arrays(tree):
  return [np.asarray(
      jax.random.key_data(leaf)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
          for leaf in jax.tree.leaves(tree)]


def others(model):
  """Everything but the parameters."""
  return nnx.state(model, nnx.Not(nnx.Param))


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
      np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def average():
  return nnx.MultiMetric(loss=nnx.metrics.Average('loss'))


@pytest.mark.parametrize('has_aux', [False, True])
def test_gamma_zero_is_nnx_value_and_grad(has_aux):
  """Also in what it updates: statistics, dropout streams, metrics."""
  fn = loss_fn if has_aux else plain_loss
  ours, theirs, seen = Net(), Net(), [average(), average()]
  for _ in range(2):
    got = awp_nnx.awp_value_and_grad(fn, gamma=0, has_aux=has_aux)(
        ours, X, Y, seen[0])
    wanted = nnx.value_and_grad(fn, has_aux=has_aux)(theirs, X, Y, seen[1])
    assert same(got, wanted)
    assert type(got[1]) is type(wanted[1])
  assert same(nnx.state(ours), nnx.state(theirs))
  assert same(nnx.state(seen[0]), nnx.state(seen[1]))


def by_hand(model, gamma, is_perturbed):
  """Two calls of nnx.value_and_grad: at w, then at w + gamma |w| g / |g|."""
  before = jax.tree.map(jnp.copy, nnx.state(model))
  _, gradients = nnx.value_and_grad(plain_loss)(model, X, Y)
  nnx.update(model, before)  # the pass at w leaves no trace
  params = nnx.state(model, nnx.Param)
  paths = [jax.tree_util.keystr(path) for path, _ in
           jax.tree_util.tree_leaves_with_path(params)]
  shifted = [
      w + gamma * jnp.linalg.norm(w) * g / jnp.linalg.norm(g)
      if is_perturbed(path) else w for path, w, g in zip(
          paths, jax.tree.leaves(params), jax.tree.leaves(gradients),
          strict=True)]
  nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), shifted))
  loss, gradients = nnx.value_and_grad(plain_loss)(model, X, Y)
  nnx.update(model, params)
  return loss, gradients


@pytest.mark.parametrize('mask, is_perturbed', [
    (awp_jax.is_weight, lambda path: 'kernel' in path),
    ('layers/*/kernel', lambda path: 'layers' in path and 'kernel' in path)])
def test_gradients_at_perturbed_weights(mask, is_perturbed):
  ours, reference = Net(), Net()
  w = jax.tree.map(jnp.copy, nnx.state(ours, nnx.Param))
  loss, gradients = awp_nnx.awp_value_and_grad(
      plain_loss, gamma=0.5, mask=mask)(ours, X, Y)
  expected_loss, expected = by_hand(reference, 0.5, is_perturbed)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  for got, wanted in zip(
      arrays(gradients), arrays(expected), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
  assert same(nnx.state(ours, nnx.Param), w)
  for got, wanted in zip(
      arrays(others(ours)), arrays(others(reference)), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
  plain, _ = nnx.value_and_grad(plain_loss)(Net(), X, Y)
  assert loss > plain + 0.1


def test_a_loop_inside_jit_counts_everything_once():
  model, metrics = Net(), average()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, metrics, x, y):
    loss, gradients = awp_nnx.awp_value_and_grad(plain_loss, gamma=0.1)(
        model, x, y, metrics)
    optimizer.update(model, gradients)
    return loss

  losses = [float(step(model, optimizer, metrics, X, Y)) for _ in range(3)]
  assert metrics.loss.count[...] == 3
  np.testing.assert_allclose(metrics.compute()['loss'], np.mean(losses), 1e-5)
  # Two dropouts of one stream per step: the masks of both passes are equal.
  assert model.dropout.rngs.count[...] == 6
  assert len(set(losses)) == 3


def test_methods_with_memory_and_another_batch():
  """`m_rwp` takes half of the loss at w, on other examples."""
  method = awp_jax.methods.momentum_awp(adv_lr=0.3, adv_eps=None)
  model = Net(rate=0.0)
  state = method.init(nnx.state(model, nnx.Param))
  gradient_fn = awp_nnx.perturbed_value_and_grad(method, plain_loss)
  _, first = gradient_fn(model, state, X, Y)
  (_, gradients), second = gradient_fn(model, first, X, Y)
  assert int(second.step) == 2
  assert not same(first.memory, second.memory)
  assert jax.tree.structure(gradients) == jax.tree.structure(
      nnx.state(model, nnx.Param))

  mixed = awp_jax.methods.m_rwp(sigma=0.0, natural_batch='other')
  graph, params, rest = nnx.split(Net(rate=0.0), nnx.Param, ...)

  def pure(params, rest, x, y):
    return plain_loss(nnx.merge(graph, params, rest, copy=True), x, y)

  wanted, _ = awp_jax.perturbed_value_and_grad(mixed, pure)(
      params, mixed.init(params), rest, X[:4], Y[:4],
      natural_args=(rest, X[4:], Y[4:]), noise_key=jax.random.key(1))
  got, _ = awp_nnx.perturbed_value_and_grad(mixed, plain_loss)(
      Net(rate=0.0), mixed.init(params), X[:4], Y[:4],
      natural_args=(X[4:], Y[4:]), noise_key=jax.random.key(1))
  np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
  for ours, theirs in zip(arrays(got[1]), arrays(wanted[1]), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_other_arguments_of_the_loss():
  """Text, numbers, functions, None and keywords reach the loss unchanged."""
  seen = []

  def odd_loss(model, batch, *, name, scale, activation, nothing):
    seen.append((name, scale, activation, nothing))
    return scale * plain_loss(model, *batch)

  loss, _ = awp_nnx.awp_value_and_grad(odd_loss, gamma=0.1)(
      Net(), (X, Y), name='n', scale=2.0, activation=jax.nn.relu, nothing=None)
  assert jnp.isfinite(loss)
  assert set(seen) == {('n', 2.0, jax.nn.relu, None)}


def test_wrong_arguments():
  with pytest.raises(TypeError, match=r'must be an nnx\.Module, got dict'):
    awp_nnx.awp_value_and_grad(plain_loss, gamma=0.1)({}, X, Y)
  with pytest.raises(ValueError, match='gamma must be'):
    awp_nnx.awp_value_and_grad(plain_loss, gamma=-1.0)
  with pytest.raises(ValueError, match='schedule'):
    awp_nnx.awp_value_and_grad(plain_loss, gamma=lambda step: 0.1)
  with pytest.raises(ValueError, match='matches no leaf; there are: conv/bias'):
    awp_nnx.awp_value_and_grad(plain_loss, gamma=0.1, mask='head/*')(
        Net(), X, Y)


def test_only_some_variables_are_parameters():
  """`wrt` as in `nnx.value_and_grad`: the rest stays where it is."""
  wrt = nnx.All(nnx.Param, nnx.PathContains('layers'))
  _, gradients = awp_nnx.awp_value_and_grad(
      plain_loss, gamma=0.1, wrt=wrt)(Net(), X, Y)
  assert list(gradients) == ['layers']


def test_forward_function():
  model = Net(rate=0.5)
  functions = awp_nnx.as_functions(model)
  before = jax.tree.map(jnp.copy, nnx.state(model))
  key = jax.random.key(3)
  (one, moved), (two, _), (three, _) = (
      functions.forward_fn(
          functions.params, functions.batch_stats, X, True, k)
      for k in (key, key, jax.random.key(4)))
  np.testing.assert_array_equal(one, two)
  assert not np.array_equal(one, three)
  mean, _ = jax.tree.leaves(moved)
  np.testing.assert_allclose(
      mean, 0.1 * model.conv(X).mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
  logits, _ = functions.forward_fn(
      functions.params, moved, X, False, None)
  assert same(nnx.state(model), before)
  # The state returns to the module, which then gives the same logits.
  nnx.update(model, functions.params, moved)
  model.eval()
  np.testing.assert_allclose(model(X), logits, rtol=1e-6)


def test_forward_function_of_a_module_with_arguments():
  class Explicit(nnx.Module):

    def __init__(self, rngs):
      self.dropout = nnx.Dropout(0.5)
      self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, train, rngs=None):
      x = self.dropout(x, deterministic=not train, rngs=rngs)
      return self.out(x)

  functions = awp_nnx.as_functions(Explicit(nnx.Rngs(0)))
  x = jnp.ones((5, 4))
  evaluated, _ = functions.forward_fn(
      functions.params, functions.batch_stats, x, False, None)
  trained, _ = functions.forward_fn(
      functions.params, functions.batch_stats, x, True, jax.random.key(0))
  assert np.ptp(evaluated, axis=0).max() == 0 < np.ptp(trained, axis=0).max()


@pytest.mark.parametrize('name, in_training', [
    ('train', True), ('training', True), ('is_training', True),
    ('deterministic', False), ('use_running_average', False)])
def test_every_name_of_the_mode(name, in_training):
  """The default of each argument is the wrong mode for evaluation."""
  class Named(nnx.Module):

    def __init__(self):
      self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def run(self, x, mode):
      return self.dropout(x, deterministic=mode != in_training)

  scope = {}
  exec(f'def call(self, x, {name}={in_training}): return self.run(x, {name})',
       scope)
  Named.__call__ = scope['call']
  functions = awp_nnx.as_functions(Named())
  x = jnp.ones((4, 8))
  evaluated, _ = functions.forward_fn(
      functions.params, functions.batch_stats, x, False, None)
  np.testing.assert_array_equal(evaluated, x)
  trained, _ = functions.forward_fn(
      functions.params, functions.batch_stats, x, True, jax.random.key(0))
  assert set(np.unique(trained)) == {0.0, 2.0}


def test_random_numbers_in_evaluation_are_refused():
  class Noisy(nnx.Module):

    def __init__(self):
      self.rngs = nnx.Rngs(0)

    def __call__(self, x):
      return x + jax.random.normal(self.rngs(), x.shape)

  functions = awp_nnx.as_functions(Noisy())
  for wrap in (lambda f: f, jax.jit):
    with pytest.raises(ValueError, match='Noisy draws random numbers in eval'):
      wrap(lambda x: functions.forward_fn(
          functions.params, functions.batch_stats, x, False, None)[0])(
              jnp.ones((2, 3)))


@pytest.mark.parametrize('name', [
    'noise_key', 'natural_args', 'method_state', 'args', 'kwargs'])
def test_keywords_of_the_loss_have_any_name(name):
  scope = {'plain_loss': plain_loss}
  exec(f'def loss(model, x, y, {name}): '
       f'return plain_loss(model, x, y) + 100 * {name}', scope)
  given = {name: jnp.float32(1)}
  got = awp_nnx.awp_value_and_grad(scope['loss'], gamma=0)(
      Net(), X, Y, **given)
  assert got[0] > 100
  assert same(got, nnx.value_and_grad(scope['loss'])(Net(), X, Y, **given))


def test_arrays_of_the_model_are_updated_too():
  class Counting(nnx.Module):

    def __init__(self):
      self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      self.calls = nnx.data(jnp.zeros(()))

    def __call__(self, x):
      self.calls = self.calls + 1
      return self.linear(x)

  def loss(model, x):
    return model(x).mean()

  for _ in range(2):
    model = Counting()
    awp_nnx.awp_value_and_grad(loss, gamma=0.1)(model, jnp.ones((4, 3)))
    awp_nnx.awp_value_and_grad(loss, gamma=0.1)(model, jnp.ones((4, 3)))
  assert model.calls == 2


@pytest.mark.parametrize('share', [
    lambda model: model, lambda model: model.layers[0],
    lambda model: nnx.List([model])], ids=['model', 'part', 'holder'])
def test_parameters_shared_with_an_argument_keep_their_values(share):
  model = Net(rate=0.0)
  w = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

  def loss(model, other, x, y):
    del other
    return plain_loss(model, x, y)

  awp_nnx.awp_value_and_grad(loss, gamma=0.5)(model, share(model), X, Y)
  assert same(nnx.state(model, nnx.Param), w)
