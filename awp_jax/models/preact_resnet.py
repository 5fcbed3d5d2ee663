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

from awp_jax.core import checks, numerics
from awp_jax.models import layers
from awp_jax.types import Array

#: What the shortcut of a block with another shape projects, and the size of its
#: convolution.
SHORTCUTS: dict[str, tuple[str, int]] = {
    'normalized': ('normalized', 1), 'plain': ('plain', 1),
    'plain3': ('plain', 3)}


class PreActBlock(nn.Module):
  """Two 3x3 convolutions; the shortcut projects if shapes differ."""

  planes: int
  stride: int
  parts: layers.Parts
  shortcut: str = 'normalized'

  expansion = 1

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Features [B, H / stride, W / stride, C'] of features [B, H, W, C]."""
    parts = self.parts
    out = parts.activate(x, train, 'bn1')
    shortcut = x
    if self.stride != 1 or x.shape[-1] != self.planes:
      kind, size = SHORTCUTS[self.shortcut]
      shortcut = parts.conv(self.planes, size, self.stride, 'shortcut')(
          out if kind == 'normalized' else x)
    out = parts.conv(self.planes, 3, self.stride, 'conv1')(out)
    out = parts.activate(out, train, 'bn2')
    return shortcut + parts.conv(self.planes, 3, 1, 'conv2')(out)


class PreActBottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, the last four times as wide."""

  planes: int
  stride: int
  parts: layers.Parts
  shortcut: str = 'normalized'

  expansion = 4

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """Features [B, H / stride, W / stride, C'] of features [B, H, W, C]."""
    parts = self.parts
    out = parts.activate(x, train, 'bn1')
    width = self.planes * self.expansion
    shortcut = x
    if self.stride != 1 or x.shape[-1] != width:
      kind, size = SHORTCUTS[self.shortcut]
      shortcut = parts.conv(width, size, self.stride, 'shortcut')(
          out if kind == 'normalized' else x)
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
    padding: of convolutions of stride 2: 'around' the image, or only 'after' it
      (below and to the right), as in DeepMind's code.
    shortcut: what the shortcut of a block with another shape projects:
      'normalized', its input after the first normalization and activation;
      'plain', its input; 'plain3', its input by a 3x3 convolution.
    final_norm: whether features are normalized and activated before they are
      averaged for the classifier.
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
  padding: str = 'around'
  shortcut: str = 'normalized'
  final_norm: bool = True

  def __post_init__(self) -> None:
    if self.depth not in DEPTHS:
      raise ValueError(
          f'depth must be one of {sorted(DEPTHS)}, got {self.depth!r}.')
    checks.one_of('shortcut', self.shortcut, SHORTCUTS)
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
        running statistics.

    Returns:
      The logits, float32 or wider.
    """
    kind, blocks = DEPTHS[self.depth]
    block = layers.rematerialized(kind) if self.remat else kind
    parts = layers.Parts(
        self.activation, self.dtype, self.param_dtype,
        axis_name=self.axis_name, padding=self.padding)
    x = layers.normalize_pixels(x, self.mean, self.std, self.dtype)
    x = parts.conv(self.width, 3, 1, 'conv1')(x)
    for stage, num_blocks in enumerate(blocks):
      for i in range(num_blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        x = block(
            self.width * 2 ** stage, stride, parts, self.shortcut,
            name=f'layer{stage + 1}_{i}')(x, train)
    if self.final_norm:
      x = parts.activate(x, train, 'bn')
    x = jnp.mean(x, axis=(1, 2))
    logits = parts.dense(
        self.num_classes, 'linear', layers.uniform_fan_in,
        layers.uniform_bias(x.shape[-1]))(x)
    return numerics.wide(logits)
