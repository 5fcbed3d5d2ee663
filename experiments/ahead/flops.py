"""Counts the floating-point operations of convolutions and matrix products.

XLA's own count includes the body of a loop once, and is absent for GPUs. This
one reads the jaxpr, where loops have their length. A multiplication by a zero
between the elements of a strided gradient is not counted, and one by padding
only if asked for, so the gradients of a convolution take as many operations as
the convolution.

  >>> import jax, jax.numpy as jnp
  >>> def loop(a, b):
  ...   return jax.lax.fori_loop(0, 5, lambda _, x: x @ b, a)
  >>> square = jnp.ones((4, 4))
  >>> count(jax.make_jaxpr(loop)(square, square).jaxpr)
  {'float32': 640.0}
"""

from collections.abc import Iterator
import functools
import math
from typing import Any

from jax.extend import core
import numpy as np

#: Names of `jax.lax.Precision` in the kinds of `count`.
_PRECISIONS = {'HIGH': ' high', 'HIGHEST': ' highest'}


def count(
    jaxpr: core.Jaxpr, *, padding: bool = False) -> dict[str, float]:
  """Operations by kind; a multiplication and an addition are two.

  Under `shard_map` they are those of one device. Only one branch of a
  conditional counts, the longest.

  Args:
    jaxpr: of a function.
    padding: whether multiplications by the padding of an image count, as in
      the usual figures of networks.

  Returns:
    The number of operations by kind: the dtype of the first operand, with
    ' high' or ' highest' for these precisions of the matrix product.

  Raises:
    ValueError: for products inside a loop of unknown length.
  """
  total: dict[str, float] = {}
  for equation in jaxpr.eqns:
    for kind, number in _of_equation(equation, padding).items():
      total[kind] = total.get(kind, 0.0) + number
  return total


def _of_equation(equation: Any, padding: bool) -> dict[str, float]:
  name = equation.primitive.name
  if name in _PRODUCTS:
    return {_kind(equation): float(_PRODUCTS[name](equation, padding))}
  inner = [count(part, padding=padding) for part in _jaxprs(equation.params)]
  if not any(inner):
    return {}
  if name == 'while':
    raise ValueError('a loop of unknown length computes matrix products.')
  if name == 'cond':
    return max(inner, key=lambda part: sum(part.values()))
  times = equation.params['length'] if name == 'scan' else 1
  return {
      kind: times * sum(part.get(kind, 0.0) for part in inner)
      for kind in sorted(set().union(*inner))}


def _jaxprs(value: Any) -> Iterator[core.Jaxpr]:
  """The jaxprs among the parameters of an equation."""
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, dict):
    yield from _jaxprs(tuple(value.values()))
  elif isinstance(value, tuple | list):
    for part in value:
      yield from _jaxprs(part)


def _kind(equation: Any) -> str:
  precision = equation.params['precision']
  if isinstance(precision, tuple):
    precision = precision[0]
  suffix = _PRECISIONS.get(getattr(precision, 'name', ''), '')
  return f'{equation.invars[0].aval.dtype}{suffix}'


def _dot(equation: Any, padding: bool) -> int:
  del padding  # a matrix has none
  (contracted, _), _ = equation.params['dimension_numbers']
  left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any, padding: bool) -> int:
  params = equation.params
  numbers = params['dimension_numbers']
  image, kernel = (variable.aval.shape for variable in equation.invars)
  out = equation.outvars[0].aval.shape
  if padding:
    taps = math.prod(kernel[k] for k in numbers.rhs_spec[1:])
    return 2 * math.prod(out) * taps // math.prod(params['lhs_dilation'])
  pairs = math.prod(
      _pairs(image[i], kernel[k], out[o], stride, before, spread, apart)
      for i, k, o, stride, (before, _), spread, apart in zip(
          numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:],
          params['window_strides'], params['padding'], params['lhs_dilation'],
          params['rhs_dilation'], strict=True))
  channels = kernel[numbers.rhs_spec[1]]
  return 2 * pairs * channels * math.prod(
      out[axis] for axis in numbers.out_spec[:2])


@functools.cache
def _pairs(
    image: int, kernel: int, out: int, stride: int, padding: int, spread: int,
    apart: int) -> int:
  """Number of (output, kernel) positions that meet an element of the image."""
  place = (np.arange(out)[:, None] * stride + np.arange(kernel) * apart
           - padding)
  inside = (place >= 0) & (place <= (image - 1) * spread)
  return int(np.sum(inside & (place % spread == 0)))


_PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _convolution}
