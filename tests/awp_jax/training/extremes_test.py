"""Steps on batches and sizes at the edge: finite numbers, valid attacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import awp_jax
from awp_jax import models
from tests.helpers import library_tour as tour

BATCHES = {
    'constant images': (np.full_like(tour.IMAGES, 0.5), tour.LABELS),
    'black images': (np.zeros_like(tour.IMAGES), tour.LABELS),
    'one class': (tour.IMAGES, np.zeros(6, np.int32)),
    'one image': (tour.IMAGES[:1], tour.LABELS[:1])}


@functools.cache
def network():
  model = models.PreActResNet(num_classes=5, depth=10, width=1)
  return model, model.init(jax.random.key(0), tour.IMAGES, train=False)


@functools.cache
def step_of(objective, gamma):
  """A compiled training step with one size of AWP."""
  model, variables = network()
  method = awp_jax.methods.awp(gamma)
  state = awp_jax.TrainState.create(
      apply_fn=model.apply, params=variables['params'], tx=optax.sgd(0.01),
      batch_stats=variables['batch_stats'], method=method)
  return state, jax.jit(functools.partial(
      awp_jax.train_step, objective=tour.OBJECTIVES[objective],
      threat=awp_jax.ThreatModel('Linf', 0.05),
      attack=awp_jax.Attack(0.02, 2), perturbation=method))


@pytest.mark.parametrize('gamma', [0.0, 1e6])
@pytest.mark.parametrize('objective', tour.OBJECTIVES)
@pytest.mark.parametrize('batch', BATCHES)
def test_a_step_is_finite(batch, objective, gamma):
  state, step = step_of(objective, gamma)
  after, metrics = step(state, BATCHES[batch], jax.random.key(1))
  for leaf in jax.tree.leaves((after.params, after.batch_stats)):
    assert np.isfinite(leaf).all()
  assert np.isfinite(metrics.loss) and 0 <= metrics.robust_accuracy <= 1
  # Less where a gradient of zero leaves weights alone.
  assert 0 <= metrics.perturbation_ratio <= gamma * 1.001


# Where the softmax is saturated the library says so.
@pytest.mark.filterwarnings('ignore::awp_jax.RobustnessWarning')
@pytest.mark.parametrize('scale', [1e-30, 1e4, 1e30])
@pytest.mark.parametrize('norm', tour.NORMS)
def test_attacks_with_extreme_logits(scale, norm):
  """They stay in the ball, and every success they report is one."""
  kernel = tour.WEIGHTS['kernel'] * np.float32(scale)

  def logits_fn(images):
    return images.reshape(images.shape[0], -1) @ kernel

  threat = awp_jax.ThreatModel(norm, tour.NORMS[norm])
  natural = np.argmax(logits_fn(tour.IMAGES), axis=1)
  result = awp_jax.evaluate(
      jax.random.key(0), logits_fn, tour.IMAGES, natural, threat, [
          awp_jax.apgd_spec('ce', loss='ce', num_steps=5),
          awp_jax.fab_spec('fab', targeted=False, num_steps=3),
          awp_jax.square_spec(num_queries=8)],
      options=awp_jax.EvalOptions(check_model=False))
  adversarial = np.asarray(result.adversarial)
  assert np.isfinite(adversarial).all()
  distance = np.asarray(threat.distance(
      jnp.asarray(adversarial), jnp.asarray(tour.IMAGES)))
  assert (distance <= tour.NORMS[norm] * (1 + 1e-5)).all()
  broken = np.argmax(logits_fn(adversarial), axis=1) != natural
  np.testing.assert_array_equal(broken, ~np.asarray(result.robust))
