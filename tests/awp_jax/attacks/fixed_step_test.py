"""PGD, CW, transfer and SPSA, step by step, against formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import fixed_step, spsa
from awp_jax.evaluation import model as models
from awp_jax.evaluation.evaluate import EvalOptions, evaluate
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles

NORMS = ('Linf', 'L2', 'L1')


@functools.cache
def linear():
  """A linear model of four classes, its weights, images, and right labels."""
  rng = np.random.default_rng(3)
  weights = rng.normal(size=(30, 4))
  images = rng.uniform(size=(6, 30))
  labels = (images @ weights).argmax(-1)
  return models.make_model(lambda x: x @ weights, 4), weights, images, labels


def gradient_of(loss, x, label, weights):
  logits = x @ weights
  if loss == 'ce':
    p = np.exp(logits - logits.max())
    return weights @ (p / p.sum()) - weights[:, label]
  others = np.where(np.arange(logits.size) == label, -np.inf, logits)
  return weights[:, others.argmax()] - weights[:, label]


@pytest.mark.parametrize('norm, radius, step_size, loss', (
    ('Linf', 0.2, 0.06, 'ce'), ('Linf', 0.2, 0.06, 'margin'),
    ('L2', 0.8, 0.3, 'ce'), ('L1', 2.0, 0.7, 'margin')))
def test_pgd_steps_and_judges_the_last(norm, radius, step_size, loss, x64):
  model, weights, images, labels = linear()
  steps = 5
  _, reports = attack_oracles.iterate(
      fixed_step.pgd_spec(
          'pgd', step_size=step_size, num_steps=steps, loss=loss,
          random_start=False),
      model, ThreatModel(norm, radius),
      attack_oracles.examples(images, labels), steps + 1)
  wrong = []
  for i, label in enumerate(labels):
    x, path = images[i], []
    for _ in range(steps + 1):
      path.append(x)
      step = attack_oracles.direction(
          gradient_of(loss, x, label, weights), norm)
      x = attack_oracles.project(x + step_size * step, images[i], norm, radius)
    np.testing.assert_allclose(
        [report.candidates[i] for report in reports], path, atol=1e-6)
    wrong.append((np.stack(path) @ weights).argmax(-1) != label)
  wrong = np.stack(wrong, axis=1)
  assert wrong[1:-1].any()  # before the last, which does not count
  for time, report in enumerate(reports):
    assert (report.finished == (time == steps)).all()
    np.testing.assert_array_equal(
        report.broken, wrong[time] & (time == steps))
    assert not report.zero_gradient.any()


@pytest.mark.parametrize('norm', NORMS)
def test_pgd_starts_at_random_points_of_the_ball(norm, x64):
  model, _, images, labels = linear()
  threat = ThreatModel(norm, 0.3)
  attack, reports = attack_oracles.iterate(
      fixed_step.pgd_spec('pgd', step_size=0.1, num_steps=2, restarts=3),
      model, threat, attack_oracles.examples(images, labels), 1)
  assert attack.num_runs == 3
  delta = reports[0].candidates - images
  distance = np.asarray(threat.distance(reports[0].candidates, images))
  assert (distance > 0).all() and (distance <= 0.3 * (1 + 1e-6)).all()
  assert len(np.unique(delta, axis=0)) == len(images)


def test_a_gradient_of_zero_is_reported_at_the_start_only(x64):
  *_, images, labels = linear()
  weights = np.zeros((30, 4))
  _, reports = attack_oracles.iterate(
      fixed_step.pgd_spec('pgd', step_size=0.1, num_steps=2),
      models.make_model(lambda x: x @ weights + np.arange(4), 4),
      ThreatModel('L2', 0.3), attack_oracles.examples(images, labels), 2)
  assert reports[0].zero_gradient.all() and not reports[1].zero_gradient.any()


def test_a_gradient_of_zero_is_zero_in_every_entry_of_an_example(x64):
  _, _, images, labels = linear()
  images = images.copy()
  images[:, 0] = [0.1, 0.9] * 3
  # Only the first entry has a gradient, and only where it is above 1/2.
  _, reports = attack_oracles.iterate(
      fixed_step.pgd_spec(
          'pgd', step_size=0.1, num_steps=2, random_start=False),
      models.make_model(
          lambda x: jnp.maximum(x[:, :1] - 0.5, 0) * np.arange(4.0), 4),
      ThreatModel('L2', 0.3), attack_oracles.examples(images, labels), 1)
  assert reports[0].zero_gradient.tolist() == [True, False] * 3


@pytest.mark.parametrize('loss', ('ce', 'margin'))
def test_transfer_is_judged_by_the_other_model(loss):
  rng = np.random.default_rng(0)
  source = rng.normal(size=(20, 2)).astype(np.float32)
  judge = (source + rng.normal(size=(20, 2))).astype(np.float32)
  images = rng.uniform(0.3, 0.7, size=(40, 20)).astype(np.float32)
  labels = ((images - 0.5) @ judge).argmax(-1)
  # Ascent on a linear model of two classes ends in a corner of the ball.
  away = np.where(labels == 0, -1, 1)[:, None] * np.sign(source @ [1, -1])
  corners = images + np.float32(0.04) * away
  stands = ((corners - 0.5) @ judge).argmax(-1) == labels
  by_source = ((corners - 0.5) @ source).argmax(-1) == labels
  assert 8 < stands.sum() < 32 and (stands != by_source).sum() > 4
  devices = jax.devices()[:2]
  weights = jax.device_put(source, devices[0])  # needed on the second, too
  precisions = []

  def source_fn(x):
    precisions.append(jax.config.jax_default_matmul_precision)
    return (x - 0.5) @ weights

  result = fixed_step.transfer_attack(
      attack_oracles.KEY, source_fn, lambda x: (x - 0.5) @ judge, images,
      labels, ThreatModel('Linf', 0.04), step_size=0.021, num_steps=4,
      loss=loss, options=EvalOptions(
          batch_size=40, check_model=False, devices=devices,
          attack_precision='tensorfloat32'))
  # The first call compares the shapes of the logits.
  assert set(precisions[1:]) == {'tensorfloat32'}
  np.testing.assert_array_equal(result.robust, stands)
  assert result.natural_accuracy == 1
  assert [attack.name for attack in result.attacks] == ['transfer']
  np.testing.assert_allclose(
      result.adversarial[~stands], corners[~stands].astype(np.float32),
      atol=1e-6)


def test_transfer_needs_models_of_the_same_classes():
  with pytest.raises(ValueError, match=r'same shape.*\(2, 2\) and \(2, 3\)'):
    fixed_step.transfer_attack(
        attack_oracles.KEY, lambda x: x[:, :2], lambda x: x,
        np.zeros((4, 3), np.float32), np.zeros(4, int), ThreatModel('L2', 0.3),
        step_size=0.1)


def test_spsa_climbs_its_estimate_with_adam(x64):
  model, weights, images, labels = linear()
  steps, pairs, radius, step_size = 4, 3, 1e-3, 0.02
  threat = ThreatModel('Linf', 0.05)
  batch = attack_oracles.examples(images, labels)
  attack, reports = attack_oracles.iterate(
      spsa.spsa_spec(
          num_steps=steps, num_samples=2 * pairs + 1, radius=radius,
          step_size=step_size),
      model, threat, batch, steps + 1)
  assert attack.num_runs == 1

  def margin(x, label):
    logits = x @ weights
    return np.delete(logits, label).max() - logits[label]

  for i, label in enumerate(labels):
    x, mean, square = images[i], 0.0, 0.0
    for time in range(steps + 1):
      np.testing.assert_allclose(
          reports[time].candidates[i], x, atol=1e-6)
      assert reports[time].broken[i] == (margin(x, label) > 0)
      assert reports[time].finished[i] == (time == steps)
      key = jax.random.fold_in(batch.keys[i], time)
      estimate = 0.0
      for turn in range(pairs):
        v = np.asarray(jax.random.rademacher(
            jax.random.fold_in(key, turn), x.shape, float))
        gain = margin(x + radius * v, label) - margin(x - radius * v, label)
        estimate = estimate + gain / (2 * radius) * v / pairs
      mean = 0.9 * mean + 0.1 * estimate
      square = 0.999 * square + 0.001 * estimate ** 2
      step = mean / (1 - 0.9 ** (time + 1)) / (
          np.sqrt(square / (1 - 0.999 ** (time + 1))) + 1e-8)
      x = attack_oracles.project(
          x + step_size * step, images[i], 'Linf', 0.05)
  assert not any(report.zero_gradient.any() for report in reports)


@pytest.mark.parametrize('make, message', (
    (lambda: fixed_step.pgd_spec('p', step_size=-1, num_steps=2),
     'step_size must be a finite number > 0, got -1'),
    (lambda: fixed_step.pgd_spec('p', step_size=1, num_steps=0),
     'num_steps must be a whole number >= 1, got 0'),
    (lambda: fixed_step.pgd_spec('p', step_size=1, num_steps=1, restarts=0),
     'restarts must be a whole number >= 1, got 0'),
    (lambda: fixed_step.pgd_spec('p', step_size=1, num_steps=1, loss='dlr'),
     "loss must be one of 'ce', 'margin', got 'dlr'"),
    (lambda: fixed_step.pgd_spec(
        'p', step_size=1, num_steps=2, restarts=2, random_start=False),
     'restarts=2 needs a random start'),
    (lambda: fixed_step.pgd_spec(
        'p', step_size=1, num_steps=2, restarts=2, source_fn=lambda x: x),
     'restarts=2 needs a random start'),
    (lambda: spsa.spsa_spec(num_steps=0), 'num_steps must be .* got 0'),
    (lambda: spsa.spsa_spec(num_samples=1),
     'num_samples must be a whole number >= 2, got 1'),
    (lambda: spsa.spsa_spec(radius=0), 'radius must be .* > 0, got 0'),
    (lambda: spsa.spsa_spec(step_size=0), 'step_size must be .* > 0, got 0'),
))
def test_bad_settings(make, message):
  with pytest.raises(ValueError, match=f'^{message}'):
    make()


def test_what_a_spec_says_of_its_attack():
  spec = fixed_step.pgd_spec('p', step_size=1, num_steps=2)
  assert spec.name == 'p' and spec.white_box and spec.num_targets == 0
  black = fixed_step.pgd_spec(
      'p', step_size=1, num_steps=2, source_fn=lambda x: x)
  assert not black.white_box
  assert spsa.spsa_spec().name == 'spsa' and not spsa.spsa_spec().white_box


def test_cw_ascends_the_margin():
  # Class 1 wins at larger x. The cross-entropy follows 20 unlikelier classes
  # to smaller x, where none of them wins.
  def logits_fn(x):
    x = x - 0.5
    return jnp.concatenate([0 * x, x - 0.05] + [-1 - x] * 20, axis=1)

  images, labels = np.full((4, 1), 0.5, np.float32), np.zeros(4, int)
  threat = ThreatModel('Linf', 0.1)
  options = EvalOptions(batch_size=4, check_model=False)
  settings = {'step_size': 0.05, 'num_steps': 6}
  found = fixed_step.cw_attack(
      attack_oracles.KEY, logits_fn, images, labels, threat, options=options,
      **settings)
  assert not found.robust.any()
  plain = evaluate(
      attack_oracles.KEY, logits_fn, images, labels, threat,
      (fixed_step.pgd_spec('cw-6', loss='ce', **settings),), options=options)
  assert plain.robust.all()
