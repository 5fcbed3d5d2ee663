"""Paths, masks and stacked layers, for pytrees of several libraries."""

import dataclasses

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
from awp_jax.perturbation import engine, leaves, methods, perturbed_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
  """A user-defined pytree with a field named `value`."""

  query: jax.Array
  value: jax.Array
  bias: jax.Array


class Block(nnx.Module):

  def __init__(self):
    self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    self.norm = nnx.LayerNorm(3, rngs=nnx.Rngs(0))


def linen_params():
  return jax.eval_shape(
      nn.Dense(3).init, jax.random.key(0), jnp.ones((1, 2)))['params']


def boxed_params():
  """Of linen, the kernel in an `nn.Partitioned`."""
  dense = nn.Dense(3, kernel_init=nn.with_partitioning(
      nn.initializers.ones, (None, 'model')))
  params = jax.eval_shape(
      dense.init, jax.random.key(0), jnp.ones((1, 2)))['params']
  assert isinstance(params['kernel'], nn.Partitioned)
  return params


MODELS = {
    'linen': (linen_params, ['bias', 'kernel']),
    'boxed linen': (boxed_params, ['bias', 'kernel']),
    'nnx': (lambda: nnx.split(Block())[1], [
        'dense/bias', 'dense/kernel', 'norm/bias', 'norm/scale']),
    'nnx module': (lambda: Block(), [
        'dense/bias', 'dense/kernel', 'norm/bias', 'norm/scale']),
    'equinox': (lambda: eqx.nn.Linear(2, 3, key=jax.random.key(0)), [
        'weight', 'bias']),
    'dataclass': (lambda: {'layer': Attention(
        jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2)))}, [
            'layer/query', 'layer/value', 'layer/bias']),
    'list': (lambda: [{'w': jnp.ones((2, 2))}, jnp.ones(2)], ['0/w', '1'])}
WEIGHTS = {
    'linen': {'kernel'}, 'boxed linen': {'kernel'}, 'nnx': {'dense/kernel'},
    'nnx module': {'dense/kernel'}, 'equinox': {'weight'},
    'dataclass': {'layer/query', 'layer/value'}, 'list': {'0/w'}}


def chosen(params, mask=leaves.is_weight, **keywords):
  flags = jax.tree.leaves(leaves.weight_mask(params, mask, **keywords))
  return {path for path, flag in zip(
      leaves.leaf_paths(params), flags, strict=True) if flag}


@pytest.mark.parametrize('name', MODELS)
def test_paths_and_masks(name):
  make, paths = MODELS[name]
  params = make()
  assert leaves.leaf_paths(params) == paths
  assert chosen(params) == WEIGHTS[name]
  # By pattern, by predicate and by pytree of bools.
  assert chosen(params, tuple(WEIGHTS[name])) == WEIGHTS[name]
  assert chosen(params, lambda path, _: path in WEIGHTS[name]) == WEIGHTS[name]
  flags = leaves.weight_mask(params)
  assert leaves.weight_mask(params, flags) is flags
  no_biases = {path for path in paths if not path.endswith('bias')}
  assert chosen(params, leaves.is_no_bias) == no_biases
  assert chosen(params, lambda path, _: not path.endswith('bias')) == no_biases
  assert chosen(params, leaves.is_any) == set(paths)


def test_restore_inverts_select():
  params = nnx.split(Block())[1]
  mask = leaves.weight_mask(params, 'dense/*')
  values = leaves.select(params, mask)
  assert sorted(values) == ['dense/bias', 'dense/kernel']
  back = leaves.restore(values, params)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  wanted = jax.tree.map(
      lambda flag, w: w if flag else jnp.zeros_like(w), mask, params)
  chex.assert_trees_all_equal(back, wanted)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(
      leaves.restore(None, params)))
  moved = leaves.perturb(params, values)
  chex.assert_trees_all_equal(moved, jax.tree.map(jnp.add, params, wanted))


def test_two_leaves_of_one_path_are_an_error():
  with pytest.raises(ValueError, match='got twice: a/b'):
    leaves.leaf_paths({'a': {'b': 1.0}, 'a/b': 2.0})


class CallableParams(eqx.Module):
  """A callable model, as in Equinox."""

  weight: jax.Array
  bias: jax.Array

  def __call__(self, x):
    return self.weight @ x + self.bias


def test_a_callable_pytree_of_bools_is_a_mask():
  params = CallableParams(jnp.ones((2, 2)), jnp.ones(2))
  flags = CallableParams(False, True)
  assert leaves.weight_mask(params, flags) is flags
  v = awp_jax.awp_perturbation(
      lambda p: jnp.sum(p(jnp.ones(2))), gamma=0.1, mask=flags)(params)
  assert np.any(v.bias) and not np.any(v.weight)
  with pytest.raises(ValueError, match='mask must be a predicate'):
    leaves.weight_mask({'kernel': jnp.ones((2, 2))}, flags)


