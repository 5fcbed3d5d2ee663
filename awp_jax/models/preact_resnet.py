"""Pre-activation residual networks for small images, in flax.linen.

The networks of the paper: a stage of stride 1, then three of stride 2. Each
block normalizes before it convolves. Inputs are pixels in [0, 1] and are
normalized inside, so that attacks and threat models work on pixels.

References:
  He et al., Identity Mappings in Deep Residual Networks, ECCV 2016.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from awp_jax.core import numerics
from awp_jax.models import layers
from awp_jax.types import Array


class PreActBlock(nn.Module):
  """Two 3x3 convolutions; the shortcut projects the normalized input."""

  planes: int
  stride: int
  parts: layers.Parts

  expansion = 1

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Features [B, H / stride, W / stride, C'] of features [B, H, W, C]."""
    parts = self.parts
    out = parts.activate(x, train, 'bn1')
    shortcut = x
    if self.stride != 1 or x.shape[-1] != self.planes:
      shortcut = parts.conv(self.planes, 1, self.stride, 'shortcut')(out)
    out = parts.conv(self.planes, 3, self.stride, 'conv1')(out)
    out = parts.activate(out, train, 'bn2')
    return shortcut + parts.conv(self.planes, 3, 1, 'conv2')(out)


class PreActBottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, the last four times as wide."""

  planes: int
  stride: int
  parts: layers.Parts

  expansion = 4

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Features [B, H / stride, W / stride, C'] of features [B, H, W, C]."""
    parts = self.parts
    out = parts.activate(x, train, 'bn1')
    width = self.planes * self.expansion
    shortcut = x
    if self.stride != 1 or x.shape[-1] != width:
      shortcut = parts.conv(width, 1, self.stride, 'shortcut')(out)
    out = parts.conv(self.planes, 1, 1, 'conv1')(out)
    out = parts.activate(out, train, 'bn2')
    out = parts.conv(self.planes, 3, self.stride, 'conv2')(out)
    out = parts.activate(out, train, 'bn3')
    return shortcut + parts.conv(width, 1, 1, 'conv3')(out)


#: depth -> (block, blocks of each stage)
DEPTHS: dict[int, tuple[Any, tuple[int, ...]]] = {
    10: (PreActBlock, (1, 1, 1, 1)),
    18: (PreActBlock, (2, 2, 2, 2)),
    34: (PreActBlock, (3, 4, 6, 3)),
    50: (PreActBottleneck, (3, 4, 6, 3)),
}


class PreActResNet(nn.Module):
  """PreActResNet-10, -18, -34 or -50.

  Attributes:
    num_classes: the number of logits.
    depth: 10, 18, 34 or 50.
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
    kind, blocks = DEPTHS[self.depth]
    block = layers.rematerialized(kind) if self.remat else kind
    parts = layers.Parts(
        self.activation, self.dtype, self.param_dtype,
        axis_name=self.axis_name)
    x = layers.normalize_pixels(x, self.mean, self.std, self.dtype)
    x = parts.conv(self.width, 3, 1, 'conv1')(x)
    for stage, num_blocks in enumerate(blocks):
      for i in range(num_blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        x = block(
            self.width * 2 ** stage, stride, parts,
            name=f'layer{stage + 1}_{i}')(x, train)
    x = jnp.mean(parts.activate(x, train, 'bn'), axis=(1, 2))
    logits = parts.dense(
        self.num_classes, 'linear', layers.uniform_fan_in,
        layers.uniform_bias(x.shape[-1]))(x)
    return numerics.wide(logits)
