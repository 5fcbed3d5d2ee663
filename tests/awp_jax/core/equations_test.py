"""Products in bfloat16 that XLA would fuse to wrong results on CPUs."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.core import equations
from awp_jax.evaluation.engine import compilation
from awp_jax.models import PreActResNet


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def dense(x, kernel):
  return x @ kernel


def conv(x, kernel):
  return lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def grouped(x, kernel):
  return lax.conv_general_dilated(
      x, kernel[:, :, :1], (1, 1), 'SAME', feature_group_count=x.shape[-1],
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@pytest.mark.parametrize('layer, x, kernel', [
    (dense, normal(0, 64, 512), normal(1, 512, 512) / 22),
    (conv, normal(0, 16, 2, 2, 128), normal(1, 3, 3, 128, 128) / 34),
    (conv, normal(0, 16, 8, 8, 128), normal(1, 1, 1, 128, 128) / 11),
    (conv, normal(0, 16, 8, 8, 128), normal(1, 3, 3, 128, 128) / 34),
    (grouped, normal(0, 16, 8, 8, 128), normal(1, 3, 3, 128, 128) / 3)])
def test_sums_of_products_agree_with_float32(layer, x, kernel):
  def run(x, kernel):
    for _ in range(3):
      x = jax.nn.relu(layer(x, kernel))
    return x.astype(jnp.float32).reshape(len(x), -1).sum(-1)

  want = run(x, kernel)
  half = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  for _ in range(3):  # what is wrong differs from call to call
    got = jax.jit(awp_jax.cpu_convolutions(run))(*half)
    np.testing.assert_allclose(got, want, rtol=0.02)
    got = compilation.constants_as_arguments(run)(*half)
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_a_network_of_small_images_agrees_with_float32():
  """Its last convolutions are products of all pixels, then there is a mean."""
  x = jax.random.uniform(jax.random.key(0), (64, 16, 16, 3))
  model = PreActResNet(10, width=16)
  variables = jax.jit(model.init)(jax.random.key(1), x)

  def logits(dtype):
    network = model.clone(dtype=dtype)
    return compilation.constants_as_arguments(
        lambda x: network.apply(variables, x, train=False))(x)

  want = logits(jnp.float32)
  for _ in range(3):
    error = np.abs(logits(jnp.bfloat16) - want).max()
    assert error < 0.05 * np.ptp(want)


def test_no_other_route_to_bfloat16_is_miscompiled():
  """Products in float32 that are rounded, on a mesh, in a composite."""
  x, kernel = normal(0, 64, 512), normal(1, 512, 512) / 22
  half = jnp.bfloat16

  def wide(x, kernel):
    return jnp.matmul(
        x, kernel, preferred_element_type=jnp.float32).astype(half)

  def single(x, kernel):
    return (x.astype(jnp.float32) @ kernel.astype(jnp.float32)).astype(half)

  def elementwise(x, kernel):
    return (x[:, :64, None] * kernel[None, :64, :64]).sum(1)

  def run(layer, act):
    def fn(x, kernel):
      for _ in range(3):
        x = act(layer(x.astype(half), kernel.astype(half)))
      return x.astype(jnp.float32).sum(-1)
    return fn

  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('d',))
  spec = jax.sharding.PartitionSpec
  def unrounded(x, kernel):
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)

  for layer in (dense, wide, single, elementwise, unrounded):
    for act in (jax.nn.relu, lambda a: -jnp.minimum(-a, 0),
                lambda a: jnp.maximum(a, 0.25),
                lambda a: jax.nn.relu(a.astype(jnp.float32))):
      fn = run(layer, act)
      forms = [fn]
      if layer is dense:
        forms += [
            jax.shard_map(
                fn, mesh=mesh, in_specs=(spec('d'), spec()),
                out_specs=spec('d')),
            lax.composite(fn, 'a.name'), jax.checkpoint(fn)]
      for form in forms:
        got = jax.jit(awp_jax.cpu_convolutions(form))(x, kernel)
        want = fn(x, kernel)
        np.testing.assert_allclose(
            got, want, atol=0.02 * np.abs(want).max())


def test_only_extrema_in_bfloat16_get_a_barrier(monkeypatch):
  def barriers(fn, x):
    return jax.jit(awp_jax.cpu_convolutions(fn)).lower(x).as_text().count(
        'optimization_barrier')

  half = jnp.zeros((4, 4), jnp.bfloat16)
  for affected in (False, True):
    monkeypatch.setattr(equations, '_FUSES_PRODUCTS', affected)
    for fn in (lambda x: jnp.maximum(x, 0), lambda x: jnp.minimum(x, 0)):
      assert barriers(fn, half) == affected
      assert barriers(fn, half.astype(jnp.float32)) == 0
      mixed = jax.jit(lambda x, fn=fn: fn(x.astype(jnp.float32)))
      assert barriers(mixed, half) == affected
    assert barriers(lambda x: x @ x, half) == 0
    assert barriers(lambda x: jax.lax.fori_loop(
        0, 3, lambda _, y: jnp.maximum(y, 1), x), half) == affected


def test_later_releases_count_as_affected_until_they_are_tested():
  assert equations._FUSES_PRODUCTS == (jax.__version_info__ >= (0, 11))
