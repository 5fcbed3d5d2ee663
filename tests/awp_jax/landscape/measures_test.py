"""`robust_measure` against the worst case of a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import landscape
from awp_jax.landscape import measures
from tests.helpers.landscape_problem import (
    EPSILON,
    POINTS,
    THREAT,
    linear,
    linear_curve,
    linear_problem,
)


def margins(params, images, labels):
  """z_y - z_other and what an attack takes off it, by NumPy."""
  sign = 1 - 2 * labels
  difference = np.asarray(params['w'][:, 0] - params['w'][:, 1])
  offset = float(params['b'][0] - params['b'][1])
  natural = sign * (images @ difference + offset)
  return natural, EPSILON * np.abs(difference).sum()


def test_examples_are_made_afresh_at_every_point(x64):
  params, images, labels = linear_problem()
  d = landscape.random_direction(jax.random.key(7), params)
  points = linear_curve(params, d, images, labels)
  step = np.asarray(params['w'][:, 0] - params['w'][:, 1])
  fixed = images - EPSILON * np.sign(step) * (1 - 2 * labels)[:, None]
  for (alpha,), point in zip(POINTS, points, strict=True):
    moved = jax.tree.map(lambda w, e, a=alpha: w + a * e, params, d)
    natural, taken = margins(moved, images, labels)
    robust = natural - taken
    wanted = {
        'natural_loss': np.mean(np.log1p(np.exp(-natural))),
        'robust_loss': np.mean(np.log1p(np.exp(-robust))),
        'natural_accuracy': np.mean(natural > 0),
        'robust_accuracy': np.mean(robust > 0), 'nonfinite': 0}
    assert point.keys() == wanted.keys()
    for name, value in wanted.items():
      assert point[name] == pytest.approx(value, rel=1e-12), name
    # Those of w, kept fixed, would show a lower loss: this tells them apart.
    stale = np.mean(np.log1p(np.exp(-margins(moved, fixed, labels)[0])))
    if alpha == 0:
      assert stale == pytest.approx(point['robust_loss'], rel=1e-12)
    elif abs(alpha) == 1:
      assert stale < point['robust_loss'] - 0.01


def test_logits_that_are_not_finite_are_never_right():
  images = jnp.array([[0.2], [0.8], [0.4]])

  def logits_fn(params, x):
    good = jnp.concatenate([jnp.ones_like(x), jnp.zeros_like(x)], axis=1)
    # NaN at the second image, and wherever the third one is moved.
    is_bad = (x > 0.5) | ((x > 0.3) & (x != 0.4))
    return jnp.where(is_bad, jnp.nan, good) * params

  measure = landscape.robust_measure(
      logits_fn, awp_jax.ThreatModel('Linf', 0.05), step_size=0.05, num_steps=1)
  found = jax.jit(measure)(
      jnp.float32(1), (images, jnp.zeros(3, int)), jax.random.key(0))
  np.testing.assert_array_equal(found['natural_accuracy'], [True, False, True])
  np.testing.assert_array_equal(found['robust_accuracy'], [True, False, False])


def test_nan_gradients_are_counted():
  params, images, labels = linear_problem()

  def with_nan_gradient(params, x):
    return linear(params, x) + jnp.sqrt(0 * x[:, :1])

  found = []
  for logits_fn in (linear, with_nan_gradient):
    measure = landscape.robust_measure(
        logits_fn, THREAT, step_size=EPSILON, num_steps=2)
    found.append(jax.jit(measure)(params, (images, labels), jax.random.key(0)))
  assert not found[0]['nonfinite'].any() and found[1]['nonfinite'].all()


def test_measures_in_float32():
  params, images, labels = linear_problem()
  measure = landscape.robust_measure(
      linear, THREAT, step_size=EPSILON / 4, num_steps=4, start='zero')
  text = str(jax.make_jaxpr(measure)(
      params, (images, labels), jax.random.key(0)))
  assert text.count('dot_general[') >= 3
  assert text.count('Precision.HIGHEST, Precision.HIGHEST') + text.count(
      'precision=HIGHEST') == text.count('dot_general[')
  half = images.astype(jnp.bfloat16)
  for got, wanted in zip(*(
      measure(params, (x, labels), jax.random.key(0)).values()
      for x in (half, half.astype(jnp.float32))), strict=True):
    np.testing.assert_array_equal(got, wanted)


def test_settings_reach_the_attack(monkeypatch):
  seen, usual = [], measures.robustness

  def robustness(*arguments):
    seen.append(arguments[-2:])
    return usual(*arguments)

  monkeypatch.setattr(measures, 'robustness', robustness)
  params, images, labels = linear_problem()
  measure = landscape.robust_measure(
      linear, THREAT, step_size=0.1, num_steps=2, start='gaussian', restarts=3)
  measure(params, (images, labels), jax.random.key(0))
  assert seen == [
      (THREAT, awp_jax.Attack(0.1, 2, start='gaussian', restarts=3))]


def test_measures_refuse_bad_arguments():
  with pytest.raises(ValueError, match=r'step_size must be .* got -1'):
    landscape.robust_measure(linear, THREAT, step_size=-1, num_steps=1)
  with pytest.raises(ValueError, match=r'num_steps must be .* got 0'):
    landscape.robust_measure(linear, THREAT, step_size=1, num_steps=0)
  for option, shown in (
      ({'restarts': 0}, r'restarts must be .* got 0'),
      ({'restarts': 2, 'start': 'zero'}, 'restarts=2 needs a random start'),
      ({'start': 'rand'}, r"start must be one of .* got 'rand'")):
    with pytest.raises(ValueError, match=shown):
      landscape.robust_measure(
          linear, THREAT, step_size=1, num_steps=1, **option)
