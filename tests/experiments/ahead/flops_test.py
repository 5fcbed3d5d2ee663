"""Operations of products against XLA's count and closed forms."""

import jax
import jax.numpy as jnp
import pytest

from experiments.ahead import flops

NUMBERS = ('NHWC', 'HWIO', 'NHWC')


def convolve(x, kernel, **options):
  return jax.lax.conv_general_dilated(
      x, kernel, dimension_numbers=NUMBERS,
      **{'window_strides': (1, 1), 'padding': 'SAME'} | options)


def counted(fn, *args):
  return flops.count(jax.make_jaxpr(fn)(*args).jaxpr)


def by_xla(fn, *args):
  """XLA's count before optimization, in which loops do not occur."""
  return jax.jit(fn).lower(*args).cost_analysis()['flops']


@pytest.mark.parametrize('options', [
    {}, {'window_strides': (2, 2)}, {'padding': 'VALID'},
    {'padding': [(3, 0), (1, 2)], 'window_strides': (3, 2)},
    {'rhs_dilation': (2, 3)},
    {'lhs_dilation': (2, 2), 'padding': [(1, 2), (0, 2)]}])
def test_convolution_is_that_of_xla(options):
  x, kernel = jnp.ones((2, 9, 8, 6)), jnp.ones((3, 3, 6, 5))

  def fn(x, kernel):
    return convolve(x, kernel, **options)

  assert counted(fn, x, kernel) == {'float32': by_xla(fn, x, kernel)}


def test_grouped_convolution():
  x, kernel = jnp.ones((2, 5, 5, 6)), jnp.ones((1, 1, 2, 9))

  def fn(x, kernel):
    return convolve(x, kernel, feature_group_count=3)

  assert counted(fn, x, kernel) == {'float32': 2 * 2 * 25 * 2 * 9}


@pytest.mark.parametrize('argument', [0, 1])
@pytest.mark.parametrize('options', [
    {'window_strides': (2, 2)}, {'padding': 'VALID'}, {}])
def test_gradients_cost_as_much_as_the_convolution(options, argument):
  x, kernel = jnp.ones((2, 9, 8, 6)), jnp.ones((3, 3, 6, 5))

  def loss(x, kernel):
    return jnp.sum(jnp.square(convolve(x, kernel, **options)))

  once = counted(loss, x, kernel)['float32']
  assert counted(jax.grad(loss, argument), x, kernel)['float32'] == 2 * once


def test_interior_convolution_in_closed_form():
  x, kernel = jnp.ones((4, 7, 7, 3)), jnp.ones((3, 3, 3, 8))
  found = counted(lambda x, k: convolve(x, k, padding='VALID'), x, kernel)
  assert found == {'float32': 2 * 4 * 5 * 5 * 8 * 3 * 3 * 3}


@pytest.mark.parametrize('stride', [1, 2])
def test_with_padding_every_output_takes_the_whole_kernel(stride):
  x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

  def both(x, kernel):
    out, pullback = jax.vjp(
        lambda x, k: convolve(x, k, window_strides=(stride, stride)), x, kernel)
    return pullback(out)

  once = 2 * (2 * (8 // stride) ** 2 * 5) * (3 * 3 * 3)
  found = flops.count(jax.make_jaxpr(both)(x, kernel).jaxpr, padding=True)
  assert found == {'float32': 3 * once}


def test_loops_branches_and_nested_functions():
  a = jnp.ones((4, 4))
  product = 2 * 4**3

  def fn(a, flag):
    a = jax.lax.fori_loop(0, 7, lambda _, x: jax.jit(jnp.dot)(x, a), a)
    a, _ = jax.lax.scan(
        lambda x, _: (jax.checkpoint(lambda y: y @ a)(x), None), a, length=3)
    return jax.lax.cond(flag, lambda x: x @ a @ a, lambda x: x @ a, a)

  assert counted(fn, a, True) == {'float32': (7 + 3 + 2) * product}


def test_kinds():
  a = jnp.ones((2, 3))

  def fn(a):
    half = a.astype(jnp.bfloat16)
    with jax.default_matmul_precision('float32'):
      exact = a @ a.T
    return half @ half.T, exact, jnp.dot(a, a.T, precision='high')

  assert counted(fn, a) == {
      'bfloat16': 24.0, 'float32 highest': 24.0, 'float32 high': 24.0}


def test_unknown_length():
  def fn(a):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ x, a)

  with pytest.raises(ValueError, match='unknown length'):
    counted(fn, jnp.ones((2, 2)))
  assert counted(lambda a: jax.lax.while_loop(
      lambda x: jnp.sum(x) < 9, lambda x: x + x, a), jnp.ones(2)) == {}


def test_of_one_device():
  mesh = jax.sharding.Mesh(jax.devices()[:4], ('batch',))
  spec = jax.sharding.PartitionSpec
  fn = jax.shard_map(
      lambda x, w: x @ w, mesh=mesh, in_specs=(spec('batch'), spec()),
      out_specs=spec('batch'))
  assert counted(fn, jnp.ones((8, 3)), jnp.ones((3, 5))) == {
      'float32': 2 * 2 * 3 * 5}
