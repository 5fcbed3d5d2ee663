"""Small problems for the tests of attacks, and ways to drive one by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.evaluation import model as models
from awp_jax.evaluation.protocol import Examples

KEY = jax.random.key(0)


def network(count=24, shape=(6, 5, 3), classes=5, seed=0):
  """A random two-layer network and images that it gets right, by definition."""
  rng = np.random.default_rng(seed)
  size = int(np.prod(shape))
  first = jnp.asarray(rng.normal(size=(size, 16)) / np.sqrt(size), jnp.float32)
  second = jnp.asarray(rng.normal(size=(16, classes)), jnp.float32)

  def logits_fn(x):
    return jnp.tanh(3 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second

  images = rng.uniform(size=(count, *shape)).astype(np.float32)
  labels = np.asarray(jnp.argmax(logits_fn(images), -1), np.int32)
  return logits_fn, images, labels


def examples(images, labels=None, targets=None, runs=None, seed=0):
  """A batch as the engine hands it to an attack."""
  none = jnp.zeros(len(images), jnp.int32)
  labels = none if labels is None else jnp.asarray(labels, jnp.int32)
  targets = none[:, None] if targets is None else jnp.asarray(targets)
  runs = none if runs is None else jnp.asarray(runs, jnp.int32)
  keys = jax.random.split(jax.random.key(seed), len(images))
  return Examples(jnp.asarray(images), labels, targets, keys, runs)


def seen(gradient, losses, broken=None):
  """What a model says at a batch; fields not named here are all False."""
  none = jnp.zeros(len(losses), bool)
  given = dict(
      gradient=jnp.asarray(gradient), losses=jnp.asarray(losses),
      broken=none if broken is None else jnp.asarray(broken))
  return models.Gradients(
      **{name: given.get(name, none) for name in models.Gradients._fields})


def iterate(spec, model, threat, batch, num_steps):
  """An attack, and the reports of its first steps, without the engine."""
  attack = spec.build(model, threat)
  state, reports = attack.init(batch), []
  for _ in range(num_steps):
    state, report = attack.step(batch, state)
    reports.append(jax.tree.map(np.asarray, report))
  return attack, reports


def project_l1(delta, x, radius):
  """The nearest point of the L1 ball within the box, by bisection."""
  size = np.abs(delta)
  cap = np.minimum(size, np.where(delta > 0, 1 - x, x))
  low, high = 0.0, size.max()
  if cap.sum() <= radius:
    return np.sign(delta) * cap
  for _ in range(200):
    middle = (low + high) / 2
    if np.clip(size - middle, 0, cap).sum() > radius:
      low = middle
    else:
      high = middle
  return np.sign(delta) * np.clip(size - high, 0, cap)


def project(point, x, norm, radius):
  """Into the ball around x, then into the unit box."""
  delta = point - x
  if norm == 'L1':
    return np.clip(x + project_l1(delta, x, radius), 0, 1)
  if norm == 'Linf':
    return np.clip(x + np.clip(delta, -radius, radius), 0, 1)
  length = np.sqrt(np.sum(delta * delta))
  return np.clip(x + delta * min(1, radius / length), 0, 1)


def direction(gradient, norm, share=0.2):
  """Steepest in the norm; for L1 over a share of the entries."""
  if norm == 'Linf':
    return np.sign(gradient)
  if norm == 'L2':
    return gradient / (np.sqrt(np.sum(gradient ** 2)) + 1e-12)
  number = gradient.size
  place = int(np.clip((1 - share) * number, 0, number - 1))
  floor = np.sort(np.abs(gradient))[place]
  signs = np.where(np.abs(gradient) >= floor, np.sign(gradient), 0)
  return signs / np.abs(signs).sum()
