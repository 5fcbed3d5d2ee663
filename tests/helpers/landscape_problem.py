"""Small problems with known loss landscapes, for the landscape tests."""

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from awp_jax import landscape

POINTS = [[-1.0], [-0.25], [0.0], [0.5], [1.0]]
EPSILON = 0.05
THREAT = awp_jax.ThreatModel('Linf', EPSILON)


def parameters(seed=0, dtype='float32'):
  rng = np.random.default_rng(seed)

  def leaf(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  return {'conv': {'kernel': leaf(3, 3, 2, 5), 'bias': leaf(5)},
          'scale': leaf(5), 'out': leaf(7, 4)}


def quadratic(params, batch, key):
  """1/2 sum_l (a_i |w_l|)^2 of example a_i."""
  del key
  squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
  return {'loss': jnp.square(batch) * squares / 2}


# A linear model of two classes has a known worst case: every pixel moves by
# epsilon against the sign of the difference of the two weight columns.


def linear(params, images):
  return images @ params['w'] + params['b']


def linear_problem(num=11):
  rng = np.random.default_rng(4)
  params = {'w': jnp.asarray(rng.standard_normal((6, 2))),
            'b': jnp.asarray(rng.standard_normal(2))}
  images = rng.uniform(0.2, 0.8, (num, 6))  # the box is out of reach
  return params, images, np.arange(num) % 2


def linear_curve(params, direction, images, labels):
  measure = landscape.robust_measure(
      linear, THREAT, step_size=2 * EPSILON, num_steps=2)
  return landscape.evaluate_points(
      jax.random.key(0), measure, params, [direction], POINTS,
      (images, labels), batch_size=4)
