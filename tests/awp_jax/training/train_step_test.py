"""The composed step: trajectories, policies, devices, compiled form."""

import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import objectives
from awp_jax.core import loops
from awp_jax.models import PreActResNet
from tests.helpers import torch_layout

CIFAR10_MEAN, CIFAR10_STD = (.4914, .4822, .4465), (.2471, .2435, .2616)


def momentum_of(opt_state):
  return next(
      node.trace for node in jax.tree.leaves(
          opt_state, is_leaf=lambda n: isinstance(n, optax.TraceState))
      if isinstance(node, optax.TraceState))


def largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(
      lambda x, y: float(np.abs(x - y).max()), a, b)))


# One with the attack written out, as on the CPU, and two in a loop, as on
# accelerators, which compiles faster.
@pytest.mark.parametrize('name,norm,objective,statistics,unrolls', [
    ('at_awp_linf', 'Linf', awp_jax.adversarial(), 'reference', True),
    ('at_awp_l2', 'L2', awp_jax.adversarial(), 'reference', False),
    # This trajectory moves the statistics once for each of the two passes at
    # w + v; the published TRADES code makes its natural pass twice.
    ('trades_awp_linf', 'Linf', awp_jax.trades(6.0), 'perturbed', False),
])
def test_reference_trajectory(
    name, norm, objective, statistics, unrolls, load_fixture, monkeypatch, x64):
  archive = load_fixture(name)
  monkeypatch.setattr(loops, 'unrolls', lambda: unrolls)
  setting = {key[4:]: float(archive[key]) for key in archive.files
             if key.startswith('cfg/')}
  normalised = name.startswith('at')
  model = PreActResNet(
      10, width=4, param_dtype=jnp.float64,
      mean=CIFAR10_MEAN if normalised else (0.0,),
      std=CIFAR10_STD if normalised else (1.0,))
  first = torch_layout.variables(archive, 'init/')
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=first['params'],
      batch_stats=first['batch_stats'], tx=optax.chain(
          optax.add_decayed_weights(setting['weight_decay']),
          optax.sgd(setting['lr'], setting['momentum'])))

  # XLA runs convolutions in float64 as plain loops, which LLVM must optimise.
  @functools.partial(
      jax.jit, compiler_options={'xla_backend_optimization_level': 2})
  def step(state, x, y, start):
    return awp_jax.train_step(
        state, (x, y), jax.random.key(0), objective=objective,
        threat=awp_jax.ThreatModel(norm, setting['eps']),
        attack=awp_jax.Attack(
            setting['alpha'], int(setting['K']), start=start),
        perturbation=awp_jax.methods.awp(setting['gamma']),
        statistics=statistics)

  for i in range(int(setting['steps'])):
    x, delta = (archive[key][i].transpose(0, 2, 3, 1)
                for key in ('x', 'delta0'))
    state, metrics = step(state, x, archive['y'][i], x + delta)
    assert abs(metrics.loss - archive['loss'][i]) < 1e-12
    np.testing.assert_allclose(
        metrics.perturbation_ratio, setting['gamma'], rtol=1e-12)
  last = torch_layout.variables(archive, 'final/')
  momentum = torch_layout.variables(archive, 'momentum/')['params']
  assert largest_difference(state.params, last['params']) < 1e-10
  assert largest_difference(state.batch_stats, last['batch_stats']) < 1e-10
  assert largest_difference(momentum_of(state.opt_state), momentum) < 1e-10
  assert largest_difference(first['params'], last['params']) > 1e-2


