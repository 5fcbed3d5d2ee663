"""A small network in bfloat16, and helpers that read an evaluated run."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.runs import restore

ATTACKS = ('fgsm', 'pgd-2', 'cw-2', 'apgd-ce')


class HalfNet(nn.Module):
  """A tiny network whose computation and logits have the given dtype."""

  dtype: Any = jnp.bfloat16
  param_dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x, train=False):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    x = nn.Conv(4, (3, 3), use_bias=False, **types)(x - 0.5)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, **types)(x))
    return nn.Dense(4, **types)(x.mean(axis=(1, 2)))


def logits_of(run, kind):
  """The logits function of the best or the last model."""
  subject = next(
      s for s in restore.restore_models(run) if s.name == kind)
  return lambda images: np.asarray(subject.logits_fn(images))


def average_of(run):
  """The moving average and the last weights, read by Orbax alone."""
  path = max((run.workdir / 'checkpoints/last').iterdir(),
             key=lambda step: int(step.name))
  like = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype),
      ocp.metadata(path).metadata, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  tree = ocp.load(path, like)
  return tree['average'], {k: tree[k] for k in ('params', 'batch_stats')}


def to_float32(tree):
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def without_seconds(values):
  if isinstance(values, dict):
    return {k: without_seconds(v) for k, v in values.items() if k != 'seconds'}
  if isinstance(values, list):
    return [without_seconds(v) for v in values]
  return values
