"""Small looks at a trained model: attacked images, and the worst direction.

The host drives PGD step by step, so that one gradient is all that compiles: a
look at a model shall cost seconds, on the CPU too.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax.types import Array
from experiments import pipeline


@functools.partial(jax.jit, static_argnames=('model',))
def logits(model: Any, variables: Any, images: Array) -> Array:
  """Logits [B, C] with the running statistics."""
  return model.apply(variables, images, train=False)


@functools.partial(
    jax.jit, static_argnames=('model', 'threat', 'step_size'))
def _pgd_step(
    model: Any, variables: Any, x_adv: Array, images: Array,
    labels: Array, threat: awp_jax.ThreatModel, step_size: float) -> Array:
  return awp_jax.pgd(
      jax.random.key(0),
      lambda x: awp_jax.cross_entropy(
          model.apply(variables, x, train=False), labels),
      images, threat, step_size=step_size, num_steps=1, start=x_adv)


@functools.partial(jax.jit, static_argnames=('model',))
def _gradient(
    model: Any, variables: Any, images: Array, labels: Array,
    valid: Array) -> Any:
  """The gradient in the parameters of the sum over the valid examples."""

  def loss(params: Any) -> Array:
    found = model.apply({**variables, 'params': params}, images, train=False)
    return jnp.sum(jnp.where(valid, awp_jax.cross_entropy(found, labels), 0))

  return jax.grad(loss)(variables['params'])


def pixels(images: np.ndarray) -> Array:
  """Images of a data set as the attacks take them, float32 in [0, 1]."""
  return pipeline.to_pixels(jnp.asarray(images), jnp.dtype(jnp.float32))


def attacked(
    key: Array, model: Any, variables: Any, images: Array,
    labels: Array, threat: awp_jax.ThreatModel, *, step_size: float,
    num_steps: int) -> Array:
  """PGD from a random start, on the cross-entropy.

  Args:
    key: a PRNG key.
    model: the network.
    variables: its parameters and running statistics.
    images: [B, ...] in [0, 1].
    labels: [B].
    threat: the ball and the box.
    step_size: of a step.
    num_steps: how many.

  Returns:
    Adversarial images like `images`.
  """
  x_adv = threat.random_start(key, images)
  for _ in range(num_steps):
    x_adv = _pgd_step(
        model, variables, x_adv, images, labels, threat, step_size)
  return x_adv


def _blocks(count: int, size: int) -> Iterator[np.ndarray]:
  for begin in range(0, count, size):
    yield np.arange(begin, begin + size)


def robust_gradient(
    key: Array, model: Any, variables: Any, images: np.ndarray,
    labels: np.ndarray, threat: awp_jax.ThreatModel, *, step_size: float,
    num_steps: int, batch_size: int) -> Any:
  """The gradient of the mean robust loss in the parameters.

  Args:
    key: a PRNG key; each batch folds in its number.
    model: the network.
    variables: its parameters and running statistics.
    images: [N, ...] of a data set, N >= 1.
    labels: [N].
    threat: the ball and the box.
    step_size: of a step of PGD.
    num_steps: of PGD.
    batch_size: images at a time.

  Returns:
    A pytree like the parameters.
  """
  total = None
  for number, rows in enumerate(_blocks(len(labels), batch_size)):
    kept = np.minimum(rows, len(labels) - 1)
    batch, targets = pixels(images[kept]), jnp.asarray(labels[kept])
    x_adv = attacked(
        jax.random.fold_in(key, number), model, variables, batch, targets,
        threat, step_size=step_size, num_steps=num_steps)
    part = _gradient(model, variables, x_adv, targets, rows < len(labels))
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return jax.tree.map(lambda leaf: leaf / len(labels), total)