class Tiny(nn.Module):
  """A hidden layer with batch normalisation."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, param_dtype=x.dtype)(x.reshape(len(x), -1))
    x = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, param_dtype=x.dtype)(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(x))
    return nn.Dense(3, param_dtype=x.dtype)(x)


THREAT = awp_jax.ThreatModel('Linf', 0.1)
ATTACK = awp_jax.Attack(0.03, 4, start='zero')
OBJECTIVES = {'AT': awp_jax.adversarial(), 'TRADES': awp_jax.trades(2.0),
              'MART': awp_jax.mart(2.0)}


def tiny_problem(dtype=jnp.float64, batch=8, model=None):
  rng = np.random.default_rng(0)
  model = model or Tiny()
  x = jnp.asarray(rng.uniform(0.2, 0.8, (batch, 2, 3, 1)), dtype)
  y = jnp.asarray(rng.integers(0, 3, batch))
  variables = model.init(jax.random.key(1), x)
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=variables['params'],
      batch_stats=variables['batch_stats'], tx=optax.chain(
          optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9)))
  return state, (x, y)


def run(state, batch, *, key=0, **keywords):
  arguments = {'objective': OBJECTIVES['AT'], 'threat': THREAT,
               'attack': ATTACK}
  return jax.jit(functools.partial(
      awp_jax.train_step, **(arguments | keywords)))(
          state, batch, jax.random.key(key))


def train_logits(state, params, x):
  return state.apply_fn(
      {'params': params, 'batch_stats': state.batch_stats}, x, train=True,
      mutable=['batch_stats'])[0]


def written_out(state, x, y, *, rounds, weight_steps, gamma):
  """AT-AWP with alternation, straight from its formulas."""
  v, x_adv = jax.tree.map(jnp.zeros_like, state.params), x

  def loss(params, inputs):
    return jnp.mean(objectives.cross_entropy(
        train_logits(state, params, inputs), y))

  def shifted(v):
    return jax.tree.map(jnp.add, state.params, v)

  for _ in range(rounds):
    for _ in range(ATTACK.num_steps):
      g = jax.grad(loss, argnums=1)(shifted(v), x_adv)
      x_adv = x_adv + ATTACK.step_size * jnp.sign(g)
      x_adv = jnp.clip(jnp.clip(x_adv, x - 0.1, x + 0.1), 0, 1)
    for _ in range(weight_steps):
      g = jax.grad(loss)(shifted(v), x_adv)

      def move(v, g, w):
        if w.ndim < 2:
          return jnp.zeros_like(w)
        radius = gamma * jnp.linalg.norm(w)
        v = v + radius / (rounds * weight_steps) * g / jnp.linalg.norm(g)
        return v * jnp.minimum(1, radius / jnp.linalg.norm(v))

      v = jax.tree.map(move, v, g, state.params)
  value, g = jax.value_and_grad(loss)(shifted(v), x_adv)
  params = jax.tree.map(
      lambda w, v, g: w - 0.1 * (g + 1e-2 * (w + v)), state.params, v, g)
  return value, params


@pytest.mark.parametrize(
    'rounds,weight_steps', [(1, 1), (3, 2)])
def test_alternation_equals_its_formula(rounds, weight_steps, x64):
  state, (x, y) = tiny_problem()
  wanted_loss, wanted = written_out(
      state, x, y, rounds=rounds, weight_steps=weight_steps, gamma=0.3)
  got, metrics = run(state, (x, y), alternations=rounds,
                     perturbation=awp_jax.methods.awp(
                         0.3, num_steps=weight_steps))
  np.testing.assert_allclose(metrics.loss, wanted_loss, rtol=1e-12)
  assert largest_difference(got.params, wanted) < 1e-12
  if (rounds, weight_steps) != (1, 1):
    _, other = written_out(
        state, x, y, rounds=1, weight_steps=1, gamma=0.3)
    assert largest_difference(got.params, other) > 1e-6


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives_equal_the_formula(name, x64):
  state, (x, y) = tiny_problem()
  objective = OBJECTIVES[name]

  def eval_logits(x):
    return state.apply_fn(
        {'params': state.params, 'batch_stats': state.batch_stats}, x)

  x_adv, natural = x + 1e-3, eval_logits(x)
  for _ in range(ATTACK.num_steps):
    g = jax.grad(lambda inputs: jnp.sum(objective.attack_loss(
        eval_logits(inputs), natural, y)))(x_adv)
    x_adv = jnp.clip(x_adv + 0.03 * jnp.sign(g), x - 0.1, x + 0.1)

  def loss(params):
    return jnp.mean(objective.train_loss(
        train_logits(state, params, x_adv), train_logits(state, params, x), y))

  value, g = jax.value_and_grad(loss)(state.params)
  wanted = jax.tree.map(
      lambda w, g: w - 0.1 * (g + 1e-2 * w), state.params, g)
  got, metrics = run(
      state, (x, y), objective=objective,
      attack=ATTACK._replace(mode='eval', start=x + 1e-3))
  np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
  assert largest_difference(got.params, wanted) < 1e-12


def ema(stats, batches):
  for batch in batches:
    stats = 0.9 * stats + 0.1 * batch
  return stats


def hidden_mean(params, x):
  layer = params['Dense_0']
  return (x.reshape(len(x), -1) @ layer['kernel'] + layer['bias']).mean(axis=0)


@pytest.mark.parametrize('statistics', ['perturbed', 'reference'])
@pytest.mark.parametrize('name', ['TRADES', 'MART'])
def test_statistics_policies_with_two_passes(name, statistics, x64):
  # From a start of one step that is undone, x' is known: only means of the
  # passes at the old weights (gamma 0) enter.
  state, (x, y) = tiny_problem()
  start = x + 1e-3
  got, _ = run(
      state, (x, y), objective=OBJECTIVES[name], statistics=statistics,
      attack=awp_jax.Attack(1e-9, 1, start=start))
  natural = hidden_mean(state.params, x)
  adversarial = hidden_mean(state.params, start)
  order = {
      ('TRADES', 'perturbed'): [adversarial, natural],
      ('TRADES', 'reference'): [adversarial, natural, natural],
      ('MART', 'perturbed'): [natural, adversarial],
      ('MART', 'reference'): [natural, adversarial]}[name, statistics]
  np.testing.assert_allclose(
      got.batch_stats['BatchNorm_0']['mean'],
      ema(np.zeros(6), order), atol=1e-7)


def test_statistics_of_at_under_both_policies(x64):
  state, (x, y) = tiny_problem()
  start = x + 1e-3
  attack = awp_jax.Attack(1e-9, 3, start=start)
  adversarial = hidden_mean(state.params, start)
  simple, _ = run(state, (x, y), attack=attack)
  np.testing.assert_allclose(
      simple.batch_stats['BatchNorm_0']['mean'],
      ema(np.zeros(6), [adversarial]), atol=1e-7)
  published, _ = run(state, (x, y), attack=attack, statistics='reference')
  # Three steps, one more pass, the pass at w + v, a natural one at the new w.
  order = [adversarial] * 5 + [hidden_mean(published.params, x)]
  np.testing.assert_allclose(
      published.batch_stats['BatchNorm_0']['mean'],
      ema(np.zeros(6), order), atol=1e-7)


def test_gamma_zero_makes_no_ascent_pass():
  state, batch = tiny_problem(jnp.float32)

  def products(gamma):
    jaxpr = jax.make_jaxpr(functools.partial(
        awp_jax.train_step, objective=OBJECTIVES['AT'], threat=THREAT,
        attack=ATTACK, perturbation=awp_jax.methods.awp(gamma)))(
            state, batch, jax.random.key(0))
    return str(jaxpr).count('dot_general')

  assert products(0) == products(0.0) < products(0.01)


def pmap(step):
  return jax.pmap(step, axis_name='d', in_axes=(None, 0, None), out_axes=None)


def pmapped(**keywords):
  arguments = {'objective': OBJECTIVES['AT'], 'threat': THREAT,
               'attack': ATTACK}
  return pmap(functools.partial(
      awp_jax.train_step, axis_name='d', **(arguments | keywords)))


class Linear(nn.Module):
  """No batch statistics, so that devices can be compared with one device."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(3, param_dtype=x.dtype)(
        nn.tanh(nn.Dense(5, param_dtype=x.dtype)(x.reshape(len(x), -1))))


