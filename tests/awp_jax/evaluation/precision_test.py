"""Precision of verdicts and attacks, and warnings of half precision."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.attacks import fixed_step
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import (
  KEY,
  QUIET,
  kinds,
  scripted,
  threshold,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def counting(seen):
  """A model that records the precision of each of its traces."""

  def logits_fn(x):
    seen.append(jax.config.jax_default_matmul_precision)
    return threshold(x)

  return logits_fn


@pytest.mark.parametrize('asked, inside', (
    ('float32', {'float32'}), ('bfloat16', {'float32', 'bfloat16'}),
    (None, {'float32', 'tensorfloat32'})))
def test_precision_of_verdicts_and_attacks(asked, inside):
  seen = []
  with jax.default_matmul_precision('tensorfloat32'):
    result = fixed_step.cw_attack(
        KEY, counting(seen), np.full((8, 1), 0.45, np.float32),
        np.zeros(8, int), ThreatModel('Linf', 0.1), step_size=0.1, num_steps=1,
        options=dataclasses.replace(QUIET, attack_precision=asked))
  # The first trace counts the classes.
  assert seen[0] == 'float32' and set(seen[1:]) == inside
  assert seen[1] == 'float32'
  judged = result.judged
  assert judged.matmul_precision == 'float32'
  assert judged.dtype == judged.logits_dtype == 'float32'
  assert judged.devices == (jax.devices()[0].device_kind,)
  assert judged.versions == {
      'jax': jax.__version__, 'jaxlib': judged.versions['jaxlib'],
      'awp_jax': awp_jax.__version__}


def test_half_precision_images_are_evaluated_in_float32():
  seen = []

  def logits_fn(x):
    seen.append(x.dtype)
    return threshold(x)

  images = jnp.asarray([[0.3], [0.45]], jnp.bfloat16)
  result = fixed_step.cw_attack(
      KEY, logits_fn, images, np.zeros(2, int), ThreatModel('Linf', 0.1),
      step_size=0.1, num_steps=1, options=QUIET)
  np.testing.assert_array_equal(result.robust, [True, False])
  assert set(seen) == {np.dtype('float32')}
  assert result.judged.dtype == 'float32'
  assert result.adversarial.dtype == np.float32


def test_warns_of_half_precision_logits():
  with pytest.warns(awp_jax.RobustnessWarning, match='bfloat16 logits'):
    result = evaluate(
        KEY, lambda x: threshold(x).astype(jnp.bfloat16),
        np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
        ThreatModel('Linf', 0.1),
        (scripted(lambda e, t: e.images, [[0]]),), options=QUIET)
  assert result.judged.logits_dtype == 'bfloat16'
  assert ('half-precision', '') in kinds(result)


def test_warns_of_products_in_half_precision():
  weights = jnp.ones((1, 2), jnp.float32)

  def low(x):
    return jnp.dot(
        x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    ).astype(jnp.float32)

  def asked(x):
    return jax.jit(lambda x: jnp.dot(x, weights, precision='bfloat16'))(x)

  def full(x):
    return x @ weights

  for logits_fn, product in (
      (low, 'bfloat16'), (asked, 'DEFAULT'), (full, 'float32')):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      result = evaluate(
          KEY, logits_fn, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
          ThreatModel('Linf', 0.1),
          (scripted(lambda e, t: e.images, [[0]]),), options=QUIET)
    assert result.judged.product_dtype == product
    assert result.judged.logits_dtype == 'float32'
    assert (('half-precision', '') in kinds(result)) == (product != 'float32')
    assert bool(caught) == (product != 'float32')
