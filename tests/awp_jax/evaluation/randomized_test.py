"""Randomized models: verdicts, and the policy of the reference."""

import dataclasses

import jax
import numpy as np
import pytest

from awp_jax.attacks import apgd, autoattack
from awp_jax.evaluation.evaluate import evaluate
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import (
  KEY,
  KEYED,
  noisy,
  scripted,
  threshold,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def test_verdicts_of_a_randomized_model_do_not_depend_on_the_batch():
  images = np.full((40, 1), 0.45, np.float32)
  results = [
      evaluate(
          KEY, noisy, images, np.zeros(40, int), ThreatModel('Linf', 0.05),
          (scripted(lambda e, t: e.images + 0.04, [[1], [1]], runs=2),),
          options=dataclasses.replace(
              KEYED, batch_size=size, group_size=group))
      for size, group in ((4, 40), (8, 12), (40, 40))]
  assert 0.5 < results[0].natural_accuracy < 0.9
  assert 0.05 < results[0].robust_accuracy < 0.5
  for other in results[1:]:
    np.testing.assert_array_equal(other.natural, results[0].natural)
    np.testing.assert_array_equal(other.robust, results[0].robust)


def reference_rand(rng, weights, images, labels, epsilon, steps, draws, noise):
  """The released `rand` with APGD-CE on a noisy linear model, in NumPy.

  Independent of the library: gradients are averaged over `draws`, every run
  goes to its end, and one new draw decides on the last misclassified iterate.

  Args:
    rng: NumPy generator.
    weights: [D, C].
    images: [N, D].
    labels: [N].
    epsilon: the L_inf radius.
    steps: iterations.
    draws: per gradient.
    noise: standard deviation at the input.

  Returns:
    Which examples are robust, [N].
  """
  rows = np.arange(len(images))
  shortest = max(int(0.06 * steps), 1)

  def logits(x):
    return (x + noise * rng.normal(size=x.shape)) @ weights

  def look(x):
    gradient = np.zeros_like(x)
    for _ in range(draws):
      z = logits(x)
      z = z - z.max(-1, keepdims=True)
      p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
      loss = -np.log(p[rows, labels])
      p[rows, labels] -= 1
      gradient += p @ weights.T / draws
    return gradient, loss, z.argmax(-1) == labels

  def project(x):
    return np.clip(np.clip(x, images - epsilon, images + epsilon), 0, 1)

  natural = logits(images).argmax(-1) == labels
  start = rng.uniform(-1, 1, size=images.shape)
  start /= np.abs(start).max(-1, keepdims=True)
  x = project(images + epsilon * start)
  step = np.full((len(images), 1), 2 * epsilon)
  gradient, best_loss, right = look(x)
  kept = np.where(right[:, None], images, x)
  best, best_gradient, previous = x.copy(), gradient.copy(), x.copy()
  losses, window = [], max(int(0.22 * steps), 1)
  since, last_best, reduced = 0, best_loss.copy(), np.ones(len(x), bool)
  for t in range(steps):
    share = 0.75 if t else 1.0
    move = project(x + step * np.sign(gradient)) - x
    previous, x = x, project(x + share * move + (1 - share) * (x - previous))
    gradient, loss, right = look(x)
    kept[~right] = x[~right]
    up = loss > best_loss
    best[up], best_gradient[up], best_loss[up] = x[up], gradient[up], loss[up]
    losses, since = [*losses, loss], since + 1
    if since == window:
      recent = np.stack(losses[-window - 1:]) if t >= window else np.stack(
          [np.zeros_like(loss), *losses])
      rises = (np.diff(recent, axis=0) > 0).sum(0)
      halve = (rises <= 0.75 * window) | (~reduced & (last_best >= best_loss))
      step[halve] /= 2
      x, gradient = x.copy(), gradient.copy()
      x[halve], gradient[halve] = best[halve], best_gradient[halve]
      reduced, last_best, since = halve, best_loss.copy(), 0
      window = max(window - max(int(0.03 * steps), 1), shortest)
  return natural & (logits(kept).argmax(-1) == labels)


def test_rand_follows_the_policy_of_the_reference():
  rng = np.random.default_rng(0)
  count, size, noise, epsilon = 900, 8, 0.25, 0.05
  weights = rng.normal(size=(size, 3)).astype(np.float32)
  images = rng.uniform(0.2, 0.8, size=(count, size)).astype(np.float32)
  labels = (images @ weights).argmax(-1)
  arguments = images, labels, epsilon, 16, 4, noise
  expected = [
      reference_rand(np.random.default_rng(seed), weights, *arguments).mean()
      for seed in (1, 2, 3)]

  def noisy_fn(x, key):
    return (x + noise * jax.random.normal(key, x.shape)) @ weights

  spec = apgd.apgd_spec('apgd-ce', loss='ce', num_steps=16)
  ours = np.asarray([
      autoattack.auto_attack(
          jax.random.key(seed), noisy_fn, images, labels,
          ThreatModel('Linf', epsilon), version='rand', attacks=(spec,),
          options=dataclasses.replace(KEYED, batch_size=900, eot_samples=4)
      ).robust.mean() for seed in (1, 2, 3)])
  assert len(set(ours)) > 1
  # Two means of 900 verdicts of probability p differ by sqrt(2 p (1 - p) / 900)
  # = 0.02 in standard deviation.
  assert np.abs(ours - expected).max() < 0.06, (ours, expected)
  assert abs(ours.mean() - np.mean(expected)) < 0.035, (ours, expected)


def test_rand_needs_a_randomized_model():
  images, labels = np.full((2, 1), 0.3, np.float32), np.zeros(2, int)
  threat = ThreatModel('Linf', 0.1)
  with pytest.raises(ValueError, match='takes_key=True'):
    autoattack.auto_attack(
        KEY, threshold, images, labels, threat, version='rand')
  # The same through specs, as in the command line of the experiments.
  specs = autoattack.make_specs(autoattack.VERSIONS['rand'], 'Linf', 'rand')
  with pytest.raises(ValueError, match='20 draws of a randomized model'):
    evaluate(KEY, threshold, images, labels, threat, specs)
  with pytest.raises(ValueError, match='eot_samples'):
    evaluate(
        KEY, noisy, images, labels, threat, specs,
        options=dataclasses.replace(KEYED, eot_samples=0))
