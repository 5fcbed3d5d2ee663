"""Chooses the form in which a convolution is fast on CPUs.

`of_equation` returns one of `awp_jax.core.convolution_forms` for a
`conv_general_dilated` equation, or None where XLA's kernels are as fast.
Results differ from `lax.conv_general_dilated` by rounding only. In `as_dense`
an input that is not finite makes more outputs NaN.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax.numpy as jnp

from awp_jax.core import convolution_forms as forms
from awp_jax.core import equations
from awp_jax.core.convolution_forms import Convolution
from awp_jax.core.equations import Form

#: Largest matrix of `as_dense`: in kernels, and in pairs of pixels, each of
#: which is a piece of the program.
_MOST_KERNELS = 4
_MOST_PAIRS = 1024


def parameters(params: dict[str, Any]) -> Convolution | None:
  """The parameters of an equation, or None for grouped convolutions."""
  if params['feature_group_count'] != 1 or params['batch_group_count'] != 1:
    return None
  numbers = params['dimension_numbers']
  return Convolution(
      tuple(numbers.lhs_spec), tuple(numbers.rhs_spec),
      tuple(numbers.out_spec), tuple(params['window_strides']),
      tuple((low, high) for low, high in params['padding']),
      tuple(params['lhs_dilation']), tuple(params['rhs_dilation']),
      params['precision'])


def suits_loops(equation: Any) -> bool:
  """Whether it and its gradient by the input are fast inside loops on CPUs.

  Inside a loop XLA runs dilated convolutions 2 to 20 times and those with
  channels first 50 to 170 times as slowly
  (`docs/results/autoattack_speed.md`).

  Args:
    equation: a convolution.

  Returns:
    True for a convolution in float32 or bfloat16 with channels last, a kernel
    [..., C, C'], no groups and no dilation. Groups were measured twice as fast
    (depthwise) and 1.2 times as slow (four); their gradients are not rewritten.
  """
  conv = parameters(equation.params)
  lhs, rhs, out = equations.shapes(equation)
  return (
      conv is not None and conv.is_channels_last
      and conv.rhs_spec == conv.plain_kernel
      and set(conv.lhs_dilation) == set(conv.rhs_dilation) == {1}
      and _has_forms(lhs, rhs, out))


def _has_forms(lhs: Any, rhs: Any, out: Any) -> bool:
  """Whether the dtypes are those of the forms: one of float32 and bfloat16."""
  return lhs.dtype == rhs.dtype == out.dtype and (
      lhs.dtype in (jnp.float32, jnp.bfloat16))


def of_equation(equation: Any) -> Form | None:
  """The form of a convolution that is faster on CPUs, or None to keep it."""
  conv = parameters(equation.params)
  return None if conv is None else rewritten(
      conv, *equations.shapes(equation))


def rewritten(
    conv: Convolution, lhs: Any, rhs: Any, out: Any) -> Form | None:
  """The form that is faster on CPUs, or None to keep the convolution.

  Args:
    conv: its parameters.
    lhs: shape and dtype of the input.
    rhs: of the kernel.
    out: of the output.

  Returns:
    A function of input and kernel, or None.
  """
  if not _has_forms(lhs, rhs, out) or (
      0 in (*lhs.shape, *rhs.shape, *out.shape)):
    return None
  if all(size == 1 for size in conv.spatial(conv.out_spec, out.shape)) and (
      _reads_inside(conv, lhs.shape, rhs.shape)):
    return functools.partial(forms.as_product, conv)
  is_small = _has_more_taps_than_pixels(conv, lhs.shape, rhs.shape)
  if is_small and _fits(conv, lhs.shape, rhs.shape, out.shape):
    return functools.partial(forms.as_dense, conv)
  if conv.is_channels_last and set(conv.rhs_dilation) == {1}:
    if set(conv.lhs_dilation) != {1}:
      return None if set(conv.strides) != {1} else functools.partial(
          forms.by_residues, conv)
    if is_small or conv.rhs_spec != conv.plain_kernel:
      return functools.partial(forms.plain, conv)
  if forms.pieces(conv, lhs, rhs) > 1:
    return functools.partial(forms.in_pieces, conv)
  return None


def _reads_inside(
    conv: Convolution, lhs: Sequence[int], rhs: Sequence[int]) -> bool:
  """Whether the only window lies inside the undilated input."""
  if set(conv.lhs_dilation) != {1}:
    return False
  sizes = zip(conv.spatial(conv.lhs_spec, lhs), conv.spatial(
      conv.rhs_spec, rhs), conv.rhs_dilation, conv.padding, strict=True)
  return all(
      low <= 0 and -low + (taps - 1) * step < size
      for size, taps, step, (low, _) in sizes)


def _has_more_taps_than_pixels(
    conv: Convolution, lhs: Sequence[int], rhs: Sequence[int]) -> bool:
  """Whether a window covers more taps than the input has pixels.

  Of the taps of a dilated input only those are counted that meet no zero.
  """
  taps = [-(-size // step) for size, step in zip(
      conv.spatial(conv.rhs_spec, rhs), conv.lhs_dilation, strict=True)]
  return math.prod(conv.spatial(conv.lhs_spec, lhs)) < math.prod(taps)


def _fits(
    conv: Convolution, lhs: Sequence[int], rhs: Sequence[int],
    out: Sequence[int]) -> bool:
  """Whether the matrix of `as_dense` is small enough."""
  pixels, taps, outputs = (
      math.prod(conv.spatial(spec, shape)) for spec, shape in (
          (conv.lhs_spec, lhs), (conv.rhs_spec, rhs), (conv.out_spec, out)))
  return pixels * outputs <= min(_MOST_KERNELS * taps, _MOST_PAIRS)
