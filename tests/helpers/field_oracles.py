"""Independent formulas for the effects of config fields, at `SMALL` values."""

import jax
import numpy as np

from tests.helpers.config_effects import LABELS, LOGITS


def log_softmax(z):
  z = z.astype(float)
  return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


ADV, NATURAL = map(log_softmax, LOGITS)
ONE_HOT = np.eye(4)[LABELS]


def cross_entropy(log_p, smoothing=0.0):
  return -(((1 - smoothing) * ONE_HOT + smoothing / 4) * log_p).sum(axis=1)


def divergence():
  return (np.exp(NATURAL) * (NATURAL - ADV)).sum(axis=1)


def rates(steps_per_epoch, epochs=4, rate=0.1, factor=0.1, at=(0.5, 0.75)):
  """The rate of time (k + 1) / n, times `factor` for each fraction reached."""
  total = epochs * steps_per_epoch
  return [
      rate * factor ** sum(k >= fraction * total for fraction in at)
      for k in range(1, total + 1)]


def rescheduled(schedule, **changes):
  """Effects of a schedule, shown for three steps per epoch, run with four."""
  return {'schedule': schedule(3), 'rates': schedule(4)[3::4]} | changes


def cosine(steps_per_epoch):
  total = 4 * steps_per_epoch
  return [
      0.05 * (1 + np.cos(np.pi * k / total)) for k in range(total)]


def of_steps(total, per_epoch, log_every=2, checkpoint_every=0, best=(1, 2)):
  """The actions of the loop in `total` steps, by its rules."""
  looks, saves, evaluations = [], [], []
  for step in range(1, total + 1):
    position = (step - 1) % per_epoch + 1
    is_last = position == per_epoch
    is_saved = checkpoint_every and step % checkpoint_every == 0
    if is_last or is_saved or position % log_every == 0:
      looks.append(step)
    if is_last or is_saved:
      saves.append(('last', step))
    if is_last:
      evaluations.append(step)
      if step // per_epoch in best:
        saves.append(('best', step))
  return {'looks': looks, 'saves': saves, 'evaluations': evaluations}


def updates(
    name='sgd', at=None, momentum=0.9, nesterov=False, b2=0.999,
    weight_decay=5e-4, l1=0.0, decay='all', clip_norm=np.inf):
  """`of_optimizer` of SGD or AdamW by their formulas, at given rates."""
  w = np.concatenate([LOGITS[0].ravel().astype(float), np.ones(3)])
  is_weight = np.arange(27) < 24
  decayed = weight_decay * w * (is_weight if decay == 'weights' else 1)
  found, mean, square = [], 0.0, 0.0
  for step, rate in enumerate((at or rates(4))[:8]):
    g = np.cos((3 + step) * w)
    g = g * min(1, clip_norm / np.linalg.norm(g)) + l1 * np.sign(w) * is_weight
    if name == 'adamw':
      mean = momentum * mean + (1 - momentum) * g
      square = b2 * square + (1 - b2) * g ** 2
      unbiased = mean / (1 - momentum ** (step + 1))
      root = np.sqrt(square / (1 - b2 ** (step + 1)))
      found.append(-rate * (unbiased / (root + 1e-8) + decayed))
      continue
    g = g + decayed
    mean = momentum * mean + g
    found.append(-rate * (g + momentum * mean if nesterov else mean))
  return np.stack(found)


def shorter(total, per_epoch, **more):
  return of_steps(total, per_epoch) | {
      'steps': list(range(total)), 'factors': [1.0] * total} | more


def shrunk(factor, times):
  """Factors of a run that diverges at step 6, with a checkpoint at step 4."""
  return [1.0] * 7 + [
      factor ** n for n in range(1, times + 1) for _ in range(3)]


EPS, STEP = 8 / 255, 2 / 255
SHRINK = {'guard.action': 'shrink'}
EXTRA = {'extra.path': 'a.npz', 'extra.fraction': 0.5}
KEYS = [jax.random.key_data(key)
        for key in jax.random.split(jax.random.key(3), 5)]


def eval_key(seed, step, split):
  """The key of the evaluation of a split after a step."""
  key = jax.random.split(jax.random.key(seed), 5)[4]
  for number in (step, split):
    key = jax.random.fold_in(key, number)
  return jax.random.key_data(key)


BOX = {'lower': 0.0, 'upper': 1.0}
SERIES = {  # three random directions on two splits, the worst one, the plane
    'directions': (1,) * 8 + (2,), 'points': (3,) * 8 + (9,),
    'reach': (1.0,) * 6 + (0.05,) * 2 + (1.0,),
    'images': (8, 16) * 4 + (8,), 'batch_size': (16,) * 9,
    'key': ([0, 0],) * 9}


def landscape(**changes):
  return {f'landscape.{name}': value for name, value in changes.items()}


def threats(threat):
  """The threat model in four evaluations, a landscape and its gradients."""
  return {
      'judged.threat': (threat,) * 4, 'landscape.threat': threat,
      'landscape.gradient.threat': [threat] * 2}
