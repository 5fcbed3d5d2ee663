"""What holds for every threat model, network and perturbation."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from tests.helpers.fuzzing import fuzzed

SHAPES = [(3, 4), (2, 2, 3), (1, 3, 3, 2), (2, 1, 2, 2, 1)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def curved(weights, x):
  """A loss per example with plateaus, kinks and steep parts."""
  z = jnp.sum(jnp.reshape(x, (len(x), -1)) * weights, 1)
  return jnp.maximum(z, 0) ** 2 - 3 * jnp.abs(z) + 0 * jnp.sum(weights)


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
def test_attacks_stay_in_ball_and_box(norm):

  @fuzzed(0.5, deadline=60_000)
  @given(st.sampled_from(SHAPES), st.sampled_from(DTYPES),
         st.floats(-4, 1.5), st.floats(-3, 2, allow_subnormal=False),
         st.floats(0.01, 4),
         st.floats(0.02, 3), st.integers(0, 9))
  def run(shape, dtype, log_epsilon, lower, width, share, seed):
    epsilon, upper = 10 ** log_epsilon, lower + width
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.uniform(lower, upper, shape), dtype)
    # The box of numbers that the type has.
    lower, upper = (min(lower, float(x.min())), max(upper, float(x.max())))
    threat = awp_jax.ThreatModel(norm, epsilon, lower=lower, upper=upper)
    weights = jnp.asarray(rng.normal(size=int(np.prod(shape[1:]))), jnp.float32)
    weights = weights * 10.0 ** rng.integers(-20, 18)
    found = awp_jax.pgd(
        jax.random.key(seed), functools.partial(curved, weights), x, threat,
        step_size=share * epsilon, num_steps=3, restarts=2)
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all()
    assert found.min() >= np.float32(lower) and found.max() <= np.float32(upper)
    moved = np.abs(found - np.asarray(x, np.float64)).reshape(len(x), -1)
    size = {'Linf': moved.max(1), 'L1': moved.sum(1),
            'L2': np.sqrt((moved ** 2).sum(1))}[norm]
    rounding = 1e-6 * max(abs(lower), abs(upper), 1.0) * moved.shape[1]
    assert size.max() <= epsilon * (1 + 1e-5) + rounding

  run()


METHODS = {
    'awp': awp_jax.methods.awp, 'rwp': awp_jax.methods.rwp,
    'random': awp_jax.methods.random, 'sam': awp_jax.methods.sam,
    'arwp': awp_jax.methods.arwp}


@pytest.mark.filterwarnings('ignore:. perturbed parameters are in half')
@pytest.mark.parametrize('name', METHODS)
def test_weights_come_back_bit_by_bit(name):
  """Without an update the step returns what it was given, whatever v was."""

  @fuzzed(0.5, deadline=60_000)
  @given(st.sampled_from([0.0, 1e-12, 0.01, 1.0, 1e6]),
         st.sampled_from(DTYPES[:2]), st.integers(0, 9), st.booleans())
  def run(size, dtype, seed, is_jitted):
    rng = np.random.default_rng(seed)
    params = {
        'kernel': jnp.asarray(rng.normal(size=(3, 2)), dtype),
        'zero': jnp.zeros((2, 2), dtype), 'bias': jnp.ones(2, dtype)}
    x = jnp.asarray(rng.normal(size=(4, 3)), dtype)

    def loss_fn(params):
      losses = jnp.sum(jnp.tanh(
          x @ params['kernel'] @ params['zero'] + params['bias']), 1)
      return losses if name == 'rwp' else jnp.sum(losses)

    method = METHODS[name](size)
    tx = optax.sgd(0.0)

    def step(params):
      return awp_jax.perturbed_step(
          method, loss_fn, tx, params, tx.init(params), method.init(params),
          noise_key=jax.random.key(seed))

    out = (jax.jit(step) if is_jitted else step)(params)
    for given_leaf, leaf in zip(
        jax.tree.leaves(params), jax.tree.leaves(out.params), strict=True):
      assert leaf.dtype == given_leaf.dtype
      assert np.asarray(leaf).tobytes() == np.asarray(given_leaf).tobytes()
    if size == 0:
      assert not any(np.any(leaf) for leaf in jax.tree.leaves(out.perturbation))

  run()


LOSSES = {
    'AT': awp_jax.adversarial(), 'TRADES': awp_jax.trades(6.0),
    'MART': awp_jax.mart(5.0)}


@pytest.mark.parametrize('name', LOSSES)
def test_losses_and_gradients_are_finite(name):
  objective = LOSSES[name]

  @jax.jit
  def value_and_grad(logits, natural, labels):
    def loss(both):
      return jnp.sum(objective.train_loss(*both, labels))

    return jax.value_and_grad(loss)((logits, natural))

  @fuzzed(deadline=60_000)
  @given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=12, max_size=12),
         st.lists(st.integers(0, 2), min_size=2, max_size=2))
  def run(values, labels):
    logits = jnp.asarray(values, jnp.float32).reshape(2, 2, 3)
    value, gradients = value_and_grad(logits[0], logits[1], jnp.array(labels))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in gradients)

  run()
