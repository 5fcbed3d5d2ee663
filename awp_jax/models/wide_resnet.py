"""Wide residual networks, in flax.linen.

WideResNet-d-k has 3 (d - 4) / 6 blocks of two 3x3 convolutions, k times as wide
as a plain residual network. Inputs are pixels in [0, 1] and are normalized
inside.

References:
  Zagoruyko, Komodakis, Wide Residual Networks, BMVC 2016.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from awp_jax.core import checks, numerics
from awp_jax.models import layers
from awp_jax.types import Array


class WideBlock(nn.Module):
  """Two 3x3 convolutions, and a shortcut that projects if the widths differ."""

  planes: int
  stride: int
  dropout_rate: float
  parts: layers.Parts

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Features [B, H / stride, W / stride, C'] of features [B, H, W, C]."""
    parts = self.parts
    out = parts.activate(x, train, 'bn1')
    shortcut = x
    if x.shape[-1] != self.planes:
      shortcut = parts.conv(self.planes, 1, self.stride, 'shortcut')(out)
    out = parts.conv(self.planes, 3, self.stride, 'conv1')(out)
    out = parts.activate(out, train, 'bn2')
    if self.dropout_rate > 0:
      out = nn.Dropout(self.dropout_rate, deterministic=not train)(out)
    return shortcut + parts.conv(self.planes, 3, 1, 'conv2')(out)


class WideResNet(nn.Module):
  """WideResNet-depth-width.

  Attributes:
    num_classes: the number of logits.
    depth: 6 n + 4 for a whole n >= 1: 16, 28, 34, 40, 70, ...
    width: the widening factor k >= 1.
    mean: pixel means by channel, in [0, 1]; subtracted inside.
    std: pixel standard deviations by channel; divided by inside.
    activation: 'relu' or 'silu'.
    dropout_rate: between the convolutions of a block, in train mode; needs a
      'dropout' key.
    dtype: computation type; None means that of inputs and parameters.
    param_dtype: type of the parameters and running statistics.
    axis_name: mapped axis over which batch statistics are averaged in train
      mode, which then needs this axis; None means per-device statistics.
    remat: whether a backward pass recomputes the activations inside each block
      instead of storing them. The results are the same.
    padding: of convolutions of stride 2: 'around' the image, or only 'after' it
      (below and to the right), as in DeepMind's code.
  """

  num_classes: int
  depth: int = 34
  width: int = 10
  mean: Sequence[float] = (0.0,)
  std: Sequence[float] = (1.0,)
  activation: str = 'relu'
  dropout_rate: float = 0.0
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None
  remat: bool = False
  padding: str = 'around'

  def __post_init__(self) -> None:
    checks.count('depth', self.depth, minimum=10)
    if (self.depth - 4) % 6:
      raise ValueError(
          'the depth of a WideResNet must be 6 n + 4 (10, 16, 22, 28, ...), '
          f'got {self.depth!r}.')
    if not 0 <= self.dropout_rate < 1:
      raise ValueError(
          f'dropout_rate must be in [0, 1), got {self.dropout_rate!r}.')
    layers.check_image_model(
        self.activation, self.num_classes, self.width, self.mean, self.std,
        self.padding)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits [B, num_classes] of images [B, H, W, C] in [0, 1].

    Args:
      x: the images, of any height and width.
      train: whether batch normalization uses batch statistics and updates the
        running statistics, and whether dropout is active.

    Returns:
      The logits, float32 or wider.
    """
    parts = layers.Parts(
        self.activation, self.dtype, self.param_dtype, layers.normal_fan_out,
        self.axis_name, self.padding)
    x = layers.normalize_pixels(x, self.mean, self.std, self.dtype)
    x = parts.conv(16, 3, 1, 'conv1')(x)
    block = layers.rematerialized(WideBlock) if self.remat else WideBlock
    for stage in range(3):
      for i in range((self.depth - 4) // 6):
        stride = 2 if stage > 0 and i == 0 else 1
        x = block(
            16 * self.width * 2 ** stage, stride, self.dropout_rate, parts,
            name=f'block{stage + 1}_{i}')(x, train)
    x = jnp.mean(parts.activate(x, train, 'bn1'), axis=(1, 2))
    logits = parts.dense(
        self.num_classes, 'fc', layers.uniform_fan_in, nn.initializers.zeros)(x)
    return numerics.wide(logits)
