"""Common tests of all methods: dtypes, compilation, devices, edge cases."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax.perturbation import leaves, methods, perturbed_step
from tests.helpers import perturbation_problem as problem
from tests.helpers.perturbation_problem import assert_close

TX = optax.sgd(0.1)


def one_step(method, params, opt_state, state):
  return perturbed_step.perturbed_step(
      method, problem.losses_fn, TX, params, opt_state, state, problem.X,
      problem.Y, **problem.keywords_of(method))


@pytest.mark.filterwarnings('ignore:. perturbed parameters are in half')
@pytest.mark.parametrize('name', methods.METHODS)
def test_dtypes_and_shapes_stay(name, x64):
  for dtype in ('float32', 'bfloat16', 'float64'):
    params, method = problem.params_as(dtype), problem.make(name)
    state = method.init(params)
    out = jax.eval_shape(
        functools.partial(one_step, method), params, TX.init(params), state)
    for tree in (out.params, out.perturbation):
      assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) == (
          jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params))
    assert out.loss.shape == out.unperturbed_loss.shape == ()
    wide = 'float64' if dtype == 'float64' else 'float32'
    assert {leaf.dtype for leaf in jax.tree.leaves(
        out.method_state.memory)} <= {jnp.dtype(wide)}


@pytest.mark.filterwarnings('ignore:. perturbed parameters are in half')
@pytest.mark.parametrize('name', methods.METHODS)
def test_steps_compile_once(name):
  params = problem.params_as('bfloat16')
  method = methods.every_k(problem.make(name), 2)
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(*carry):
    return one_step(method, *carry)

  opt_state, state = TX.init(params), method.init(params)
  norms = []
  for _ in range(3):
    out = step(params, opt_state, state)
    params, opt_state, state = out[:3]
    norms.append(float(jnp.abs(out.perturbation['dense']['kernel']).max()))
    chex.assert_tree_all_finite(out[:-1])
  assert int(state.step) == 3
  assert norms[1] == 0 and norms[2] > 1e-4


@pytest.mark.filterwarnings('ignore:. perturbed parameters are in half')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', methods.METHODS)
def test_outputs_are_finite(name, dtype):
  # A leaf with zero gradient, one of zeros, an empty one; then zero gradients
  # everywhere, and an empty mask.
  params = {
      'kernel': jnp.ones((2, 2), dtype), 'unused': jnp.ones((2, 2), dtype),
      'zero': jnp.zeros((2, 2), dtype), 'empty': jnp.zeros((0, 2), dtype),
      'scalar': jnp.ones((), dtype)}

  def loss_fn(p, factor):
    return factor * jnp.stack([
        jnp.sum(p['kernel']) + 0 * jnp.sum(p['unused']),
        jnp.sum(p['zero']) + jnp.sum(p['empty']) * p['scalar']])

  options = {'mask': 'kernel'} if name == 'wt_awp' else {}
  method = problem.make(name, **options)
  keywords = problem.keywords_of(method)
  if 'natural_args' in keywords:
    keywords['natural_args'] = (1.0,)
  empty = problem.make(name, mask=lambda path, leaf: False)

  @jax.jit
  def both(factor):
    return [perturbed_step.perturbed_step(
        m, loss_fn, TX, params, TX.init(params), m.init(params), factor,
        **keywords) for m in (method, empty)]

  for factor in (1.0, 0.0):
    chosen, nothing = both(factor)
    chex.assert_tree_all_finite((chosen[:-1], nothing[:-1]))
    assert not any(np.any(v) for v in jax.tree.leaves(nothing.perturbation))
    if factor == 0 and method.direction.source != 'noise':
      assert not any(np.any(v) for v in jax.tree.leaves(chosen.perturbation))


def device_step(method, keywords, axis_name):

  def step(params, state, x, y):
    natural = {'natural_args': (x, y)} if 'natural_args' in keywords else {}
    out = perturbed_step.perturbed_step(
        method, problem.losses_fn, TX, params, TX.init(params), state, x, y,
        axis_name=axis_name, **(keywords | natural))
    return out.params, out.loss, out.perturbation, out.method_state

  return step


@functools.lru_cache(maxsize=1)  # one step for both ways
def on_one_device(name):
  """A step on eight examples: its arguments, and what it returns."""
  x, y = np.tile(problem.X, (2, 1))[:8], np.tile(problem.Y, 2)[:8]
  x = x + np.linspace(0, 0.3, 8)[:, None]
  params = problem.params_as('float64')
  # Every second step, to include the `cond`.
  method = methods.every_k(problem.make(name), 2)
  state = method.init(params)
  if name == 'momentum_awp':
    state = state._replace(memory=leaves.select(
        jax.grad(problem.mean_fn)(params), method.chosen(params)))
  keywords, arguments = problem.keywords_of(method), (params, state, x, y)
  wanted = jax.jit(device_step(method, keywords, None))(*arguments)
  return method, keywords, arguments, wanted


@pytest.mark.parametrize('way', ['vmap', 'shard_map'])
@pytest.mark.parametrize('name', methods.METHODS)
def test_devices_agree_on_one_perturbation(name, way, x64):
  # Two of eight examples per device.
  method, keywords, (params, state, x, y), wanted = on_one_device(name)
  step = device_step(method, keywords, 'd')
  if way == 'vmap':
    got = jax.jit(jax.vmap(step, in_axes=(None, None, 0, 0), axis_name='d'))(
        params, state, x.reshape(4, 2, 4), y.reshape(4, 2))
    for device in range(1, 4):
      chex.assert_trees_all_equal(*(
          jax.tree.map(lambda leaf, i=i: leaf[i], got[:3])
          for i in (0, device)))
    got = jax.tree.map(lambda leaf: leaf[0], got)
  else:
    mesh = Mesh(np.array(jax.devices()[:4]), ('d',))
    got = jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P('d'), P('d')), out_specs=P()))(
            params, state, x, y)
  assert_close(got, wanted, 1e-12)
  assert np.any(wanted[2]['dense']['kernel'])


@pytest.mark.parametrize('axis', ['d', 'm'])
def test_parameters_that_vary_over_an_axis_are_an_error(axis):
  # Over another axis than that of the examples, too.
  mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('d', 'm'))
  tx = optax.sgd(0.1)

  def step(params, x):
    return awp_jax.awp_step(
        lambda p, x: jnp.mean((x @ p['kernel']) ** 2), tx, params,
        tx.init(params), x, gamma=0.1, axis_name='d').params

  params, x = {'kernel': jnp.ones((4, 8))}, jnp.ones((8, 4))
  spread = jax.shard_map(
      step, mesh=mesh, in_specs=(P(None, axis), P('d')),
      out_specs=P(None, axis))
  with pytest.raises(
      ValueError, match=r"replicated over axis 'd'.*: kernel"):
    jax.jit(spread)(params, x)


@pytest.mark.parametrize('spec', [P('d'), P(None, 'd')])
def test_sharded_parameters_under_jit_are_right(spec, x64):
  # Norms are those of whole leaves, for any sharding.
  mesh = Mesh(np.array(jax.devices()[:4]), ('d',))
  params = {'kernel': jnp.linspace(-1, 2, 32).reshape(4, 8),
            'bias': jnp.ones(8)}
  x = jnp.linspace(-1, 1, 32).reshape(8, 4)
  tx = optax.sgd(0.1, momentum=0.9)

  @jax.jit
  def step(params, x):
    return awp_jax.awp_step(
        lambda p, x: jnp.mean(jnp.tanh(x @ p['kernel'] + p['bias']) ** 2), tx,
        params, tx.init(params), x, gamma=0.3)

  wanted = step(params, x)
  shardings = {'kernel': NamedSharding(mesh, spec),
               'bias': NamedSharding(mesh, P())}
  got = step(jax.device_put(params, shardings),
             jax.device_put(x, NamedSharding(mesh, P('d'))))
  assert_close(got, wanted, 1e-13)
  np.testing.assert_allclose(
      np.linalg.norm(got.perturbation['kernel']),
      0.3 * np.linalg.norm(params['kernel']), rtol=1e-12)


def test_aux_may_differ_between_devices_in_a_branch(x64):
  # The statistics come from the pass at w, which only some steps run.
  method = methods.every_k(problem.make('m_rwp'), 2)
  params = problem.params_as('float64')

  def loss_fn(p, x, y):
    return problem.losses_fn(p, x, y), {'mean': jnp.mean(x)}

  def step(state, x, y):
    out = perturbed_step.perturbed_step(
        method, loss_fn, TX, params, TX.init(params), state, x, y,
        noise_key=problem.KEY, has_aux=True, axis_name='d')
    return jax.tree.map(lambda leaf: leaf[None], out.aux)

  mesh = Mesh(np.array(jax.devices()[:5]), ('d',))
  spread = jax.jit(jax.shard_map(
      step, mesh=mesh, in_specs=(P(), P('d'), P('d')), out_specs=P('d')))
  for count in (0, 1):
    state = method.init(params)._replace(step=jnp.int32(count))
    np.testing.assert_allclose(
        spread(state, problem.X, problem.Y)['mean'], problem.X.mean(1))


def test_unknown_names_and_options():
  with pytest.raises(ValueError, match=r"one of 'arwp', 'asam', .*got 'swp'"):
    methods.make('swp')
  with pytest.raises(ValueError, match=r"'gamma', 'num_steps', .*Did you mean"):
    methods.make('awp', gama=0.1)
  with pytest.raises(ValueError, match="needs the option 'mask'"):
    methods.make('wt_awp')


@pytest.mark.parametrize('name,options,message', [
    ('awp', {'gamma': -1}, 'gamma must be a finite number >= 0, got -1'),
    ('rwp', {'c_min': float('nan')}, 'c_min must be a finite number'),
    ('rwp', {'num_steps': 0}, 'num_steps must be a whole number >= 1'),
    ('wt_awp', {'lam': 1.5}, 'lam must be at most 1, got 1.5'),
    ('frwp', {'alpha': -0.5}, 'alpha must be a finite number >= 0'),
    ('m_rwp', {'natural_batch': 'next'}, "one of 'same', 'other', got 'next'"),
    ('arwp', {'eta': -1}, 'eta must be'), ('arwp', {'beta': -1}, 'beta must'),
    ('sam', {'rho': float('inf')}, 'rho must be'),
    ('asam', {'eta': -1}, 'eta must be'),
    ('boxed_awp', {'gradient': 'mix'}, "one of 'replace', 'add', got 'mix'"),
    ('boxed_awp', {'adv_eps': -1}, 'adv_eps must be'),
    ('momentum_awp', {'decay': -1}, 'decay must be'),
    ('sign', {'every': 0}, 'every must be a whole number >= 1, got 0'),
    ('sign', {'start': -1}, 'start must be a whole number >= 0, got -1'),
    ('awp', {'update_at': 'w'}, "one of 'perturbed', 'natural', got 'w'"),
])
def test_options_out_of_range(name, options, message):
  with pytest.raises(ValueError, match=message):
    problem.make(name, **options)


def test_missing_inputs_of_a_method():
  params = problem.params_as('float32')

  def step(method, loss_fn=problem.losses_fn, **keywords):
    perturbed_step.perturbed_step(
        method, loss_fn, TX, params, TX.init(params), method.init(params),
        problem.X, problem.Y, **keywords)

  with pytest.raises(ValueError, match=r'noise_key must be a PRNG key, .*None'):
    step(problem.make('random'))
  with pytest.raises(ValueError, match=r'natural_args .*must be given'):
    step(problem.make('frwp'), noise_key=problem.KEY)
  with pytest.raises(ValueError, match=r'needs a loss function .* losses \[B]'):
    step(problem.make('rwp'), problem.mean_fn)
  with pytest.raises(ValueError, match='matches no leaf; there are: dense/'):
    step(problem.make('awp', mask=('out/*', 'head/kernel')))
