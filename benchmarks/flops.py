"""Counts the floating-point operations of a JAX function from its jaxpr.

Only matrix products and convolutions count, two operations for each
multiplication with its addition, also at zero padding. Zeros that an input
gradient inserts between the values of a strided convolution do not count.
"""

from collections.abc import Callable
import math
from typing import Any

import jax


def of(fn: Callable[..., Any], *args: Any) -> int:
  """The operations of `fn(*args)`.

  Args:
    fn: a function that JAX can trace.
    args: its arguments; arrays or shapes.

  Returns:
    The number of operations. Of the branches of a conditional the most costly
    counts.

  Raises:
    ValueError: for matrix products in a loop of unknown length.
  """
  return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def of_jaxpr(jaxpr: Any) -> int:
  """The operations of a jaxpr, as `of` counts them."""
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _of_product(equation)
  if name == 'conv_general_dilated':
    return _of_convolution(equation)
  counts = [
      of_jaxpr(getattr(inner, 'jaxpr', inner))
      for value in params.values() for inner in (
          value if isinstance(value, (tuple, list)) else (value,))
      if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr')]
  if name == 'cond':
    return max(counts)
  if name == 'scan':
    return params['length'] * sum(counts)
  if name == 'while' and sum(counts):
    raise ValueError('matrix products in a loop of unknown length.')
  return sum(counts)


def _of_product(equation: Any) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.invars[0].aval.shape
  out = math.prod(equation.outvars[0].aval.shape)
  return 2 * out * math.prod(shape[axis] for axis in contracted)


def _of_convolution(equation: Any) -> int:
  numbers = equation.params['dimension_numbers']
  _, features, *spatial = numbers.rhs_spec
  kernel = equation.invars[1].aval.shape
  taps = kernel[features] * math.prod(kernel[axis] for axis in spatial)
  out = math.prod(equation.outvars[0].aval.shape)
  return 2 * out * taps // math.prod(equation.params['lhs_dilation'])