class Named(eqx.Module):
  """A predicate that is a pytree with a bool."""

  name: str
  wanted: bool

  def __call__(self, path, leaf):
    return (path.split('/')[-1] == self.name) == self.wanted


@pytest.mark.parametrize('wanted', [True, False])
def test_a_predicate_that_is_a_pytree_is_called(wanted):
  mask = Named('kernel', wanted)
  assert jax.tree.leaves(mask)[-1] is wanted
  # In the last its structure, of two leaves, is that of the parameters.
  for params in ({'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
                 {'kernel': jnp.ones((2, 2))},
                 Named(jnp.ones(2), jnp.ones((2, 2)))):
    paths = set(leaves.leaf_paths(params))
    kernels = {'kernel'} & paths
    assert chosen(params, mask) == (kernels if wanted else paths - kernels)


def test_a_list_of_bools_is_a_mask_of_a_list():
  params = [jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(2)]

  def loss_fn(p):
    return jnp.sum((p[0] @ p[1]) ** 2) + jnp.sum(p[2] ** 2)

  mask = [False, True, True]
  method = methods.awp(0.1, mask=mask)
  for v in (awp_jax.awp_perturbation(loss_fn, gamma=0.1, mask=mask)(params),
            perturbed_step.find_perturbation(method, loss_fn)(
                params, method.init(params))):
    assert [bool(np.any(leaf)) for leaf in v] == mask


def test_patterns_that_match_nothing():
  params = {'a': {'kernel': jnp.ones((2, 2))}}
  with pytest.raises(ValueError, match=r"mask 'b/\*' matches no leaf; .*a/ker"):
    leaves.weight_mask(params, ('a/*', 'b/*'))
  with pytest.raises(ValueError, match=r"stack_axes 'b/\*' matches no leaf"):
    leaves.weight_mask(params, stack_axes={'b/*': 1})


def test_leaves_that_are_no_arrays_are_named():
  model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
  with pytest.raises(ValueError, match=r"be arrays, got .* at 'activation'"):
    awp_jax.awp_step(
        lambda model, x: jnp.mean(jax.vmap(model)(x)), optax.sgd(0.1), model,
        (), jnp.ones((3, 2)), gamma=0.01)


def test_biases_of_attention_are_not_weights():
  shapes = jax.eval_shape(
      nn.MultiHeadDotProductAttention(2).init, jax.random.key(0),
      jnp.ones((1, 3, 4)))['params']
  biases = {path for path in leaves.leaf_paths(shapes) if 'bias' in path}
  assert len(shapes['query']['bias'].shape) == 2 and len(biases) == 4
  assert chosen(shapes) == set(leaves.leaf_paths(shapes)) - biases


LAYERS, WIDTH = 3, 4
STACKED = {'layers/*': 1}


def stacked_params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
      'embedding': jax.random.normal(keys[2], (2, WIDTH)),
      'layers': {'kernel': jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)),
                 'gain': jnp.ones((LAYERS, WIDTH)) * 2.0},
      'out': jax.random.normal(keys[1], (WIDTH, 2))}


def unstacked(tree):
  return tree | {'layers': {
      str(i): jax.tree.map(lambda leaf, i=i: leaf[i], tree['layers'])
      for i in range(LAYERS)}}


def layer_fn(x, layer):
  return jnp.tanh(x @ layer['kernel']) * layer['gain'], None


def network(params, x):
  x = x @ params['embedding']
  if 'kernel' in params['layers']:
    x, _ = jax.lax.scan(layer_fn, x, params['layers'])
  else:
    for i in range(LAYERS):
      x, _ = layer_fn(x, params['layers'][str(i)])
  return jnp.mean((x @ params['out']) ** 2)


@pytest.mark.parametrize('name,options', [
    ('awp', {'gamma': 0.3}), ('awp', {'gamma': 0.3, 'num_steps': 2}),
    ('boxed_awp', {'adv_eps': 0.05}), ('rwp', {'c_min': None, 'num_steps': 2}),
    ('sign', {'gamma': 0.1})])
def test_stacked_layers_are_perturbed_one_by_one(name, options, x64):
  params, x = stacked_params(), jnp.linspace(-1, 1, 10).reshape(5, 2)
  stacked = methods.make(name, stack_axes=STACKED, **options)
  separate = methods.make(name, **options)
  assert leaves.leaf_paths(params)[1:3] == ['layers/gain', 'layers/kernel']
  # The gains [L, D] have one axis per layer, so they are not weights.
  assert chosen(params, stacked.mask, stack_axes=STACKED) == {
      'embedding', 'layers/kernel', 'out'}
  got = jax.jit(perturbed_step.find_perturbation(stacked, network))(
      params, stacked.init(params), x)
  wanted = jax.jit(perturbed_step.find_perturbation(separate, network))(
      unstacked(params), separate.init(unstacked(params)), x)
  chex.assert_trees_all_close(unstacked(got), wanted, rtol=1e-10, atol=1e-14)
  if name == 'awp':
    whole = jax.jit(
        perturbed_step.find_perturbation(methods.awp(0.3), network))(
            params, separate.init(params), x)
    assert np.abs(whole['layers']['kernel'] - got['layers']['kernel']).max() > (
        0.01)


