"""Small problems and budgets for the tests of attacks; steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.attacks import apgd, fab, fixed_step, spsa, square
from awp_jax.evaluation import model as models
from awp_jax.evaluation.evaluate import EvalOptions
from awp_jax.evaluation.protocol import Examples

KEY = jax.random.key(0)
#: Radii at which about half of the examples of `network` break. Compiled
#: functions are cached per shape, batch size and threat model, so the tests
#: share these.
RADII = {'Linf': 0.03, 'L2': 0.25, 'L1': 1.5}
SMALL = EvalOptions(batch_size=8, check_model=False)


def network(count=24, shape=(6, 5, 3), classes=5, seed=0):
  """A random two-layer network and images that it classifies correctly."""
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
  """A batch as the driver passes it to an attack."""
  none = jnp.zeros(len(images), jnp.int32)
  labels = none if labels is None else jnp.asarray(labels, jnp.int32)
  targets = none[:, None] if targets is None else jnp.asarray(targets)
  runs = none if runs is None else jnp.asarray(runs, jnp.int32)
  keys = jax.random.split(jax.random.key(seed), len(images))
  return Examples(jnp.asarray(images), labels, targets, keys, runs)


def seen(gradient, losses, broken=None):
  """A model's `Gradients`; fields that are not arguments are all False."""
  none = jnp.zeros(len(losses), bool)
  given = dict(
      gradient=jnp.asarray(gradient), losses=jnp.asarray(losses),
      broken=none if broken is None else jnp.asarray(broken))
  return models.Gradients(
      **{name: given.get(name, none) for name in models.Gradients._fields})


def iterate(spec, model, threat, batch, num_steps):
  """An attack, and the reports of its first steps, without the driver."""
  attack = spec.build(model, threat)
  state, reports = attack.init(batch), []
  for _ in range(num_steps):
    state, report = attack.step(batch, state)
    reports.append(jax.tree.map(np.asarray, report))
  return attack, reports


def short_spec(name, steps=12):
  """Each attack with a small budget."""
  return {
      'apgd-ce': lambda: apgd.apgd_spec(
          'apgd-ce', loss='ce', num_steps=steps, restarts=2),
      'apgd-dlr': lambda: apgd.apgd_spec(
          'apgd-dlr', loss='dlr', num_steps=steps),
      'apgd-t': lambda: apgd.apgd_spec(
          'apgd-t', loss='dlr-targeted', num_steps=steps, num_targets=3),
      'fab': lambda: fab.fab_spec(
          'fab', targeted=False, num_steps=steps, restarts=2),
      'fab-t': lambda: fab.fab_spec(
          'fab-t', targeted=True, num_steps=steps, num_targets=3),
      'square': lambda: square.square_spec(num_queries=15 * steps),
      'pgd': lambda: fixed_step.pgd_spec(
          'pgd', step_size=0.4, num_steps=steps, restarts=2),
      'spsa': lambda: spsa.spsa_spec(
          num_steps=steps, num_samples=16, step_size=0.03),
  }[name]()


def check_examples(result, logits_fn, images, labels, threat):
  """Asserts what every result must satisfy."""
  x_adv = result.adversarial
  changed = (x_adv != images).reshape(len(images), -1).any(-1)
  broken = result.natural & ~result.robust
  assert (changed <= broken).all()
  assert np.isfinite(x_adv).all()
  assert x_adv.min() >= -1e-6 and x_adv.max() <= 1 + 1e-6
  far = np.asarray(threat.distance(x_adv, images))
  assert far.max() <= threat.epsilon * (1 + 1e-6) + 1e-6
  wrong = np.asarray(jnp.argmax(logits_fn(x_adv), -1) != labels)
  assert wrong[broken].all()
  assert not wrong[result.robust].any()
  named = np.concatenate([a.broken for a in result.attacks])
  np.testing.assert_array_equal(np.sort(named), np.flatnonzero(broken))
  largest = max(a.largest_distance for a in result.attacks)
  np.testing.assert_allclose(largest, far.max(), rtol=1e-4)


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
