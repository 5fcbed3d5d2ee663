"""Products in bfloat16 that XLA would fuse to wrong results on CPUs."""

import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.core import equations
from awp_jax.evaluation import compilation
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


def test_only_results_in_bfloat16_on_cpus_are_separated(monkeypatch):
  def program(x, platform='cpu', out=None):
    def fn(x):
      return jnp.matmul(x, x, preferred_element_type=out)

    return jax.jit(awp_jax.cpu_convolutions(fn)).trace(x).lower(
        lowering_platforms=(platform,)).as_text()

  half = jnp.zeros((4, 4), jnp.bfloat16)
  for affected in (False, True):
    monkeypatch.setattr(equations, '_FUSES_PRODUCTS', affected)
    assert ('optimization_barrier' in program(half)) == affected
    for text in (program(half.astype(jnp.float32)), program(half, 'tpu'),
                 program(half, out=jnp.float32)):
      assert 'optimization_barrier' not in text
      assert len(re.findall(r'dot_general', text)) == 1
