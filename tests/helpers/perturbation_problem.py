"""A network of two layers on five examples, for the tests of perturbations."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax.perturbation import methods, perturbed_step

PARAMS = {
    'dense': {'kernel': np.linspace(-1, 1, 12).reshape(4, 3),
              'bias': np.array([0.1, -0.2, 0.3])},
    'out': {'kernel': np.linspace(1, -2, 6).reshape(3, 2)}}
X = np.linspace(-1, 2, 20).reshape(5, 4)
Y = np.array([0, 1, 1, 0, 1])
KEY = np.array([0, 7], np.uint32)  # a legacy key, created without a device

#: The required options of each method, and a size with a visible effect.
OPTIONS = {
    'arwp': {'sigma': 0.1}, 'asam': {}, 'awp': {'gamma': 0.3},
    'boxed_awp': {'adv_eps': 0.2}, 'frwp': {'gamma': 0.1},
    'm_arwp': {'sigma': 0.1}, 'm_rwp': {'sigma': 0.1},
    'momentum_awp': {'adv_lr': 0.2, 'adv_eps': 0.3}, 'random': {'sigma': 0.1},
    'rwp': {'gamma': 0.3, 'c_min': 0.9}, 'sam': {'rho': 0.5},
    'sign': {'gamma': 0.3}, 'wt_awp': {'gamma': 0.7, 'mask': 'dense/kernel'}}


@functools.cache
def reference():
  """Reference numbers from the published code."""
  path = pathlib.Path(__file__).parents[1] / 'data/perturbation_reference.json'
  return json.loads(path.read_text())


def params_as(dtype):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)


def losses_fn(params, x=X, y=Y):
  """Losses [B]."""
  x = jnp.asarray(x, params['dense']['kernel'].dtype)
  hidden = jnp.tanh(x @ params['dense']['kernel'] + params['dense']['bias'])
  return awp_jax.cross_entropy(hidden @ params['out']['kernel'], jnp.asarray(y))


def mean_fn(params, x=X, y=Y):
  return jnp.mean(losses_fn(params, x, y))


def make(name, **options):
  return methods.make(name, **(OPTIONS[name] | options))


def keywords_of(method):
  """The keywords that a step of a method needs besides the batch."""
  keywords = {}
  if method.direction.source == 'noise':
    keywords['noise_key'] = KEY
  if method.natural_batch == 'other':
    keywords['natural_args'] = (X[::-1], Y[::-1])
  return keywords


def compiled_step(method, tx, loss_fn=losses_fn, **keywords):
  """A compiled step on the batch."""
  keywords = keywords_of(method) | keywords
  return jax.jit(
      lambda params, opt_state, state: perturbed_step.perturbed_step(
          method, loss_fn, tx, params, opt_state, state, X, Y, **keywords))


#: Several tests compare with the same steps.
compiled_once = functools.cache(compiled_step)


def run(method, tx, params, num_steps, **keywords):
  """Runs compiled steps on one batch and returns the output of each."""
  make = compiled_step if keywords else compiled_once
  step = make(method, tx, **keywords)
  opt_state, state, outs = tx.init(params), method.init(params), []
  for _ in range(num_steps):
    outs.append(step(params, opt_state, state))
    params, opt_state, state = outs[-1][:3]
  return outs


def assert_close(got, wanted, tolerance=1e-10):
  chex.assert_trees_all_close(got, wanted, rtol=0, atol=tolerance)


def as_trees(numbers):
  """Converts lists from JSON to arrays."""
  return jax.tree.map(
      np.asarray, numbers, is_leaf=lambda node: isinstance(node, list))


def distance(a, b):
  return max(
      float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
