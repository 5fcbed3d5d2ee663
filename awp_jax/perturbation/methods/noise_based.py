"""Methods that draw noise: random weight perturbation and its mixtures.

One draw serves the global batch: `noise_key` must be the same on all devices.
There is no ascent pass; the mixtures add a pass at w.

  >>> method = m_rwp(sigma=0.015, lam=0.5)
  >>> method.direction.name, method.mix, method.ball.norm
  ('noise', (0.5, 0.5), 'filter')
"""

from collections.abc import Callable
import dataclasses
import math

import jax.numpy as jnp

from awp_jax.core import checks
from awp_jax.perturbation import directions
from awp_jax.perturbation.balls import Ball, Size
from awp_jax.perturbation.base import Batch, Method, mixture, size_of
from awp_jax.perturbation.leaves import Mask, StackAxes, is_any
from awp_jax.types import Array, Scalar


def random(
    sigma: Size = 0.01, *, mask: Mask = is_any, filter_axis: int = -1,
    stack_axes: StackAxes = 0) -> Method:
  """v_j ~ N(0, sigma^2 |w_j|^2) for each filter j; gradient at w + v only.

  Leaves with fewer than two axes are one group. There is no ascent pass.

  Args:
    sigma: the standard deviation of an entry relative to |w_j|.
    mask: which leaves are perturbed.
    filter_axis: the axis of the output filters.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method; it needs `noise_key`.
  """
  return Method(
      'random',
      Ball(size_of('sigma', sigma), 'filter', filter_axis=filter_axis,
           stack_axes=stack_axes),
      direction=directions.noise(), mask=mask)


def m_rwp(
    sigma: Size = 0.015, *, lam: Scalar = 0.5, natural_batch: Batch = 'same',
    mask: Mask = is_any, filter_axis: int = -1,
    stack_axes: StackAxes = 0) -> Method:
  """lam grad L(w + r) + (1 - lam) grad L(w), r as in `random`.

  Args:
    sigma: as in `random`.
    lam: the weight of the perturbed loss, in [0, 1].
    natural_batch: 'other' takes the gradient at w on `natural_args`; the
      published code uses two successive batches.
    mask: which leaves are perturbed.
    filter_axis: the axis of the output filters.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method; it needs `noise_key`. aux comes from the pass at w, as do the
    running statistics of the published code.

  References:
    Li et al., Revisiting Random Weight Perturbation for Efficiently Improving
    Generalization, TMLR 2024.
  """
  return dataclasses.replace(
      random(sigma, mask=mask, filter_axis=filter_axis,
             stack_axes=stack_axes), name='m-RWP',
      mix=mixture('lam', lam), natural_batch=natural_batch, aux_at='natural')


def frwp(
    gamma: Size = 0.01, *, alpha: Scalar = 0.5, mask: Mask = is_any,
    filter_axis: int = -1, stack_axes: StackAxes = 0) -> Method:
  """alpha grad L(w + r; B1) + (1 - alpha) grad L(w; B2), r as in `random`.

  B1 is the batch in the arguments, B2 the batch in `natural_args`.

  Args:
    gamma: the standard deviation of an entry relative to |w_j|; 0.005 for
      ImageNet.
    alpha: the weight of the perturbed loss, in [0, 1].
    mask: which leaves are perturbed.
    filter_axis: the axis of the output filters.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method; it needs `noise_key` and `natural_args`.

  References:
    Lei et al., filter-wise random weight perturbation, 2022. The published code
    puts B1 and B2 on two devices.
  """
  return dataclasses.replace(
      random(size_of('gamma', gamma), mask=mask, filter_axis=filter_axis,
             stack_axes=stack_axes),
      name='FRWP', mix=mixture('alpha', alpha), natural_batch='other')


def _adaptive(
    method: Method, name: str, eta: Scalar, beta: Scalar) -> Method:
  """The method with the noise of `arwp`."""
  return dataclasses.replace(
      method, name=name, direction=directions.adaptive_noise(
          eta, beta, method.ball.filter_axis, method.ball.stack_axes))


def arwp(
    sigma: Size = 0.01, *, eta: Scalar = 0.1, beta: Scalar = 0.99,
    mask: Mask = is_any, filter_axis: int = -1,
    stack_axes: StackAxes = 0) -> Method:
  """Adaptive random perturbation: `random` with r_j / sqrt(1 + eta F_j).

  F_j <- beta F_j + sum over filter j of the squared gradients at w + r.

  Args:
    sigma: as in `random`; the published setting increases it, see
      `cosine_increase`.
    eta: the strength of the scaling, >= 0.
    beta: the decay rate of F, in [0, 1).
    mask: which leaves are perturbed.
    filter_axis: the axis of the output filters.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method; it needs `noise_key`. Its state holds F.

  References:
    Li et al., as in `m_rwp`.
  """
  return _adaptive(
      random(sigma, mask=mask, filter_axis=filter_axis, stack_axes=stack_axes),
      'ARWP', eta, beta)


def m_arwp(
    sigma: Size = 0.015, *, lam: Scalar = 0.5, eta: Scalar = 0.1,
    beta: Scalar = 0.99, natural_batch: Batch = 'same', mask: Mask = is_any,
    filter_axis: int = -1, stack_axes: StackAxes = 0) -> Method:
  """The mixture of `m_rwp` with the noise of `arwp`.

  Args:
    sigma: as in `random`.
    lam: as in `m_rwp`.
    eta: as in `arwp`.
    beta: as in `arwp`.
    natural_batch: as in `m_rwp`.
    mask: which leaves are perturbed.
    filter_axis: the axis of the output filters.
    stack_axes: the number of leading axes that index layers, as in `Ball`.

  Returns:
    The method; it needs `noise_key`. Its state holds F.

  References:
    Li et al., as in `m_rwp`.
  """
  return _adaptive(
      m_rwp(sigma, lam=lam, natural_batch=natural_batch, mask=mask,
            filter_axis=filter_axis, stack_axes=stack_axes),
      'm-ARWP', eta, beta)


@dataclasses.dataclass(frozen=True)
class _CosineIncrease:
  first: float
  factor: float
  num_steps: int

  def __call__(self, step: Array) -> Array:
    angle = math.pi * jnp.asarray(step, float) / self.num_steps
    rise = (1 - jnp.cos(angle)) / 2
    return self.first * (1 + self.factor * rise)


def cosine_increase(
    first: float, factor: float, num_steps: int) -> Callable[[Array], Array]:
  """The schedule of ARWP's sigma, first (1 + factor (1 - cos(pi t / T)) / 2).

  Args:
    first: the size at t = 0; 0.001 for ARWP.
    factor: the size at t = T is (1 + factor) first; 10 for ARWP.
    num_steps: T.

  Returns:
    A function of the step count, for use as a size.
  """
  checks.not_negative('first', first)
  checks.not_negative('factor', factor)
  checks.count('num_steps', num_steps)
  return _CosineIncrease(first, factor, num_steps)
