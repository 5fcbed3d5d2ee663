"""The form of loops on each platform."""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from awp_jax.core import loops
from awp_jax.perturbation import methods, perturbed_step, value_and_grad

PARAMS = {'kernel': jnp.array([[1.0, -2.0], [0.5, 3.0]])}
X = jnp.linspace(-1, 1, 8).reshape(4, 2)


def loss_fn(params, x):
  return jnp.mean(jnp.tanh(x @ params['kernel']) ** 2)


METHOD = methods.awp(0.1, num_steps=4)
FUNCTIONS = {
    'repeat': lambda params, x: loops.repeat(3, lambda c: c + 1, x),
    'mapped': lambda params, x: loops.mapped(4, lambda row: row + 1, x),
    'moves': lambda params, x: perturbed_step.find_perturbation(
        METHOD, loss_fn)(params, METHOD.init(params), x),
    'parts': lambda params, x: jax.grad(value_and_grad.accumulated(loss_fn, 4))(
        params, x)}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_the_platform_of_the_program_decides(name):
  traced = jax.jit(FUNCTIONS[name]).trace(PARAMS, X)
  loops_in = {
      platform: 'stablehlo.while' in traced.lower(
          lowering_platforms=(platform,)).as_text()
      for platform in ('cpu', 'tpu', 'cuda')}
  assert loops_in == {'cpu': False, 'tpu': True, 'cuda': True}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_both_forms_give_the_same(name):
  unrolled = jax.jit(FUNCTIONS[name])(PARAMS, X)
  with loops.platform('tpu'):
    # A new function: jit would reuse the old trace.
    looped = jax.jit(lambda *args: FUNCTIONS[name](*args))(PARAMS, X)
  chex.assert_trees_all_close(looped, unrolled, rtol=1e-6)


def test_context():
  assert loops.unrolls()
  with loops.platform('tpu'):
    assert not loops.unrolls()
    with loops.platform('cpu'):
      assert loops.unrolls()
    text = jax.jit(lambda x: loops.repeat(3, jnp.sin, x)).lower(X).as_text()
    assert 'stablehlo.while' in text
  assert loops.unrolls()
  with pytest.raises(KeyError), loops.platform('tpu'):
    raise KeyError
  assert loops.unrolls()


def test_a_type_that_settles_in_the_first_step(x64):
  x = jnp.ones(2, 'float64')
  out = jax.jit(lambda c: loops.repeat(3, lambda c: c + x, c))(
      jnp.zeros(2, 'float32'))
  assert out.dtype == 'float64' and np.all(out == 3)

  def spread(x):
    return loops.repeat(3, lambda c: c + x, jnp.zeros(1))

  mesh = Mesh(np.array(jax.devices()[:2]), ('d',))
  out = jax.jit(jax.shard_map(
      spread, mesh=mesh, in_specs=P('d'), out_specs=P('d')))(jnp.arange(2.0))
  np.testing.assert_array_equal(out, [0, 3])


@pytest.mark.parametrize('num_steps', [0, 1, 2, 5])
def test_number_of_steps_and_of_traces(num_steps):
  traces = []

  def body(x):
    traces.append(1)
    return x + 1

  assert loops.repeat(num_steps, body, jnp.float32(0)) == num_steps
  assert len(traces) == min(num_steps, 1)
