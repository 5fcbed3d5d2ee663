"""The composed step: trajectories, formulas, arguments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import objectives
from awp_jax.core import loops
from tests.helpers import torch_layout
from tests.helpers.train_step_problem import (
    ATTACK,
    OBJECTIVES,
    THREAT,
    run_tiny,
    tiny_problem,
)


# The attack is a loop, as on accelerators, which compiles in half the time;
# pgd_test compares loops with unrolled attacks.
@pytest.mark.slow
@pytest.mark.parametrize('name,norm,objective,statistics', [
    ('at_awp_linf', 'Linf', awp_jax.adversarial(), 'reference'),
    ('at_awp_l2', 'L2', awp_jax.adversarial(), 'reference'),
    # In this trajectory each of the two passes at w + v updates the statistics
    # once; the published TRADES code runs its natural pass twice.
    ('trades_awp_linf', 'Linf', awp_jax.trades(6.0), 'perturbed'),
])
def test_reference_trajectory(
    name, norm, objective, statistics, load_fixture, monkeypatch, x64):
  archive = load_fixture(name)
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  wanted = torch_layout.recorded(archive)
  got = torch_layout.follow(
      archive, objective, norm=norm, statistics=statistics,
      normalized=name.startswith('at'), optimization=2)
  assert torch_layout.distance(got.losses, wanted.losses) < 1e-12
  np.testing.assert_allclose(got.ratios, wanted.ratios, rtol=1e-12)
  for part in ('params', 'batch_stats', 'momentum'):
    chex.assert_trees_all_close(
        getattr(got, part), getattr(wanted, part), rtol=0, atol=1e-10)
  first = torch_layout.variables(archive, 'init/')
  assert torch_layout.distance(first['params'], wanted.params) > 1e-2


def train_logits(state, params, x):
  return state.apply_fn(
      {'params': params, 'batch_stats': state.batch_stats}, x, train=True,
      mutable=['batch_stats'])[0]


def written_out(state, x, y, *, rounds, weight_steps, gamma):
  """AT-AWP with alternation, directly from its formulas."""
  v, x_adv = jax.tree.map(jnp.zeros_like, state.params), x

  def loss(params, inputs):
    return jnp.mean(objectives.cross_entropy(
        train_logits(state, params, inputs), y))

  def shifted(v):
    return jax.tree.map(jnp.add, state.params, v)

  of_images = jax.jit(jax.grad(loss, argnums=1))
  of_weights = jax.jit(jax.value_and_grad(loss))
  for _ in range(rounds):
    for _ in range(ATTACK.num_steps):
      g = of_images(shifted(v), x_adv)
      x_adv = x_adv + ATTACK.step_size * jnp.sign(g)
      x_adv = jnp.clip(jnp.clip(x_adv, x - 0.1, x + 0.1), 0, 1)
    for _ in range(weight_steps):
      _, g = of_weights(shifted(v), x_adv)

      def move(v, g, w):
        if w.ndim < 2:
          return jnp.zeros_like(w)
        radius = gamma * jnp.linalg.norm(w)
        v = v + radius / (rounds * weight_steps) * g / jnp.linalg.norm(g)
        return v * jnp.minimum(1, radius / jnp.linalg.norm(v))

      v = jax.tree.map(move, v, g, state.params)
  value, g = of_weights(shifted(v), x_adv)
  params = jax.tree.map(
      lambda w, v, g: w - 0.1 * (g + 1e-2 * (w + v)), state.params, v, g)
  return value, params


@pytest.mark.parametrize(
    'rounds,weight_steps', [(1, 1), (3, 2)])
def test_alternation_equals_its_formula(rounds, weight_steps, x64):
  state, (x, y) = tiny_problem()
  wanted_loss, wanted = written_out(
      state, x, y, rounds=rounds, weight_steps=weight_steps, gamma=0.3)
  got, metrics = run_tiny(state, (x, y), alternations=rounds,
                     perturbation=awp_jax.methods.awp(
                         0.3, num_steps=weight_steps))
  np.testing.assert_allclose(metrics.loss, wanted_loss, rtol=1e-12)
  chex.assert_trees_all_close(
      got.params, wanted, rtol=0, atol=1e-12)
  if (rounds, weight_steps) != (1, 1):
    _, other = written_out(
        state, x, y, rounds=1, weight_steps=1, gamma=0.3)
    assert torch_layout.distance(got.params, other) > 1e-6


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives_equal_the_formula(name, x64):
  state, (x, y) = tiny_problem()
  objective = OBJECTIVES[name]

  def eval_logits(x):
    return state.apply_fn(
        {'params': state.params, 'batch_stats': state.batch_stats}, x)

  x_adv, natural = x + 1e-3, jax.jit(eval_logits)(x)
  of_images = jax.jit(jax.grad(lambda inputs: jnp.sum(objective.attack_loss(
      eval_logits(inputs), natural, y))))
  for _ in range(ATTACK.num_steps):
    g = of_images(x_adv)
    x_adv = jnp.clip(x_adv + 0.03 * jnp.sign(g), x - 0.1, x + 0.1)

  def loss(params):
    return jnp.mean(objective.train_loss(
        train_logits(state, params, x_adv), train_logits(state, params, x), y))

  value, g = jax.jit(jax.value_and_grad(loss))(state.params)
  wanted = jax.tree.map(
      lambda w, g: w - 0.1 * (g + 1e-2 * w), state.params, g)
  got, metrics = run_tiny(
      state, (x, y), objective=objective,
      attack=ATTACK._replace(mode='eval', start=x + 1e-3))
  np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
  chex.assert_trees_all_close(
      got.params, wanted, rtol=0, atol=1e-12)


def test_gamma_zero_makes_no_ascent_pass():
  state, batch = tiny_problem(jnp.float32)

  def products(gamma):
    jaxpr = jax.make_jaxpr(functools.partial(
        awp_jax.train_step, objective=OBJECTIVES['AT'], threat=THREAT,
        attack=ATTACK, perturbation=awp_jax.methods.awp(gamma)))(
            state, batch, jax.random.key(0))
    return str(jaxpr).count('dot_general')

  assert products(0) == products(0.0) < products(0.01)


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
    ({'statistics': 'simple'},
     "^statistics must be one of 'perturbed', 'reference', got 'simple'"),
    ({'attack': ATTACK._replace(mode='test')},
     "^mode must be one of 'train', 'eval', got 'test'"),
    ({'attack': ATTACK._replace(step_size=0)}, 'step_size .* > 0, got 0'),
    ({'perturbation': awp_jax.methods.frwp()}, r"'FRWP' halves .*, got 1\."),
    ({'alternations': 0}, '^alternations must be a whole number >= 1, got 0'),
    ({'alternations': 2,
      'attack': awp_jax.Attack(0.1, 1, restarts=2)}, 'One of them must be 1'),
])
def test_bad_arguments(keywords, message):
  state, batch = tiny_problem(
      jnp.float32, batch=1 if 'halves' in message else 2)
  with pytest.raises(ValueError, match=message):
    run_tiny(state, batch, **keywords)


def test_perturbation_must_be_a_method():
  state, batch = tiny_problem(jnp.float32)
  with pytest.raises(TypeError, match=r'must be a Method, .*or None, got 0\.1'):
    run_tiny(state, batch, perturbation=0.1)


def test_images_must_be_floating():
  state, (x, y) = tiny_problem(jnp.float32, batch=2)
  with pytest.raises(ValueError, match=r'^images must be floating, .* uint8'):
    run_tiny(state, (x.astype(jnp.uint8), y))
