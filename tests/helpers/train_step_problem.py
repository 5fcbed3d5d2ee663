"""Small models, batches and steps, for the tests of `train_step`."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import awp_jax

AT, TRADES, MART, NATURAL = (
    awp_jax.adversarial(), awp_jax.trades(), awp_jax.mart(), awp_jax.natural())
THREAT = awp_jax.ThreatModel('Linf', 0.1)
ATTACK = awp_jax.Attack(0.03, 4, start='zero')
OBJECTIVES = {'AT': awp_jax.adversarial(), 'TRADES': awp_jax.trades(2.0),
              'MART': awp_jax.mart(2.0)}
#: Reveals the inputs of the optimizer: w <- w + given, state <- gradients.
REVEALING = optax.GradientTransformation(
    lambda params: params, lambda gradients, state, params: (params, gradients))


class Tiny(nn.Module):
  """A hidden layer with batch normalization."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6, param_dtype=x.dtype)(x.reshape(len(x), -1))
    x = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, param_dtype=x.dtype)(x)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(x))
    return nn.Dense(3, param_dtype=x.dtype)(x)


def tiny_problem(dtype=jnp.float64, batch=8, model=None):
  """A linen model with batch statistics, and a batch."""
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


def run_tiny(state, batch, *, key=0, **keywords):
  """One compiled step on `tiny_problem`."""
  arguments = {'objective': OBJECTIVES['AT'], 'threat': THREAT,
               'attack': ATTACK}
  return jax.jit(functools.partial(
      awp_jax.train_step, **(arguments | keywords)))(
          state, batch, jax.random.key(key))


def affine(params, x):
  x = jnp.tanh(x.reshape(len(x), -1) @ params['kernel'] + params['bias'])
  return x @ params['head']


def state_of(forward_fn, batch_stats=None, tx=REVEALING, **fields):
  """The state of `affine` parameters, with any forward function."""
  rng = np.random.default_rng(1)
  shapes = {'kernel': (4, 5), 'bias': (5,), 'head': (5, 3)}
  params = {name: jnp.asarray(rng.standard_normal(shape))
            for name, shape in shapes.items()}
  return awp_jax.TrainState.create(
      forward_fn=forward_fn, params=params, batch_stats=batch_stats, tx=tx,
      **fields)


def plain(params, batch_stats, x, train, key):
  return affine(params, x), batch_stats


def plain_state(**fields):
  return state_of(plain, **fields)


def batch_of(size=6):
  """Images [size, 2, 2] and labels [size]."""
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.uniform(0.2, 0.8, (size, 2, 2))),
          jnp.asarray(rng.integers(0, 3, size)))


def compiled(**keywords):
  """`train_step` as one program, which takes less time than its operations.

  Equal keywords give the same function, unless one has no hash.
  """
  try:
    return compiled_once(**keywords)
  except TypeError:  # an attack that starts at an array
    return compiled_once.__wrapped__(**keywords)


@functools.cache
def compiled_once(**keywords):
  return jax.jit(functools.partial(awp_jax.train_step, **keywords))


def step(state, batch, *, key=0, objective=None, attack=None, **keywords):
  """One compiled step on `state_of`."""
  arguments = {
      'threat': THREAT, 'objective': objective or AT,
      'attack': attack or awp_jax.Attack(0.05, 2)} | keywords
  return compiled(**arguments)(state, batch, jax.random.key(key))


def counting(params, batch_stats, x, train, key):
  """A forward function whose statistics count the passes in train mode."""
  return affine(params, x), batch_stats + train
