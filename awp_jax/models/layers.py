"""Layers, initializers and normalization shared by the residual networks."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from awp_jax.core import checks
from awp_jax.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    'relu': nn.relu, 'silu': nn.silu}

#: Where convolutions with a stride are padded: on all sides, or below and to
#: the right of the image, as in DeepMind's code.
PADDINGS = ('around', 'after')

#: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), PyTorch's default for convolutions
#: and linear layers, used in the paper's PreActResNet.
uniform_fan_in = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

#: N(0, 2 / fan_out), as in the paper's WideResNet.
normal_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def uniform_bias(fan_in: int) -> nn.initializers.Initializer:
  """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)) for a bias, as in PyTorch."""

  def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    bound = fan_in ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


@dataclasses.dataclass(frozen=True)
class Parts:
  """Makes the layers of a network with common types and initializers.

  Attributes:
    activation: 'relu' or 'silu'.
    dtype: computation type; None means that of inputs and parameters. Batch
      statistics are computed in float32 or wider.
    param_dtype: type of the parameters.
    kernel_init: initializer of convolution kernels.
    axis_name: mapped axis over which batch statistics are averaged in train
      mode; None means per-device statistics.
    padding: one of `PADDINGS`.
  """

  activation: str = 'relu'
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Any = uniform_fan_in
  axis_name: str | None = None
  padding: str = 'around'

  def conv(self, features: int, size: int, stride: int, name: str) -> nn.Conv:
    """A convolution without bias, padded by size // 2 on each side.

    With the padding 'after' and stride 2, it is padded by (0, size - 2), which
    is 'SAME' for images of even size.
    """
    # Explicit padding: 'SAME' pads an even image differently at stride 2.
    pad: Any = size // 2
    if stride > 1 and size > 1 and self.padding == 'after':
      pad = ((0, size - 2), (0, size - 2))
    return nn.Conv(
        features, (size, size), (stride, stride), padding=pad,
        use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype,
        kernel_init=self.kernel_init, name=name)

  def normalize(self, x: Array, train: bool, name: str) -> Array:
    """Batch normalization called `name`."""
    normalized: Array = nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5,
        dtype=self.dtype, param_dtype=self.param_dtype,
        axis_name=self.axis_name, name=name)(x)
    return normalized

  def activate(self, x: Array, train: bool, name: str) -> Array:
    """Batch normalization called `name`, then the activation."""
    return ACTIVATIONS[self.activation](self.normalize(x, train, name))

  def dense(
      self, features: int, name: str, kernel_init: Any, bias_init: Any
  ) -> nn.Dense:
    """The classifier."""
    return nn.Dense(
        features, dtype=self.dtype, param_dtype=self.param_dtype,
        kernel_init=kernel_init, bias_init=bias_init, name=name)


def rematerialized(block: Any) -> Any:
  """A block (x, train) whose backward pass recomputes its activations.

  Args:
    block: the module class.

  Returns:
    A class with the same parameters, under the same names.
  """
  return nn.remat(block, static_argnums=(2,))  # 0 is self, 2 is train


def check_image_model(
    activation: str, num_classes: int, width: int, mean: Sequence[float],
    std: Sequence[float], padding: str = 'around') -> None:
  """Raises ValueError for invalid arguments of an image model."""
  checks.one_of('padding', padding, PADDINGS)
  checks.one_of('activation', activation, ACTIVATIONS)
  checks.count('num_classes', num_classes)
  checks.count('width', width)
  if len(mean) != len(std) or not all(s > 0 for s in std):
    raise ValueError(
        'mean and std need the same number of channels and std > 0, got '
        f'{tuple(mean)} and {tuple(std)}.')


def normalize_pixels(
    x: Array, mean: Sequence[float], std: Sequence[float], dtype: Any) -> Array:
  """(x - mean) / std by channel, then cast to `dtype`; None does not cast.

  Args:
    x: images [B, H, W, C] in [0, 1].
    mean: C means, or one for all channels.
    std: C standard deviations, or one.
    dtype: the type of the result.

  Returns:
    Normalized images shaped like `x`.

  Raises:
    ValueError: for images that are not floating point: the mean, cast to bytes,
      would be 0.
  """
  checks.floating('images', x)
  x = (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)
  return x if dtype is None else x.astype(dtype)
