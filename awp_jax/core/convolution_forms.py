"""Forms of one convolution, equal up to rounding.

XLA's CPU backend has fast kernels for plain convolutions only: channels last, a
kernel [..., C, C'], and neither a dilated nor a reversed input. The gradient
with respect to the inputs is not plain as JAX writes it. In `by_residues` it is
a plain convolution of the cotangent with the flipped and transposed kernel; for
a stride of s, one per residue of the output position modulo s, so that no
product with an inserted zero is computed:

  dx[s i + a] = sum_t dy[i + t] k[c + s t],   c and the range of t depend on a

Nor has it a fast kernel for an input with fewer pixels than the kernel has
taps, such as 3x3 on 2x2 pixels. Such an input is padded first, or in `as_dense`
the convolution is one matrix product:

  y[p] = sum_i x[i] W[p, i],   W[p, i] = k[i + low - s p], 0 outside the kernel

XLA also reads the kernel again for every block of outputs, which is slow once
the kernel exceeds the L2 cache. `in_pieces` splits the input features and sums
the convolutions of the parts. In the gradient with respect to the kernel, the
cotangent takes the place of the kernel and the batch that of the features.
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from awp_jax.types import Array

#: Larger kernels are split: 1.25 MiB, chosen on an Intel Xeon with 2 MiB of L2
#: cache per core. The other limits are from the same measurements. Without the
#: weakness a split convolution takes up to 1.3 times as long.
_MOST_BYTES = 5 * 2 ** 18
_MOST_PIECES = 32
#: With fewer outputs per feature the kernel is read about once.
_FEWEST_OUTPUTS = 24
#: In jax 0.10 only gradients of kernels at 16 x 16 pixels and more are slow.
_FEWEST_TAPS = 1 if jax.__version_info__ >= (0, 11) else 225


class Convolution(NamedTuple):
  """Parameters of `conv_general_dilated` that the forms depend on.

  Specs give the axes of (batch, features, *spatial) of inputs and outputs, and
  of (output features, input features, *spatial) of the kernel.
  """

  lhs_spec: tuple[int, ...]
  rhs_spec: tuple[int, ...]
  out_spec: tuple[int, ...]
  strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  lhs_dilation: tuple[int, ...]
  rhs_dilation: tuple[int, ...]
  precision: Any

  @property
  def rank(self) -> int:
    """The number of spatial axes."""
    return len(self.strides)

  @property
  def is_channels_last(self) -> bool:
    """Whether inputs and outputs are [B, ..., C]."""
    axes = (0, self.rank + 1, *range(1, self.rank + 1))
    return self.lhs_spec == self.out_spec == axes

  @property
  def plain_kernel(self) -> tuple[int, ...]:
    """The `rhs_spec` of a kernel [..., C, C']."""
    return (self.rank + 1, self.rank, *range(self.rank))

  def spatial(self, spec: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Sizes along the spatial axes of a spec."""
    return [shape[axis] for axis in spec[2:]]

  def outputs(self, axis: int, size: int, taps: int) -> int:
    """The number of outputs along a spatial axis.

    Args:
      axis: the index of the spatial axis.
      size: inputs along it.
      taps: of the kernel along it.
    """
    span = (size - 1) * self.lhs_dilation[axis] + sum(self.padding[axis])
    room = span - (taps - 1) * self.rhs_dilation[axis]
    return room // self.strides[axis] + 1


def _plain_kernel(conv: Convolution, kernel: Array) -> Array:
  """The kernel transposed to [..., C, C']."""
  outputs, inputs, *spatial = conv.rhs_spec
  return jnp.transpose(kernel, (*spatial, inputs, outputs))


def _convolve(
    conv: Convolution, x: Array, kernel: Array,
    padding: Sequence[tuple[int, int]]) -> Array:
  """A plain convolution with the strides and precision of `conv`."""
  if math.prod(x.shape[1:-1]) < math.prod(kernel.shape[:-2]):
    x = lax.pad(x, jnp.zeros((), x.dtype), [
        (0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    # Else XLA would make the padding a parameter of the convolution again.
    x, padding = lax.optimization_barrier(x), [(0, 0)] * conv.rank
  return in_pieces(conv._replace(
      rhs_spec=conv.plain_kernel, padding=tuple(padding),
      lhs_dilation=(1,) * conv.rank), x, kernel)


def pieces(conv: Convolution, lhs: Any, rhs: Any) -> int:
  """Into how many parts `in_pieces` cuts the input features.

  Args:
    conv: the convolution.
    lhs: shape and dtype of the input.
    rhs: of the kernel.

  Returns:
    The number of parts, as equal as possible; 1 to leave it whole.
  """
  if rhs.dtype != np.float32 or not all(
      isinstance(size, int) for size in (*lhs.shape, *rhs.shape)):
    return 1  # oneDNN's kernels in bfloat16 lose by it; symbolic sizes
  taps = conv.spatial(conv.rhs_spec, rhs.shape)
  outputs = lhs.shape[conv.lhs_spec[0]] * math.prod(
      conv.outputs(axis, size, taps[axis]) for axis, size in enumerate(
          conv.spatial(conv.lhs_spec, lhs.shape)))
  if outputs < _FEWEST_OUTPUTS or math.prod(taps) < _FEWEST_TAPS:
    return 1
  size = math.prod(rhs.shape) * rhs.dtype.itemsize
  features = rhs.shape[conv.rhs_spec[1]]
  least = min(-(-size // _MOST_BYTES), _MOST_PIECES, features)
  return next(
      (n for n in range(least, 2 * least) if features % n == 0), least)


def in_pieces(conv: Convolution, x: Array, kernel: Array) -> Array:
  """The same convolution, as a sum over parts of the input features."""
  features, count = kernel.shape[conv.rhs_spec[1]], pieces(conv, x, kernel)
  edges = [i * features // count for i in range(count + 1)]
  parts = [lax.conv_general_dilated(
      lax.slice_in_dim(x, *piece, axis=conv.lhs_spec[1]),
      lax.slice_in_dim(kernel, *piece, axis=conv.rhs_spec[1]),
      conv.strides, conv.padding, conv.lhs_dilation, conv.rhs_dilation,
      precision=conv.precision, dimension_numbers=lax.ConvDimensionNumbers(
          conv.lhs_spec, conv.rhs_spec, conv.out_spec))
      for piece in itertools.pairwise(edges)]
  return functools.reduce(jnp.add, parts)


def plain(conv: Convolution, x: Array, kernel: Array) -> Array:
  """The same convolution with a kernel [..., C, C']."""
  return _convolve(conv, x, _plain_kernel(conv, kernel), conv.padding)


def as_product(conv: Convolution, x: Array, kernel: Array) -> Array:
  """A convolution with one output pixel, as a matrix product."""
  window = [slice(None)] * x.ndim
  for axis, taps, step, (low, _) in zip(
      conv.lhs_spec[2:], conv.spatial(conv.rhs_spec, kernel.shape),
      conv.rhs_dilation, conv.padding, strict=True):
    window[axis] = slice(-low, -low + (taps - 1) * step + 1, step)
  product = lax.dot_general(
      x[tuple(window)], kernel,
      ((conv.lhs_spec[1:], conv.rhs_spec[1:]), ((), ())),
      precision=conv.precision)
  # [batch, features] -> the output's axes, with 1 for each spatial axis.
  batch, features = conv.out_spec[:2]
  if features < batch:
    product = product.T
  return jnp.expand_dims(product, conv.out_spec[2:])


def as_dense(conv: Convolution, x: Array, kernel: Array) -> Array:
  """A convolution as the product of all input pixels with a matrix."""
  x = jnp.transpose(x, (conv.lhs_spec[0], *conv.lhs_spec[2:], conv.lhs_spec[1]))
  weights, outs = _plain_kernel(conv, kernel), []
  batch, *pixels, _ = x.shape
  # [K1, K2, ..., C, C'] -> [I1, I2, ..., C, P1, P2, ..., C'], axis by axis.
  for axis, size in enumerate(pixels):
    taps = _taps(conv, axis, size, weights.shape[axis])
    outs.append(len(taps))
    weights = jnp.stack([jnp.concatenate([
        jnp.zeros_like(lax.slice_in_dim(weights, 0, 1, axis=axis))
        if tap is None else lax.slice_in_dim(weights, tap, tap + 1, axis=axis)
        for tap in row], axis) for row in taps], -2)
  features = weights.shape[-1]
  y = lax.dot_general(
      x.reshape(batch, -1), weights.reshape(-1, math.prod(outs) * features),
      (((1,), (0,)), ((), ())), precision=conv.precision)
  y = y.reshape(batch, *outs, features)
  order = (conv.out_spec[0], *conv.out_spec[2:], conv.out_spec[1])
  return jnp.transpose(y, tuple(order.index(i) for i in range(y.ndim)))


def _taps(
    conv: Convolution, axis: int, size: int, taps: int
) -> list[list[int | None]]:
  """The tap with which each output reads each input; None: it does not.

  Args:
    conv: the convolution.
    axis: a spatial axis.
    size: inputs along it.
    taps: of the kernel along it.

  Returns:
    One row per output, one entry per input.
  """
  low, stride = conv.padding[axis][0], conv.strides[axis]
  step, inner = conv.lhs_dilation[axis], conv.rhs_dilation[axis]

  def tap(output: int, place: int) -> int | None:
    found, rest = divmod(place * step + low - output * stride, inner)
    return found if rest == 0 and 0 <= found < taps else None

  return [[tap(output, place) for place in range(size)]
          for output in range(conv.outputs(axis, size, taps))]


class _Residue(NamedTuple):
  """The convolution of the outputs o = a (mod s) along one axis.

  Attributes:
    first: first tap of the kernel that meets no inserted zero.
    low: padding before the input; negative drops rows.
    high: padding after it.
    outputs: their number.
  """

  first: int
  low: int
  high: int
  outputs: int


def _residue(
    a: int, step: int, size: int, taps: int, low: int, out: int) -> _Residue:
  """The window of outputs a, a + s, ... of an input dilated by s.

  Output o reads input (o + k - low) / s at tap k, where this is whole.

  Args:
    a: the residue.
    step: s.
    size: of the input, not dilated.
    taps: of the kernel.
    low: the padding before the dilated input.
    out: the size of the output.
  """
  first = (low - a) % step
  count = -(-(out - a) // step)
  begin = (a + first - low) // step
  used = len(range(first, taps, step))
  return _Residue(first, -begin, begin + count - 1 + used - size, count)


def by_residues(conv: Convolution, x: Array, kernel: Array) -> Array:
  """A convolution of an input with inserted zeros, without the zeros."""
  kernel = _plain_kernel(conv, kernel)
  steps, axes = conv.lhs_dilation, range(conv.rank)
  sizes, taps = x.shape[1:-1], kernel.shape[:conv.rank]
  outs = [conv.outputs(i, sizes[i], taps[i]) for i in axes]
  whole = [-(-out // s) for out, s in zip(outs, steps, strict=True)]
  parts = []
  for residues in itertools.product(*(range(s) for s in steps)):
    found = [_residue(
        residues[i], steps[i], sizes[i], taps[i], conv.padding[i][0], outs[i])
        for i in axes]
    part = kernel[tuple(
        slice(f.first, None, s) for f, s in zip(found, steps, strict=True))]
    counts = [f.outputs for f in found]
    # XLA 0.10 is wrong where a negative padding drops all of the input.
    read = x[(slice(None), *(
        slice(max(-f.low, 0), max(size + min(f.high, 0), 0))
        for f, size in zip(found, sizes, strict=True)))]
    if 0 in (*part.shape, *read.shape, *counts):
      y = jnp.zeros((x.shape[0], *counts, kernel.shape[-1]), x.dtype)
    else:
      y = _convolve(conv, read, part, [
          (max(f.low, 0), max(f.high, 0)) for f in found])
    parts.append(jnp.pad(y, [
        (0, 0), *((0, n - c) for n, c in zip(whole, counts, strict=True)),
        (0, 0)]))
  return _interleaved(parts, steps, outs)


def _interleaved(
    parts: Sequence[Array], steps: Sequence[int], outs: Sequence[int]) -> Array:
  """Output s i + a from row i of part a, along each spatial axis.

  Args:
    parts: [B, ..., C], the last axis of the residues varying fastest.
    steps: s of each axis.
    outs: the size of the output along each axis.

  Returns:
    [B, *outs, C].
  """
  # Each stack copies contiguous rows, where one transpose would copy pixels.
  for axis in reversed(range(len(steps))):
    step = steps[axis]
    pairs = [parts[i:i + step] for i in range(0, len(parts), step)]
    parts = [jnp.stack(pair, axis + 2) for pair in pairs]
    parts = [part.reshape(
        *part.shape[:axis + 1], -1, *part.shape[axis + 3:]) for part in parts]
  return parts[0][(slice(None), *(slice(out) for out in outs))]
