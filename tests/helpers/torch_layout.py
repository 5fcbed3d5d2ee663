"""PyTorch: recorded trajectories, our steps along them, and state dicts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import awp_jax
from awp_jax.models import PreActResNet, ResNet, WideResNet
from awp_jax.models.torch_exchange import to_torch

MEAN, STD = (.4914, .4822, .4465), (.2471, .2435, .2616)
_NAMES = {'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}


def variables(archive, prefix):
  """Parameters and statistics of a PreActResNet under a prefix."""
  out = {'params': {}, 'batch_stats': {}}
  for key in archive.files:
    if not key.startswith(prefix):
      continue
    value = np.asarray(archive[key])
    *path, leaf = key[len(prefix):].split('.')
    if path[0].startswith('layer'):
      path = [f'{path[0]}_{path[1]}', *path[2:]]
    if path[-1] == '0':  # the convolution of a shortcut
      path = path[:-1]
    if leaf == 'weight':
      name = 'scale' if path[-1].startswith('bn') else 'kernel'
      if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
      elif value.ndim == 2:
        value = value.T
    else:
      name = _NAMES[leaf]
    node = out['batch_stats' if leaf.startswith('running') else 'params']
    for part in path:
      node = node.setdefault(part, {})
    node[name] = jnp.asarray(value)
  return out


class End(NamedTuple):
  """Where a trajectory ends, as flat dictionaries of the archive's names.

  Attributes:
    losses: [T], of each step at w + v.
    ratios: [T], |v| / |w| of each step.
    params: Parameters.
    batch_stats: Running statistics.
    momentum: Of SGD.
  """

  losses: np.ndarray
  ratios: np.ndarray
  params: dict
  batch_stats: dict
  momentum: dict


def recorded(archive):
  """The end recorded in an archive."""
  last = variables(archive, 'final/')
  ratios = np.full(archive['loss'].shape, archive['cfg/gamma'])
  return End(archive['loss'], ratios, **last,
             momentum=variables(archive, 'momentum/')['params'])


def follow(archive, objective, *, norm='Linf', statistics, normalized,
           optimization=0):
  """The end that our steps reach from an archive's start.

  Args:
    archive: As benchmarks/parity_trajectory.py writes it.
    objective: AT or TRADES.
    norm: Of the threat model.
    statistics: Policy for the running statistics.
    normalized: Whether the network normalizes with CIFAR-10's statistics.
    optimization: LLVM's level. XLA runs convolutions in float64 as plain loops;
      large networks need them optimized.
  """
  setting = {key[4:]: archive[key].item() for key in archive.files
             if key.startswith('cfg/')}
  model = PreActResNet(
      len(archive['init/linear.bias']),
      depth=18 if 'init/layer1.1.conv1.weight' in archive else 10,
      width=len(archive['init/conv1.weight']), param_dtype=jnp.float64,
      mean=MEAN if normalized else (0.0,), std=STD if normalized else (1.0,))
  first = variables(archive, 'init/')
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=first['params'],
      batch_stats=first['batch_stats'], tx=optax.chain(
          optax.add_decayed_weights(setting['weight_decay']),
          optax.sgd(setting['lr'], setting['momentum'])))

  @functools.partial(
      jax.jit,
      compiler_options={'xla_backend_optimization_level': optimization})
  def step(state, x, y, start):
    return awp_jax.train_step(
        state, (x, y), jax.random.key(0), objective=objective,
        threat=awp_jax.ThreatModel(norm, setting['eps']),
        attack=awp_jax.Attack(setting['alpha'], setting['K'], start=start),
        perturbation=awp_jax.methods.awp(setting['gamma']),
        statistics=statistics)

  losses, ratios = [], []
  for x, y, delta in zip(
      *(archive[key] for key in ('x', 'y', 'delta0')), strict=True):
    x, delta = (value.transpose(0, 2, 3, 1) for value in (x, delta))
    state, metrics = step(state, x, y, x + delta)
    losses.append(metrics.loss)
    ratios.append(metrics.perturbation_ratio)
  (momentum,) = (
      node.trace for node in jax.tree.leaves(
          state.opt_state, is_leaf=lambda n: isinstance(n, optax.TraceState))
      if isinstance(node, optax.TraceState))
  return End(np.asarray(losses), np.asarray(ratios), state.params,
             state.batch_stats, momentum)


def distance(a, b):
  """The largest difference between two trees of one structure."""
  return max(jax.tree.leaves(jax.tree.map(
      lambda x, y: float(np.abs(x - y).max()), a, b)))


CIFAR = {'mean': MEAN, 'std': STD}
MODELS = {
    'PreActResNet-18': PreActResNet(5, width=4),
    'PreActResNet-50': PreActResNet(3, depth=50, width=4),
    'WRN-10-1': WideResNet(10, depth=10, width=1),
    'WRN-16-2': WideResNet(7, depth=16, width=2),
    'PreActResNet-18 of Wong': PreActResNet(
        5, width=4, shortcut='plain', final_norm=False),
    'DMPreActResNet-18': PreActResNet(
        5, width=4, shortcut='plain3', padding='after', activation='silu'),
    'DMWideResNet-16-2': WideResNet(
        7, depth=16, width=2, padding='after', activation='silu'),
    'ResNet-18': ResNet(5, width=4),
    'ResNet-50': ResNet(3, depth=50, width=4),
}


#: What the state dict of a model does not say, for `model_from_torch`.
GIVEN = {
    'PreActResNet-18 of Wong': {'shortcut': 'plain'},
    'DMPreActResNet-18': {'mean': (0.0,), 'std': (1.0,)},
    'DMWideResNet-16-2': {'mean': (0.0,), 'std': (1.0,)}}


def random_variables(model, channels=3, seed=0):
  """Random weights and running statistics that keep activations moderate."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(
      lambda key: model.init(key, jnp.zeros((1, 8, 8, channels))),
      jax.random.key(0))

  def draw(path, leaf):
    name = path[-1].key
    if name == 'kernel':
      value = rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
    elif name in ('scale', 'var'):
      value = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      value = rng.normal(size=leaf.shape) * 0.3
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def prepared(name):
  """Variables of one of the models, and their state dict."""
  variables = random_variables(MODELS[name])
  return variables, to_torch(variables, MODELS[name])
