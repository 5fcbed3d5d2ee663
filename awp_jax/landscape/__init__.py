"""The loss around a model's weights, along directions and over planes.

Robust generalization goes with a robust loss that is flat in the weights. For a
direction d of the weights, the curve is

  g(alpha) = mean_i max_{|x'_i - x_i| <= eps} loss(f_{w + alpha d}(x'_i), y_i),

with new adversarial examples at every w + alpha d. (Examples made at w attack
the displaced network less, so any landscape would look flat.)

Scaling a filter up and the next layer down leaves a network's function
unchanged. Directions are therefore normalized: d ~ N(0, 1), then each output
filter is scaled to the norm of the weights, |d_j| = |w_j|. Leaves that are not
weights (biases, scales) stay fixed.

  >>> import jax, jax.numpy as jnp
  >>> params = {'w': jnp.array([[3.0], [4.0]])}
  >>> def measure(params, batch, key):
  ...   return {'loss': jnp.square(batch @ params['w'])[:, 0]}
  >>> direction = {'w': jnp.array([[1.0], [0.0]])}
  >>> points = evaluate_points(
  ...     jax.random.key(0), measure, params, [direction],
  ...     [[-1.0], [0.0], [1.0]], jnp.eye(2))
  >>> [point['loss'] for point in points]
  [10.0, 12.5, 16.0]

References:
  Li, Xu, Taylor, Studer, Goldstein, Visualizing the Loss Landscape of Neural
  Nets, NeurIPS 2018. Wu, Xia, Wang, Adversarial Weight Perturbation Helps
  Robust Generalization, NeurIPS 2020.
"""

from awp_jax.landscape.directions import NORMS as NORMS
from awp_jax.landscape.directions import Norm as Norm
from awp_jax.landscape.directions import filter_normalize as filter_normalize
from awp_jax.landscape.directions import random_direction as random_direction
from awp_jax.landscape.measures import Measure as Measure
from awp_jax.landscape.measures import robust_measure as robust_measure
from awp_jax.landscape.points import displaced as displaced
from awp_jax.landscape.points import evaluate_points as evaluate_points
from awp_jax.landscape.points import mean_rise as mean_rise
