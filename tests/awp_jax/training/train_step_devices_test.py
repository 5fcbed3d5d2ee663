"""Steps on several devices: agreement, communication, compilation."""

import functools
import re

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax.core import loops
from tests.helpers.train_step_problem import (
    ATTACK,
    OBJECTIVES,
    THREAT,
    run_tiny,
    tiny_problem,
)


def pmap(step):
  return jax.pmap(step, axis_name='d', in_axes=(None, 0, None), out_axes=None)


def pmapped(**keywords):
  arguments = {'objective': OBJECTIVES['AT'], 'threat': THREAT,
               'attack': ATTACK}
  return pmap(functools.partial(
      awp_jax.train_step, axis_name='d', **(arguments | keywords)))


class Linear(nn.Module):
  """A model without batch statistics, which would differ between devices."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3, param_dtype=x.dtype)(
        nn.tanh(nn.Dense(5, param_dtype=x.dtype)(x.reshape(len(x), -1))))


# Not TRADES: at the natural images its attack has a zero gradient, whose
# rounding differs in sign between devices.
@pytest.mark.parametrize('name', ['AT', 'MART'])
def test_devices_agree_with_one(name, x64):
  model = Linear()
  _, (x, y) = tiny_problem(batch=16)
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=model.init(jax.random.key(0), x)['params'],
      batch_stats={}, tx=optax.sgd(0.1, 0.9))
  keywords = {
      'objective': OBJECTIVES[name], 'statistics': 'reference',
      'perturbation': awp_jax.methods.awp(0.2, num_steps=2),
      'alternations': 2}
  wanted, wanted_metrics = run_tiny(state, (x, y), **keywords)
  got, metrics = pmapped(**keywords)(
      state, (x.reshape(8, 2, 2, 3, 1), y.reshape(8, 2)), jax.random.key(0))
  chex.assert_trees_all_close(
      got.params, wanted.params, rtol=0, atol=1e-12)
  for a, b in zip(metrics, wanted_metrics, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def compiled_text(num_steps, gamma=0.01):
  state, (x, y) = tiny_problem(jnp.float32, batch=16)
  step = pmapped(
      attack=awp_jax.Attack(0.03, num_steps), statistics='reference',
      perturbation=awp_jax.methods.awp(gamma))
  return step.lower(
      state, (x.reshape(8, 2, 2, 3, 1), y.reshape(8, 2)),
      jax.random.key(0)).compile().as_text()


def collectives(text):
  return len(re.findall(r' all-reduce(?:-start)?\(', text))


def test_no_collective_inside_the_attack(monkeypatch):
  unrolled = [collectives(compiled_text(k)) for k in (1, 5)]
  assert unrolled[0] == unrolled[1] > 0
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  text = compiled_text(5)
  computations = dict(re.findall(
      r'^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}', text, re.M | re.S))
  bodies = re.findall(r'while\([^\n]*body=%?([\w.\-]+)', text)
  assert bodies, 'the attack is not a loop'
  for body in bodies:
    assert 'all-reduce' not in computations[body]
  assert collectives(text) == unrolled[0]


def test_second_call_does_not_recompile():
  state, batch = tiny_problem(jnp.float32, batch=16)
  parts = (batch[0].reshape(8, 2, 2, 3, 1), batch[1].reshape(8, 2))
  traces = []

  def counted(*arguments):
    traces.append(1)
    return awp_jax.train_step(
        *arguments, objective=OBJECTIVES['AT'], threat=THREAT, attack=ATTACK,
        perturbation=awp_jax.methods.awp(0.01), axis_name='d')

  step = pmap(counted)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('d',))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = jax.device_put(state, replicated)  # as in the output of the step
  state, _ = step(state, parts, jax.random.key(0))
  once = len(traces)
  for _ in range(3):
    state, _ = step(state, parts, jax.random.key(0))
  assert len(traces) == once
