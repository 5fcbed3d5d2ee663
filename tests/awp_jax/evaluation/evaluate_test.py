"""Custom losses, shared models, results of `evaluate`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.core import loops
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.evaluation.results import confidence_interval
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import (
  KEY,
  QUIET,
  RADII,
  network,
  scripted,
  threshold,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def test_an_attack_of_no_runs_is_an_error():
  spec = scripted(lambda e, t: e.images, [[0]])
  empty = spec._replace(
      build=lambda m, t: spec.build(m, t)._replace(num_runs=0))
  with pytest.raises(ValueError, match=r"num_runs of attack 'scripted'.*got 0"):
    evaluate(KEY, threshold, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
             ThreatModel('Linf', 0.1), (empty,), options=QUIET)


def test_attacks_after_the_last_robust_example_have_none_to_attack():
  spec = scripted(lambda e, t: e.images, [[0]])
  images = np.full((2, 1), 0.3, np.float32)
  result = evaluate(
      KEY, threshold, images, np.ones(2, int), ThreatModel('Linf', 0.1),
      (spec,), options=QUIET)
  assert not result.natural.any() and not result.robust.any()
  np.testing.assert_array_equal(result.adversarial, images)
  assert result.attacks[0].largest_distance == 0


@pytest.mark.parametrize('count', [1, 2])
def test_attacks_share_a_model_over_devices_in_a_compiled_loop(count):
  # As on accelerators, where the step of an attack is traced inside a loop.
  logits_fn, images, labels = network(count=8)
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [awp_jax.apgd_spec(name, loss=name, num_steps=3)
           for name in ('ce', 'margin')]
  found = []
  for where, devices in (('cpu', None), ('gpu', jax.devices()[:count])):
    with loops.platform(where):
      found.append(evaluate(
          KEY, logits_fn, images, labels, threat, specs,
          options=dataclasses.replace(QUIET, batch_size=8, devices=devices)))
  np.testing.assert_array_equal(found[0].robust, found[1].robust)
  assert 0 < found[0].robust_accuracy < 1


def test_custom_loss():
  logits_fn, images, labels = network()
  threat = ThreatModel('Linf', RADII['Linf'])
  seen = []

  def cross_entropy(logits, labels, targets):
    seen.append(targets.shape)
    return -jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

  name, results = 'apgd-ce', []
  for loss in ('ce', cross_entropy):
    spec = awp_jax.apgd_spec(name, loss=loss, num_steps=8)
    results.append(awp_jax.evaluate(
        KEY, logits_fn, images, labels, threat, (spec,), options=QUIET))
  np.testing.assert_array_equal(results[0].robust, results[1].robust)
  assert seen and 0.1 < results[0].robust_accuracy < 0.9


def test_targeted_custom_loss_gets_the_likeliest_wrong_classes():
  logits_fn, images, labels = network(count=8)
  seen = set()

  def note(targets):
    seen.update(np.asarray(targets).tolist())

  def difference(logits, labels, targets):
    jax.debug.callback(note, targets)
    return jnp.sum(logits * (
        jax.nn.one_hot(targets, 4) - jax.nn.one_hot(labels, 4)), -1)

  one = np.repeat(images[:1], 8, 0)
  natural = np.asarray(logits_fn(one))[0]
  ranked = np.argsort(-natural)
  assert ranked[0] == labels[0]
  for targeted, num_targets, wanted in (
      (True, 2, ranked[1:3]), (None, 9, ranked[1:2])):
    seen.clear()
    awp_jax.apgd(
        KEY, logits_fn, one, np.repeat(labels[:1], 8),
        ThreatModel('Linf', 1e-3), loss=difference, num_steps=1,
        targeted=targeted, num_targets=num_targets, options=QUIET)
    jax.effects_barrier()
    assert seen == set(wanted.tolist())


def test_bad_losses():
  with pytest.raises(ValueError, match=r'losses\s+\[B\]'):
    awp_jax.apgd(
        KEY, threshold, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
        ThreatModel('Linf', 0.1), loss=lambda z, y, t: jnp.sum(z))
  with pytest.raises(ValueError, match='targeted=True'):
    awp_jax.apgd_spec('a', loss='ce', targeted=True)


def test_public_names():
  for name in ('AttackSpec', 'evaluate', 'make_specs', 'apgd_spec', 'fab_spec',
               'square_spec', 'pgd_spec', 'spsa_spec', 'Judgement'):
    assert hasattr(awp_jax, name), name


def test_confidence_interval():
  lower, upper = confidence_interval(52, 256)
  # From the closed form, with z = 1.959964.
  np.testing.assert_allclose((lower, upper), (0.1584, 0.2566), atol=1e-4)
  assert confidence_interval(0, 10)[0] == 0
  assert confidence_interval(10, 10)[1] == 1
  with pytest.raises(ValueError, match='at most count'):
    confidence_interval(11, 10)
