"""Batch normalization with a gradient in two sums.

In train mode, with M the mean over the batch (and over the devices of an axis):

  mu = M(x)   var = M(x^2) - mu^2   r = 1 / sqrt(var + epsilon)
  h = (x - mu) r                    y = scale h + bias

The derivative is written so that its transpose sums over the batch only twice:

  dx = scale r (g - M(g) - h M(h g))   dscale = N M(h g)   dbias = N M(g)

Differentiating `flax.linen.BatchNorm` takes three sums, or five with those of the
parameters. Forward mode works as well.

References:
  Ioffe, Szegedy, Batch Normalization, ICML 2015.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from awp_jax.core import numerics
from awp_jax.types import Array


def _mean(x: Array, axis_name: str | None) -> Array:
  """Mean over all axes but the last, and over the devices of the axis."""
  mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
  return mean if axis_name is None else jax.lax.pmean(mean, axis_name)


def _statistics(x: Array, axis_name: str | None) -> tuple[Array, Array]:
  """Mean and variance [C] of x [..., C]."""
  if axis_name is None:
    mean, square = _mean(x, None), _mean(jnp.square(x), None)
  else:
    axes = tuple(range(x.ndim - 1))
    # One collective for both.
    mean, square = jax.lax.pmean(jnp.stack([
        jnp.mean(x, axis=axes), jnp.mean(jnp.square(x), axis=axes)]), axis_name)
  # Rounding can make the difference negative.
  return mean, jnp.maximum(square - jnp.square(mean), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def normalize(
    x: Array, scale: Array, bias: Array, epsilon: float, axis_name: str | None
) -> tuple[Array, Array, Array]:
  """Normalizes a batch by its own statistics.

  Args:
    x: [..., C], float32 or wider.
    scale: [C].
    bias: [C].
    epsilon: added to the variance.
    axis_name: mapped axis over which statistics are averaged, or None.

  Returns:
    y like `x`, and the mean and variance [C] of the batch.
  """
  mean, var = _statistics(x, axis_name)
  return (x - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias, mean, var


@normalize.defjvp
def _normalize_jvp(
    epsilon: float, axis_name: str | None, primals: Any, tangents: Any
) -> tuple[Any, Any]:
  x, scale, bias = primals
  dx, dscale, dbias = tangents
  y, mean, var = normalize(x, scale, bias, epsilon, axis_name)
  root = jax.lax.rsqrt(var + epsilon)
  centered = (x - mean) * root
  # Scaled first and with one broadcast per sum: the transpose then sums the
  # cotangent itself, for inputs and parameters alike.
  moved = dx * (root * scale)
  shift = dbias - _mean(moved, axis_name)
  slope = dscale - _mean(centered * moved, axis_name)
  return (y, mean, var), (
      moved + shift + centered * slope, _mean(dx, axis_name),
      2 * _mean((x - mean) * dx, axis_name))


class BatchNorm(nn.Module):
  """Batch normalization over all axes but the last.

  Variables have the names and shapes of `flax.linen.BatchNorm`: `scale` and
  `bias` in 'params', `mean` and `var` in 'batch_stats'.

  Attributes:
    momentum: the running statistics keep this share of their value at each
      update.
    epsilon: added to the variance.
    dtype: type of the result; None means that of inputs and parameters.
      Statistics and normalization are in float32 or wider.
    param_dtype: type of scale and bias.
    axis_name: mapped axis over which batch statistics are averaged, or None.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Normalized features shaped like x [..., C].

    Args:
      x: the features.
      train: whether to use the statistics of the batch, and to update the
        running statistics in 'batch_stats', which must be mutable; else the
        running statistics are used.

    Returns:
      The normalized features.
    """
    shape = x.shape[-1:]
    running_mean = self.variable(
        'batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
    running_var = self.variable(
        'batch_stats', 'var', jnp.ones, shape, jnp.float32)
    scale = self.param('scale', nn.initializers.ones, shape, self.param_dtype)
    bias = self.param('bias', nn.initializers.zeros, shape, self.param_dtype)
    dtype = self.dtype or jnp.result_type(x, scale, bias)
    wide = numerics.wide_dtype(jnp.result_type(x, dtype))
    wide_x = x.astype(wide)
    if not train:
      root = jax.lax.rsqrt(running_var.value + self.epsilon)
      y = (wide_x - running_mean.value) * (root * scale) + bias
      return y.astype(dtype)
    axis_name = None if self.is_initializing() else self.axis_name
    y, mean, var = normalize(
        wide_x, scale.astype(wide), bias.astype(wide), self.epsilon, axis_name)
    if not self.is_initializing():
      for running, new in (running_mean, mean), (running_var, var):
        running.value = (
            self.momentum * running.value + (1 - self.momentum) * new)
    return y.astype(dtype)