@pytest.mark.parametrize('name', ['random', 'arwp', 'm_rwp', 'm_arwp', 'frwp'])
def test_noise_of_stacked_filters_scales_with_each_filter(name, x64):
  options = {} if name == 'frwp' else {'sigma': 0.5}
  method = methods.make(name, stack_axes=STACKED, mask='layers/*', **options)
  size = method.ball.size
  params = stacked_params()
  params['layers']['kernel'] *= jnp.array([1.0, 0.0, 10.0])[:, None, None]
  state = method.init(params)
  key = jax.random.key(1)
  v = engine.ascend(
      method, state, engine.begin(method, state, key), params,
      None).perturbation
  noise = method.direction.take(
      state.memory, None, leaves.select(params, method.chosen(params)),
      jax.random.fold_in(key, 0))
  kernel = np.asarray(params['layers']['kernel'])
  norms = np.sqrt((kernel ** 2).sum(1, keepdims=True))
  np.testing.assert_allclose(
      v['layers/kernel'], size * norms * noise['layers/kernel'], rtol=1e-12)
  np.testing.assert_allclose(
      v['layers/gain'], size * 2 * np.sqrt(WIDTH) * noise['layers/gain'],
      rtol=1e-12)
  if 'arwp' in name:
    assert state.memory['layers/kernel'].shape == (LAYERS, 1, WIDTH)
    assert state.memory['layers/gain'].shape == (LAYERS, WIDTH)


def test_half_precision_is_added_in_float32_with_a_warning():
  # v is slightly more than half the bfloat16 spacing above 1. Rounding v first
  # gives exactly half, and the sum then rounds back to 1.
  params = {'kernel': jnp.ones((2, 2), 'bfloat16')}
  v = {'kernel': jnp.full((2, 2), 0.00391)}
  assert np.all(leaves.perturb(params, v)['kernel'] == 1.0078125)
  rounded = {'kernel': v['kernel'].astype('bfloat16').astype('float32')}
  assert np.all(leaves.perturb(params, rounded)['kernel'] == 1)
  with pytest.warns(UserWarning, match='among them kernel: .*float32 master'):
    methods.awp(0.01).init(params)
  wide = jax.tree.map(lambda leaf: leaf.astype('float32'), params)
  methods.awp(0.01).init(wide)  # warnings are errors here
  methods.awp(0).init(params)
  methods.awp(0.01).init({'bias': jnp.ones(2, 'bfloat16')} | wide)


@pytest.mark.parametrize('name', ['momentum_awp', 'arwp', 'awp', 'rwp'])
def test_only_the_perturbed_leaves_are_stored(name):
  params = {'a': {'kernel': jnp.ones((9, 9)), 'bias': jnp.ones(9)},
            'b': {'kernel': jnp.ones((2, 3))}}
  options = {'c_min': None} if name == 'rwp' else {}
  method = methods.make(name, mask='b/*', **options)
  state = method.init(params)
  memories = {'momentum_awp': [(2, 3)], 'arwp': [(1, 3)]}
  assert [m.shape for m in jax.tree.leaves(state.memory)] == memories.get(
      name, [])
  ascent = engine.ascend(
      method, state, engine.begin(method, state, jax.random.key(0)), params,
      lambda p: ((jnp.sum(p['b']['kernel']), None), p))
  assert list(ascent.perturbation) == ['b/kernel']
  assert ascent.total is None or list(ascent.total) == ['b/kernel']


def temporary_bytes(method, **keywords):
  """The temporary memory of a compiled step."""
  params = {'big': jnp.ones((500, 500)), 'kernel': jnp.ones((500, 2))}
  tx = optax.sgd(0.1)

  def step(params, state, x):
    out = perturbed_step.perturbed_step(
        method, lambda p, x: jnp.mean((x @ p['big'] @ p['kernel']) ** 2), tx,
        params, tx.init(params), state, x, **keywords)
    return out.params, out.method_state

  stats = jax.jit(step, donate_argnums=0).lower(
      params, method.init(params), jnp.ones((1, 500))).compile()
  return stats.memory_analysis().temp_size_in_bytes


def test_memory_of_a_schedule_is_that_of_the_perturbed_leaves():
  # `big` takes one megabyte and is not perturbed.
  late = methods.start_after(methods.awp(0.1, mask='kernel'), 3)
  plain = temporary_bytes(methods.awp(0))
  assert temporary_bytes(late) - plain < 100_000
  everything = methods.start_after(methods.awp(0.1), 3)
  assert temporary_bytes(everything) - plain > 900_000
