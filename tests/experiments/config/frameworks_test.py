"""One network in linen, nnx and Equinox: the same training from one start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from experiments.config import networks
from tests.experiments.config import named_parts_test
from tests.helpers import named_parts

#: Names in linen -> (the same in Equinox, whether the axes are reversed).
EQUINOX = {
    'first/kernel': ('first/weight', True), 'first/bias': ('first/bias', False),
    'norm/scale': ('norm/weight', False), 'norm/bias': ('norm/bias', False),
    'last/kernel': ('last/weight', True), 'last/bias': ('last/bias', False)}


def flat(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def start_from(params, kind):
  """The parameters of linen under the names of another framework."""
  nested = {}
  for name, leaf in flat(params).items():
    if kind == 'equinox_net':
      name, is_reversed = EQUINOX[name]
      leaf = leaf.T if is_reversed else leaf
    group, last = name.split('/')
    nested.setdefault(group, {})[last] = leaf
  return nested


def back(params, kind):
  """The inverse of `start_from`, flat."""
  found = flat(params)
  if kind != 'equinox_net':
    return found
  return {name: found[other].T if is_reversed else found[other]
          for name, (other, is_reversed) in EQUINOX.items()}


def train(kind, params, images, labels):
  """20 steps of AT-AWP; losses, parameters and logits of evaluation."""
  options = {'hidden': 6, 'rate': 0.0}
  if kind == 'LinenNet':
    options['dtype'] = jnp.float64
  network = networks.Network(
      lambda key, **settings: make(kind, key, options | settings), kind, {},
      ((0.5,), (0.25,)))
  variables = network.init(jax.random.key(0), images[:1], train=False)
  state = awp_jax.TrainState.create(
      apply_fn=network.apply, params=start_from(params, kind),
      batch_stats=jax.tree.map(
          lambda leaf: leaf.astype(float) if jnp.issubdtype(
              leaf.dtype, jnp.floating) else leaf, variables['batch_stats']),
      tx=optax.sgd(0.1, 0.9))
  step = jax.jit(functools.partial(
      awp_jax.train_step, objective=awp_jax.adversarial(),
      threat=awp_jax.ThreatModel('Linf', 0.1), attack=awp_jax.Attack(0.05, 3),
      perturbation=awp_jax.methods.awp(0.1), statistics='reference'))
  losses = []
  for _ in range(20):
    state, metrics = step(state, (images, labels), jax.random.key(7))
    losses.append(float(metrics.loss))
  logits = network.apply(
      {'params': state.params, 'batch_stats': state.batch_stats}, images,
      train=False)
  return np.array(losses), back(state.params, kind), np.asarray(logits)


def make(kind, key, options):
  from flax import nnx
  if kind == 'LinenNet':
    return named_parts.LinenNet(num_classes=3, **options)
  if kind == 'NnxNet':
    return named_parts.NnxNet(3, (4, 4, 1), nnx.Rngs(key), **options)
  return named_parts.equinox_net(3, (4, 4, 1), key, **options)


@pytest.fixture(scope='module')
def trained():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(12, 4, 4, 1)))
    labels = jnp.arange(12) % 3
    variables = named_parts.LinenNet(3, hidden=6, dtype=jnp.float64).init(
        jax.random.key(3), images[:1], train=False)
    params = jax.tree.map(
        lambda leaf: leaf.astype(float), variables['params'])
    return {kind: train(kind, params, images, labels)
            for kind in named_parts_test.KINDS}


@pytest.mark.parametrize('kind', named_parts_test.KINDS[1:])
def test_the_same_twenty_steps(kind, trained):
  losses, params, logits = trained['LinenNet']
  others = trained[kind]
  assert losses[-1] < 0.9 * losses[0]
  np.testing.assert_allclose(others[0], losses, rtol=1e-6)
  np.testing.assert_allclose(others[2], logits, rtol=1e-6, atol=1e-6)
  for name, leaf in params.items():
    np.testing.assert_allclose(
        others[1][name], leaf, rtol=1e-6, atol=1e-6, err_msg=name)
