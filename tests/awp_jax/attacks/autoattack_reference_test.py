"""Verdicts of AutoAttack beside those of the reference implementation."""

import pathlib
import sys

import numpy as np
import pytest

from awp_jax.attacks import autoattack, square
from awp_jax.evaluation.evaluate import EvalOptions
from awp_jax.threat import ThreatModel
from tests.helpers.attack_oracles import (
  KEY,
  check_examples,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')
REFERENCE = ('apgd-ce', 'apgd-t', 'fab-t')


def informative_rows(data, norm, count):
  """Rows of the fixture that test most in little time.

  First those on which the reference's attacks disagree, then those that they
  break, one that survives everything (these take longest), and last those that
  are misclassified without an attack.
  """
  stands = np.stack([data[f'{norm}/{name}'] for name in REFERENCE])
  logits = reference_network(data)(reference_images(data))
  natural = np.asarray(logits.argmax(-1)) == data['y']
  agree = (stands == stands[0]).all(0)
  groups = (~agree, agree & natural & ~stands[0], stands.all(0), ~natural)
  limits = (count, count, 1, count)
  rows = np.concatenate([
      np.flatnonzero(group)[:limit]
      for group, limit in zip(groups, limits, strict=True)])
  return rows[:count]


def reference_images(data):
  return data['x'].astype(np.float32).transpose(0, 2, 3, 1) / 255


def reference_network(data):
  sys.path.insert(0, str(pathlib.Path(__file__).parents[3] / 'benchmarks'))
  try:
    import autoattack_fixture
  finally:
    sys.path.pop(0)
  return autoattack_fixture.network(data)


@pytest.mark.slow
@pytest.mark.parametrize('norm, radius', (('Linf', 8 / 255), ('L2', 0.5)))
def test_verdicts_of_the_reference(norm, radius, load_fixture):
  data = load_fixture('autoattack')
  rows = informative_rows(data, norm, 64)
  images, labels = reference_images(data)[rows], data['y'][rows]
  logits_fn = reference_network(data)
  threat = ThreatModel(norm, radius)
  robust = []
  for name in REFERENCE:
    result = autoattack.auto_attack(
        KEY, logits_fn, images, labels, threat, attacks=(name,),
        options=EvalOptions(batch_size=16, check_model=False))
    check_examples(result, logits_fn, images, labels, threat)
    np.testing.assert_array_equal(
        result.robust, data[f'{norm}/{name}'][rows], name)
    robust.append(result.robust)
  # Square breaks no further one of these images in the whole of `standard`.
  np.testing.assert_array_equal(
      np.logical_and.reduce(robust), data[f'{norm}/robust'][rows])
  if norm == 'Linf':
    # Fewer and different draws than the reference's 5,000 queries: breaks no
    # example that survives the reference, and half of those that it breaks.
    result = autoattack.auto_attack(
        KEY, logits_fn, images, labels, threat,
        attacks=(square.square_spec(num_queries=200),),
        options=EvalOptions(batch_size=16, check_model=False))
    assert result.robust[data[f'{norm}/robust'][rows]].all()
    broken = result.natural & ~data[f'{norm}/square'][rows]
    assert np.sum(broken & ~result.robust) > broken.sum() / 2
