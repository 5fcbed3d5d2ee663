"""Gradient accumulation in `train_step`: A parts equal A devices."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import methods
from awp_jax.core import loops
from tests.helpers.train_step_problem import (
    ATTACK,
    MART,
    NATURAL,
    OBJECTIVES,
    THREAT,
    TRADES,
    Tiny,
    batch_of,
    counting,
    plain_state,
    run_tiny,
    state_of,
    step,
    tiny_problem,
)

RANDOM = awp_jax.Attack(0.03, 3)
#: name -> keywords of `train_step`
CASES = {
    'AT, as published': {
        'statistics': 'reference', 'alternations': 2,
        'perturbation': methods.awp(0.2, num_steps=2)},
    'TRADES, skipped steps': {
        'objective': TRADES, 'perturbation': methods.every_k(
            methods.rwp(0.2, num_steps=2), 2)},
    'MART, two halves, noise': {
        'objective': MART, 'statistics': 'reference',
        'perturbation': methods.frwp(0.1)},
    'natural, memory': {
        'objective': NATURAL, 'perturbation': methods.momentum_awp(0.1)},
    'L2, mixed losses': {
        'threat': awp_jax.ThreatModel('L2', 0.5),
        'perturbation': methods.m_rwp(0.1)}}


def problem():
  """A model with all statistics in float64, and 16 images."""
  state, batch = tiny_problem(batch=16, model=Tiny(0.3))
  return state.replace(batch_stats=jax.tree.map(
      lambda leaf: leaf.astype(float), state.batch_stats)), batch


def spread(arrays, devices):
  return jax.tree.map(
      lambda x: x.reshape(devices, -1, *x.shape[1:]), arrays)


def on_devices(devices, state, batch, **keywords):
  """One step on several devices."""
  arguments = {'objective': OBJECTIVES['AT'], 'threat': THREAT,
               'attack': RANDOM}
  return jax.pmap(
      functools.partial(
          awp_jax.train_step, axis_name='d', **(arguments | keywords)),
      axis_name='d', in_axes=(None, 0, None), out_axes=None)(
          state, spread(batch, devices), jax.random.key(0))


def assert_same_step(got, wanted):
  (a, metrics), (b, its_metrics) = got, wanted
  chex.assert_trees_all_close(
      (a.params, a.batch_stats, a.opt_state, a.memory),
      (b.params, b.batch_stats, b.opt_state, b.memory), rtol=0, atol=1e-12)
  for name, value in metrics._asdict().items():
    np.testing.assert_allclose(
        value, getattr(its_metrics, name), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow)
    if name.startswith(('MART', 'natural')) else name for name in CASES])
def test_parts_equal_devices(name, x64):
  keywords = CASES[name]
  state, (x, y) = problem()
  labels = jax.nn.one_hot(y, 3) * 0.75 + 0.25 / 3 if 'AT' in name else y
  if method := keywords.get('perturbation'):
    state = state.replace(memory=jax.tree.map(
        lambda m: m + 1, method.init(state.params).memory))
  with loops.platform('tpu'):
    wanted = on_devices(4, state, (x, labels), **keywords)
    got = run_tiny(
        state, (x, labels), accumulate=4, **{'attack': RANDOM} | keywords)
  assert_same_step(got, wanted)


def test_parts_of_devices_in_the_form_of_the_cpu(x64):
  state, batch = problem()
  keywords = {'attack': awp_jax.Attack(0.03, 1), 'statistics': 'reference',
              'perturbation': methods.awp(0.2)}
  wanted = on_devices(4, state, batch, **keywords)
  got = on_devices(2, state, batch, accumulate=2, **keywords)
  assert_same_step(got, wanted)


@pytest.mark.parametrize('tracked', [True, False])
def test_shard_map(tracked, x64):
  state, batch = problem()
  keywords = {'objective': NATURAL, 'perturbation': methods.awp(0.2)}
  wanted = run_tiny(state, batch, accumulate=4, **keywords)
  sharded = jax.shard_map(
      functools.partial(
          awp_jax.train_step, threat=THREAT, attack=ATTACK, axis_name='d',
          accumulate=2, **keywords),
      mesh=Mesh(np.array(jax.devices()[:2]), ('d',)),
      in_specs=(P(), P('d'), P()), out_specs=P(), check_vma=tracked)
  with loops.platform('tpu'):
    got = jax.jit(sharded)(state, batch, jax.random.key(0))
  assert_same_step(got, wanted)


def compiled(accumulate):
  """A step on two devices in the form of accelerators: loops."""

  def forward_fn(params, batch_stats, x, train, key):
    del train, key
    for _ in range(8):
      x = jnp.tanh(x @ params)
    return x, batch_stats

  state = awp_jax.TrainState.create(
      forward_fn=forward_fn, params=jnp.eye(16), tx=optax.sgd(0.1))
  batch = jnp.ones((2, 512, 16)), jnp.zeros((2, 512), int)
  with loops.platform('tpu'):
    return jax.pmap(
        functools.partial(
            awp_jax.train_step, objective=NATURAL, threat=THREAT, attack=ATTACK,
            perturbation=methods.awp(0.1), axis_name='d',
            accumulate=accumulate),
        axis_name='d', in_axes=(None, 0, None), out_axes=None).lower(
            state, batch, jax.random.key(0)).compile()


def test_memory_of_one_part_and_collectives_of_one_gradient():
  whole, parts = compiled(1), compiled(8)
  memory = [program.memory_analysis().temp_size_in_bytes
            for program in (whole, parts)]
  assert memory[1] < memory[0] / 4
  text = parts.as_text()
  computations = dict(re.findall(
      r'^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}', text, re.M | re.S))
  bodies = re.findall(r'while\([^\n]*body=%?([\w.\-]+)', text)
  assert len(bodies) >= 2  # for v, and for the gradient at w + v
  assert not any('all-reduce' in computations[body] for body in bodies)
  assert 0 < text.count(' all-reduce(') <= whole.as_text().count(
      ' all-reduce(')


def test_any_number_of_parts_without_noise_and_batch_statistics(x64):
  state, (x, y) = plain_state(), batch_of(12)
  keywords = {
      'attack': awp_jax.Attack(0.05, 1, start=x + 0.01),
      'perturbation': methods.awp(0.2, num_steps=2), 'alternations': 2}
  wanted = step(state, (x, y), **keywords)
  got = step(state, (x, y), accumulate=3, **keywords)
  assert_same_step(got, wanted)


def gradients_of(state, batch, **keywords):
  """The descended gradients: `REVEALING` keeps them as its state."""
  return step(state, batch, attack=ATTACK, **keywords)[0].opt_state


def test_one_perturbation_for_all_parts(x64):
  state, (x, y) = plain_state(), batch_of(12)
  each = [(x[i:i + 3], y[i:i + 3]) for i in range(0, 12, 3)]

  def mean_of_parts(**keywords):
    return jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0),
        *(gradients_of(state, part, **keywords) for part in each))

  ascent = mean_of_parts()
  after, _ = step(
      state, (x, y), attack=ATTACK, accumulate=4,
      perturbation=methods.awp(0.2))
  # `REVEALING` adds the w + v that it is given to w.
  for name in 'kernel', 'head':
    w, g = state.params[name], ascent[name]
    v = after.params[name] - 2 * w
    np.testing.assert_allclose(
        v, 0.2 * np.linalg.norm(w) * g / np.linalg.norm(g), atol=1e-12)
  # Wrong: a v for every part, as under `optax.MultiSteps`, or one part alone.
  for wrong in (mean_of_parts(perturbation=methods.awp(0.2)), gradients_of(
      state, each[-1], perturbation=methods.awp(0.2))):
    gap = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), after.opt_state, wrong)
    assert min(gap.values()) > 1e-4


def test_statistics_of_a_forward_function():
  state = state_of(counting, jnp.int32(0))
  after, _ = step(state, batch_of(8), accumulate=4, statistics='reference')
  assert after.batch_stats.dtype == jnp.int32
  # Two steps and another pass of the attack, one at w, one at the new w.
  assert after.batch_stats == 5


@pytest.mark.parametrize('accumulate, message', [
    (0, 'accumulate must be a whole number >= 1, got 0'),
    (2.0, 'accumulate must be a whole number >= 1, got 2.0'),
    (3, 'accumulate=3 must divide the batch of 8 images'),
    (8, 'at least two images in every part on every device, got 1')])
def test_a_number_of_parts_that_does_not_fit(accumulate, message):

  def never(*_):
    raise AssertionError('the model was called')

  with pytest.raises(ValueError, match=message):
    step(state_of(never), batch_of(8), accumulate=accumulate,
         perturbation=methods.frwp(0.1))


def test_a_start_that_does_not_fit():
  with pytest.raises(ValueError, match=r'shape of x, \(8, 2, 2\), got \(2, 2'):
    step(plain_state(), batch_of(8), accumulate=4,
         attack=awp_jax.Attack(0.05, 2, start=jnp.zeros((2, 2, 2))))
