"""One step on one batch, spread over eight devices in five ways.

`jit` on one device, `pmap`, `shard_map` with and without tracking of varying
values, `vmap` with an axis name, and `jit` on a sharded batch must all agree.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import awp_jax

DEVICES = 8
WAYS = ['pmap', 'shard_map', 'shard_map_unchecked', 'vmap', 'sharded_jit']


def problem(dtype):
  rng = np.random.default_rng(0)
  params = {
      'a': jnp.asarray(rng.standard_normal((6, 5)), dtype),
      'bias': jnp.asarray(rng.standard_normal(5), dtype),
      'b': jnp.asarray(rng.standard_normal((5, 3)), dtype)}
  x = jnp.asarray(rng.standard_normal((16, 6)), dtype)
  return params, x, jnp.asarray(rng.integers(0, 3, 16))


def loss_fn(params, x, y):
  hidden = jnp.tanh(x @ params['a'] + params['bias'])
  losses = awp_jax.cross_entropy(hidden @ params['b'], y)
  return jnp.mean(losses), jnp.sum(losses)


def step(tx, axis_name):
  def run(params, x, y):
    out = awp_jax.awp_step(
        loss_fn, tx, params, tx.init(params), x, y, gamma=0.05, num_steps=2,
        has_aux=True, axis_name=axis_name)
    return out.params, out.loss, out.perturbation

  return run


def spread(way, tx, params, x, y):
  mesh = Mesh(np.array(jax.devices()[:DEVICES]), ('d',))
  parts = (x.reshape(DEVICES, -1, x.shape[1]), y.reshape(DEVICES, -1))
  if way == 'pmap':
    return jax.pmap(
        step(tx, 'd'), axis_name='d', in_axes=(None, 0, 0), out_axes=None)(
            params, *parts)
  if way == 'vmap':
    out = jax.jit(jax.vmap(
        step(tx, 'd'), axis_name='d', in_axes=(None, 0, 0)))(params, *parts)
    return jax.tree.map(lambda leaf: leaf[3], out)
  if way == 'sharded_jit':
    rows = NamedSharding(mesh, P('d'))
    return jax.jit(step(tx, None))(
        params, jax.device_put(x, rows), jax.device_put(y, rows))
  return jax.jit(jax.shard_map(
      step(tx, 'd'), mesh=mesh, in_specs=(P(), P('d'), P('d')), out_specs=P(),
      check_vma=way == 'shard_map'))(params, x, y)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('dtype,tolerance', [
    ('float32', 1e-6), ('float64', 1e-12)])
def test_agrees_with_one_device(way, dtype, tolerance, x64):
  params, x, y = problem(dtype)
  tx = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9))
  wanted = jax.jit(step(tx, None))(params, x, y)
  got = spread(way, tx, params, x, y)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1)


@pytest.mark.parametrize('way', WAYS)
def test_comparison_rejects_a_gradient_that_is_too_large(way, x64):
  params, x, y = problem('float64')
  wanted, *_ = jax.jit(step(optax.sgd(0.1), None))(params, x, y)
  wrong, *_ = spread(way, optax.sgd(0.1 * DEVICES), params, x, y)
  assert np.linalg.norm(wrong['a'] - wanted['a']) > 1e-2


@pytest.mark.parametrize('way', ['pmap', 'vmap', 'shard_map_unchecked'])
def test_comparison_rejects_devices_that_do_not_average(way, monkeypatch, x64):
  # Without communication each device makes a step on its own two examples.
  params, x, y = problem('float64')
  tx = optax.sgd(0.1)
  whole = jax.jit(step(tx, None))(params, x, y)
  monkeypatch.setattr(jax.lax, 'pmean', lambda tree, axis_name: tree)
  got = spread(way, tx, params, x, y)
  part = 3 if way == 'vmap' else 0
  rows = slice(2 * part, 2 * part + 2)
  alone = jax.jit(step(tx, None))(params, x[rows], y[rows])
  for ours, own, other in zip(*map(jax.tree.leaves, (got, alone, whole)),
                              strict=True):
    np.testing.assert_allclose(ours, own, atol=1e-12)
    if own.ndim == 2:
      assert np.linalg.norm(ours - other) > 1e-2