# Not TRADES: from the natural images its attack has a gradient of zero, whose
# rounding has other signs on other devices.
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
  wanted, wanted_metrics = run(state, (x, y), **keywords)
  got, metrics = pmapped(**keywords)(
      state, (x.reshape(8, 2, 2, 3, 1), y.reshape(8, 2)), jax.random.key(0))
  assert largest_difference(got.params, wanted.params) < 1e-12
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
  assert bodies, 'the attack is no loop here'
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
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = jax.device_put(state, everywhere)  # where the step leaves it, too
  state, _ = step(state, parts, jax.random.key(0))
  once = len(traces)
  for _ in range(3):
    state, _ = step(state, parts, jax.random.key(0))
  assert len(traces) == once


@pytest.mark.parametrize('name', OBJECTIVES)
def test_training_lowers_the_loss(name):
  state, batch = tiny_problem(jnp.float32, batch=16)
  step = jax.jit(functools.partial(
      awp_jax.train_step, objective=OBJECTIVES[name], threat=THREAT,
      attack=ATTACK, perturbation=awp_jax.methods.awp(0.01)))
  state, first = step(state, batch, jax.random.key(0))
  for _ in range(60):
    state, metrics = step(state, batch, jax.random.key(0))
  assert metrics.loss < 0.7 * first.loss
  assert int(state.step) == 61


@pytest.mark.parametrize('keywords,message', [
    ({'statistics': 'simple'}, "one of 'perturbed', 'reference', got 'simple'"),
    ({'attack': ATTACK._replace(mode='test')}, "one of 'train', 'eval'"),
    ({'attack': ATTACK._replace(step_size=0)}, 'step_size .* > 0, got 0'),
    ({'perturbation': awp_jax.methods.frwp()}, r"'FRWP' halves .*, got 1\."),
    ({'alternations': 0}, 'alternations must be a whole number >= 1, got 0'),
    ({'alternations': 2,
      'attack': awp_jax.Attack(0.1, 1, restarts=2)}, 'One of them must be 1'),
])
def test_bad_arguments(keywords, message):
  state, batch = tiny_problem(
      jnp.float32, batch=1 if 'halves' in message else 2)
  with pytest.raises(ValueError, match=message):
    run(state, batch, **keywords)


def test_perturbation_must_be_a_method():
  state, batch = tiny_problem(jnp.float32)
  with pytest.raises(TypeError, match=r'must be a Method, .*or None, got 0\.1'):
    run(state, batch, perturbation=0.1)
