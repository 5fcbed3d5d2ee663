"""Warnings of models and images that make an evaluation unreliable."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.attacks import autoattack, fixed_step
from awp_jax.evaluation import diagnostics
from awp_jax.evaluation.evaluate import EvalOptions, evaluate
from awp_jax.evaluation.results import RobustnessWarning
from awp_jax.threat import ThreatModel
from tests.helpers.attack_oracles import (
  KEY,
  RADII,
  check_examples,
  network,
  short_spec,
)
from tests.helpers.attack_problem import QUIET, kinds, scripted

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def test_quantized_inputs_are_flagged_and_broken_by_square():
  logits_fn, images, labels = network()

  def masked(x):
    return logits_fn(jnp.round(x * 24) / 24)

  labels = np.asarray(jnp.argmax(masked(images), -1))
  threat = ThreatModel('Linf', RADII['Linf'])
  with pytest.warns(RobustnessWarning) as caught:
    result = autoattack.auto_attack(
        KEY, masked, images, labels, threat,
        attacks=(
            fixed_step.pgd_spec(
                'pgd', step_size=0.01, num_steps=10, random_start=False),
            short_spec('square')),
        options=EvalOptions(batch_size=8))
  kinds = {w.kind for w in result.warnings}
  assert {'zero-gradients', 'square-stronger'} <= kinds
  assert len(caught) >= 2
  assert len(result.attacks[0].broken) == 0
  assert len(result.attacks[1].broken) > 4
  check_examples(result, masked, images, labels, threat)


def test_saturated_softmax_is_flagged_and_broken_by_square():
  logits_fn, images, labels = network()

  def masked(x):
    # Probabilities of 0 and 1 in float32: no gradient anywhere.
    return jax.nn.softmax(1e4 * logits_fn(x))

  threat = ThreatModel('Linf', RADII['Linf'])
  with pytest.warns(RobustnessWarning):
    result = autoattack.auto_attack(
        KEY, masked, images, labels, threat,
        attacks=(
            # The margin: rounding keeps cross-entropy's gradient from 0.
            fixed_step.pgd_spec(
                'cw', step_size=0.01, num_steps=10, random_start=False,
                loss='margin'),
            short_spec('square')),
        options=EvalOptions(batch_size=8))
  kinds = {w.kind for w in result.warnings}
  assert {'probabilities', 'zero-gradients', 'square-stronger'} <= kinds
  # Next to a boundary even this softmax is not saturated.
  assert len(result.attacks[0].broken) <= 2
  assert len(result.attacks[1].broken) > 4
  check_examples(result, masked, images, labels, threat)


def warnings_of(logits_fn, images, labels, attack='apgd-ce'):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    result = evaluate(
        KEY, logits_fn, images, labels,
        ThreatModel('Linf', RADII['Linf']), (short_spec(attack),),
        options=EvalOptions(batch_size=8))
  return {w.kind: w for w in result.warnings}


def test_no_warning_without_a_reason():
  assert warnings_of(*network()) == {}


def test_warns_of_batch_statistics():
  logits_fn, images, labels = network()
  assert set(warnings_of(
      lambda x: logits_fn(x - x.mean(0)), images, labels)) == {
          'batch-dependent'}


def test_warns_of_randomness():
  logits_fn, images, labels = network()
  rng = np.random.default_rng(0)

  def frozen(x):
    return logits_fn(x + rng.normal(size=x.shape).astype(np.float32))

  def called(x):
    noise = jax.pure_callback(
        lambda: rng.normal(size=()).astype(np.float32),
        jax.ShapeDtypeStruct((), np.float32))
    return logits_fn(jax.lax.stop_gradient(noise) + x)

  assert 'randomized' in warnings_of(frozen, images, labels)
  assert 'randomized' in warnings_of(called, images, labels)


def test_warns_of_logits_that_are_not_finite():
  logits_fn, images, labels = network()
  images[:3, 0, 0, 0], images[3:, 0, 0, 0] = 1.0, 0.0

  def broken(x):
    bad = (x[:, 0, 0, 0] == 1)[:, None]
    return jnp.where(bad, jnp.nan, logits_fn(x))

  found = warnings_of(broken, images, labels)
  assert found['non-finite'].num_examples == 3


@pytest.mark.parametrize('shape, warns', (
    ((3, 32, 32), True), ((1, 28, 28), True), ((3, 5, 5), True),
    ((3, 32, 4), False), ((32, 32, 3), False), ((28, 28, 1), False),
    ((2, 32, 32), False), ((4, 9, 8), False)))
def test_warns_of_channels_first(shape, warns):
  specs = (awp_jax.square_spec(num_queries=2), scripted(None, [[0]]))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    found = diagnostics.check_layout(specs, shape)
  assert [(w.kind, w.attack) for w in found] == [('layout', 'square')] * warns
  assert [w.category for w in caught] == [awp_jax.RobustnessWarning] * warns
  if warns:
    assert f'{shape} as [H, W, C], channels last' in found[0].message


def test_layout_is_in_the_result():
  with pytest.warns(awp_jax.RobustnessWarning, match='channels last'):
    result = evaluate(
        KEY, lambda x: x.reshape(x.shape[0], -1)[:, :2],
        np.full((2, 3, 6, 6), 0.5, np.float32), np.zeros(2, int),
        ThreatModel('Linf', 0.1), (awp_jax.square_spec(num_queries=1),),
        options=dataclasses.replace(QUIET, check_model=True))
  assert ('layout', 'square') in kinds(result)
