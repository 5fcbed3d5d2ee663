"""Residual networks for small images that normalize after convolutions.

As He et al. (2016) describe them, with a stage of stride 1 and three of stride
2, in flax.linen. Inputs are pixels in [0, 1] and are normalized inside.

References:
  He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from awp_jax.core import numerics
from awp_jax.models import layers
from awp_jax.types import Array


class ResNetBlock(nn.Module):
  """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1."""

  planes: int
  stride: int
  parts: layers.Parts
  is_bottleneck: bool

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Features [B, H / stride, W / stride, C'] of features [B, H, W, C]."""
    parts, planes = self.parts, self.planes
    sizes = [(planes, 3, self.stride), (planes, 3, 1)]
    if self.is_bottleneck:
      sizes = [(planes, 1, 1), (planes, 3, self.stride), (4 * planes, 1, 1)]
    out = x
    for number, (features, size, stride) in enumerate(sizes, 1):
      out = parts.conv(features, size, stride, f'conv{number}')(out)
      if number < len(sizes):
        out = parts.activate(out, train, f'bn{number}')
    out = parts.normalize(out, train, f'bn{len(sizes)}')
    shortcut = x
    if self.stride != 1 or x.shape[-1] != out.shape[-1]:
      shortcut = parts.normalize(
          parts.conv(out.shape[-1], 1, self.stride, 'shortcut')(x), train,
          'shortcut_bn')
    return layers.ACTIVATIONS[parts.activation](out + shortcut)


#: depth -> (whether blocks are bottlenecks, blocks of each stage)
DEPTHS: dict[int, tuple[bool, tuple[int, ...]]] = {
    18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)), 101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3))}


class ResNet(nn.Module):
  """ResNet-18, -34, -50, -101 or -152 for small images.

  Attributes:
    num_classes: the number of logits.
    depth: a key of `DEPTHS`.
    width: channels of the first stage; each later stage has twice as many.
    mean: pixel means by channel, in [0, 1]; subtracted inside.
    std: pixel standard deviations by channel; divided by inside.
    activation: 'relu' or 'silu'.
    dtype: computation type; None means that of inputs and parameters.
    param_dtype: type of the parameters and running statistics.
    axis_name: mapped axis over which batch statistics are averaged in train
      mode, which then needs this axis; None means per-device statistics.
    remat: whether a backward pass recomputes the activations inside each block
      instead of storing them. The results are the same.
  """

  num_classes: int
  depth: int = 18
  width: int = 64
  mean: Sequence[float] = (0.0,)
  std: Sequence[float] = (1.0,)
  activation: str = 'relu'
  dtype: Any = None
  param_dtype: Any = jnp.float32
  axis_name: str | None = None
  remat: bool = False

  def __post_init__(self) -> None:
    if self.depth not in DEPTHS:
      raise ValueError(
          f'depth must be one of {sorted(DEPTHS)}, got {self.depth!r}.')
    layers.check_image_model(
        self.activation, self.num_classes, self.width, self.mean, self.std)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Logits [B, num_classes] of images [B, H, W, C] in [0, 1].

    Args:
      x: the images, of any height and width.
      train: whether batch normalization uses batch statistics and updates the
        running statistics.

    Returns:
      The logits, float32 or wider.
    """
    is_bottleneck, blocks = DEPTHS[self.depth]
    parts = layers.Parts(
        self.activation, self.dtype, self.param_dtype,
        axis_name=self.axis_name)
    x = layers.normalize_pixels(x, self.mean, self.std, self.dtype)
    x = parts.activate(parts.conv(self.width, 3, 1, 'conv1')(x), train, 'bn1')
    block = layers.rematerialized(ResNetBlock) if self.remat else ResNetBlock
    for stage, num_blocks in enumerate(blocks):
      for i in range(num_blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        x = block(
            self.width * 2 ** stage, stride, parts, is_bottleneck,
            name=f'layer{stage + 1}_{i}')(x, train)
    x = jnp.mean(x, axis=(1, 2))
    logits = parts.dense(
        self.num_classes, 'linear', layers.uniform_fan_in,
        layers.uniform_bias(x.shape[-1]))(x)
    return numerics.wide(logits)
