"""Every attack against the exact robust accuracy of a linear model.

Where the box is out of reach, the distance of x to the boundary between its
class y and a class k is (z_y - z_k) / |w_y - w_k|_*, with the dual norm. No
attack breaks an example beyond the nearest of these, and one that works breaks
all that are nearer by some margin.
"""

import functools

import numpy as np
import pytest

from awp_jax.attacks import apgd, fab, fixed_step, spsa, square
from awp_jax.attacks.evaluation import EvalOptions, evaluate
from awp_jax.threat import ThreatModel
from tests import attack_oracles

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.attacks.results.RobustnessWarning')
DUAL = {'Linf': 1, 'L2': 2, 'L1': np.inf}
SHAPE = (5, 6, 1)


def distances(logits, labels, weights, norm):
  """To the boundary with each class, [N, C]; inf for the label."""
  found = np.full(logits.shape, np.inf)
  for i, label in enumerate(labels):
    for k in set(range(logits.shape[1])) - {label}:
      found[i, k] = (logits[i, label] - logits[i, k]) / np.linalg.norm(
          weights[:, label] - weights[:, k], DUAL[norm])
  return found


@functools.cache
def problem(norm, classes, twins=False):
  """A model, its weights, images, labels, distances to the boundary, a radius.

  About half of the examples lie beyond the radius, and none within 1 % of it.

  Args:
    norm: of the distances.
    classes: how many.
    twins: whether the classes are pairs of much the same weights. The logit of
      a twin is the nearest, though its boundary need not be.
  """
  rng = np.random.default_rng(1)
  weights = rng.normal(size=(30, classes)).astype(np.float32)
  if twins:
    weights[:, 1::2] = weights[:, ::2] + 0.1 * weights[:, 1::2]
  images = rng.uniform(0.4, 0.6, size=(32, 30)).astype(np.float32)

  def logits_fn(x):
    return (x.reshape(-1, 30) - 0.5) @ weights

  logits = logits_fn(images)
  labels = logits.argmax(-1)
  distance = distances(logits, labels, weights, norm).min(-1)
  middle = np.log(np.sort(distance)[10:22])
  widest = np.argmax(np.diff(middle))
  radius = float(np.exp((middle[widest] + middle[widest + 1]) / 2))
  assert np.diff(middle)[widest] > 0.02
  return (
      logits_fn, weights, images.reshape(-1, *SHAPE), labels, distance, radius)


def run(spec, norm, classes, twins=False):
  logits_fn, _, images, labels, _, radius = problem(norm, classes, twins)
  threat = ThreatModel(norm, radius)
  result = evaluate(
      attack_oracles.KEY, logits_fn, images, labels, threat, (spec,),
      options=EvalOptions(batch_size=16, check_model=False))
  far = np.asarray(threat.distance(result.adversarial, images))
  assert (far <= radius * (1 + 1e-5)).all()
  return result.robust


def pgd(loss, radius):
  return fixed_step.pgd_spec(
      'pgd', step_size=radius / 4, num_steps=20, loss=loss, random_start=False)


#: By name: the attack, given the radius, and the fraction of the radius within
#: which it must break everything; 1 where it is exact.
ATTACKS = {
    'apgd-ce': (lambda r: apgd.apgd_spec('ce', loss='ce', num_steps=50), 1),
    'fab-t': (lambda r: fab.fab_spec('fab', targeted=True, num_steps=20), 1),
    'pgd': (lambda r: pgd('ce', r), 1),
    'cw': (lambda r: pgd('margin', r), 1),
    'spsa': (lambda r: spsa.spsa_spec(
        num_steps=40, num_samples=32, step_size=r / 8), 0.8),
    'square': (lambda r: square.square_spec(num_queries=300), 0.7),
}


@pytest.mark.parametrize('name, norm', (
    ('apgd-ce', 'Linf'), ('apgd-ce', 'L2'), ('fab-t', 'Linf'), ('fab-t', 'L2'),
    ('pgd', 'L2'), ('cw', 'Linf'), ('cw', 'L2'), ('spsa', 'Linf'),
    ('spsa', 'L2'), ('square', 'Linf'), ('square', 'L2')))
def test_two_classes(name, norm):
  *_, distance, radius = problem(norm, 2)
  make, fraction = ATTACKS[name]
  robust = run(make(radius), norm, 2)
  assert robust[distance > radius].all()
  assert not robust[distance < fraction * radius].any()
  assert (distance < fraction * radius).sum() >= 10


@pytest.mark.parametrize('name, fraction', (
    ('apgd-ce', 1), ('fab-t', 1), ('pgd', None), ('spsa', 0.6),
    ('square', 0.6)))
def test_two_classes_in_l1(name, fraction):
  _, weights, _, _, distance, radius = problem('L1', 2)
  robust = run(ATTACKS[name][0](radius), 'L1', 2)
  if fraction is None:
    # Steps are spread over the steepest fifth, so that the mean slope of those
    # six entries takes the place of the largest.
    slope = np.sort(np.abs(weights[:, 0] - weights[:, 1]))[-6:]
    reached = radius * slope.mean() / slope.max()
    clear = np.abs(distance / reached - 1) > 1e-3
    np.testing.assert_array_equal(
        robust[clear], (distance > reached)[clear])
    assert 4 < robust.sum() < 28
  else:
    assert robust[distance > radius].all()
    assert not robust[distance < fraction * radius].any()
    assert (distance < fraction * radius).sum() >= 6


@pytest.mark.parametrize('name, norm', (('apgd-t', 'L2'), ('fab', 'Linf')))
def test_five_classes(name, norm):
  # Four targets; the nearest boundary need not be the second class's.
  *_, distance, radius = problem(norm, 5)
  spec = {
      'apgd-t': lambda: apgd.apgd_spec(
          'apgd-t', loss='dlr-targeted', num_steps=30),
      'fab': lambda: fab.fab_spec('fab', targeted=False, num_steps=20)}[name]()
  np.testing.assert_array_equal(run(spec, norm, 5), distance > radius)


@pytest.mark.parametrize('name', ('apgd-t', 'fab-t'))
def test_targets_beyond_the_likeliest_wrong_class(name):
  # Within the radius of several examples lies no boundary but that of the third
  # class or of a later one.
  norm = 'L2'
  logits_fn, weights, images, labels, distance, radius = problem(
      norm, 10, twins=True)
  logits = logits_fn(images)
  second = np.argsort(-logits, axis=-1)[:, 1]
  of_second = distances(logits, labels, weights, norm)[range(32), second]
  assert np.sum((distance < radius) & (of_second > 1.2 * radius)) >= 5
  spec = {
      'apgd-t': lambda: apgd.apgd_spec(
          'apgd-t', loss='dlr-targeted', num_steps=30),
      'fab-t': lambda: fab.fab_spec('fab-t', targeted=True, num_steps=20)}
  np.testing.assert_array_equal(
      run(spec[name](), norm, 10, twins=True), distance > radius)
