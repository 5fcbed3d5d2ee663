"""Recognizes the network of a PyTorch state dict by names and shapes."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import numpy as np

from awp_jax.models import preact_resnet, resnet
from awp_jax.models.preact_resnet import PreActResNet
from awp_jax.models.resnet import ResNet
from awp_jax.models.torch_exchange import naming
from awp_jax.models.torch_exchange.convert import normalization
from awp_jax.models.torch_exchange.naming import Network
from awp_jax.models.wide_resnet import WideResNet

Shapes = Mapping[str, tuple[int, ...]]


def _count_blocks(
    shapes: Shapes, stages: Sequence[str], conv: str) -> tuple[int, ...]:
  """The number of blocks in each stage."""
  return tuple(
      sum(re.fullmatch(rf'{re.escape(stage)}\.\d+\.{conv}\.weight', name)
          is not None for name in shapes) for stage in stages)


def _preact_depth(block: Any, blocks: tuple[int, ...]) -> int:
  for depth, layout in preact_resnet.DEPTHS.items():
    if layout == (block, blocks):
      return depth
  raise ValueError(
      f'no supported PreActResNet has {blocks} blocks of type '
      f'{block.__name__}.')


def _preact(shapes: Shapes, options: dict[str, Any]) -> Network:
  """A PreActResNet, or that of Wong et al. (2020) without a last norm."""
  blocks = _count_blocks(
      shapes, [f'layer{i}' for i in (1, 2, 3, 4)], 'conv1')
  block = (preact_resnet.PreActBottleneck if 'layer1.0.conv3.weight' in shapes
           else preact_resnet.PreActBlock)
  if 'bn.weight' not in shapes:
    if 'shortcut' not in options:
      raise ValueError(
          'the names of a PreActResNet without a last normalization do not say '
          "what its shortcuts project: give shortcut='plain', as in "
          'Wong2020Fast and Andriushchenko2020Understanding, or '
          "shortcut='normalized', as in pytorch-cifar.")
    options = {**options, 'final_norm': False}
  return PreActResNet(
      shapes['linear.weight'][0], depth=_preact_depth(block, blocks),
      width=shapes['layer1.0.conv1.weight'][0], **options)


def _resnet(shapes: Shapes, options: dict[str, Any]) -> Network:
  layout = 'layer1.0.conv3.weight' in shapes, _count_blocks(
      shapes, [f'layer{i}' for i in (1, 2, 3, 4)], 'conv1')
  for depth, known in resnet.DEPTHS.items():
    if layout == known:
      return ResNet(
          shapes['linear.weight'][0], depth=depth,
          width=shapes['layer1.0.conv1.weight'][0], **options)
  raise ValueError(
      f'no supported ResNet has {layout[1]} '
      f'{"bottlenecks" if layout[0] else "blocks"}.')


def _wide(
    blocks: tuple[int, ...], channels: int, num_classes: int,
    options: dict[str, Any]) -> Network:
  width, rest = divmod(channels, 16)
  if len(set(blocks)) > 1 or rest:
    raise ValueError(
        f'no WideResNet has {blocks} blocks and {channels} channels in the '
        'first stage.')
  return WideResNet(
      num_classes, depth=6 * blocks[0] + 4, width=width, **options)


def _deepmind(shapes: Shapes, options: dict[str, Any]) -> Network:
  """DMWideResNet or DMPreActResNet."""
  options = {'activation': 'silu', 'padding': 'after', **options}
  num_classes = shapes['logits.weight'][0]
  if 'init_conv.weight' in shapes:
    blocks = _count_blocks(
        shapes, [f'layer.{i}.block' for i in (0, 1, 2)], 'conv_0')
    return _wide(
        blocks, shapes.get('layer.0.block.0.conv_0.weight', (0,))[0],
        num_classes, options)
  blocks = _count_blocks(
      shapes, [f'layer_{i}' for i in (0, 1, 2, 3)], 'conv_2d_1')
  return PreActResNet(
      num_classes, depth=_preact_depth(preact_resnet.PreActBlock, blocks),
      width=shapes['conv_2d.weight'][0], shortcut='plain3', **options)


def model_from_torch(
    state_dict: Mapping[str, Any], *, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, activation: str | None = None,
    shortcut: str | None = None) -> Network:
  """Infers the network of a state dict from names and shapes.

  They do not determine the activation, nor what the shortcuts of a PreActResNet
  project. By default these are those of the published robust networks; give
  them for other networks, since a wrong one changes the logits without an
  error.

  Args:
    state_dict: PyTorch names -> arrays.
    mean: pixel means by channel; None means those in the state dict, else 0.
    std: pixel standard deviations by channel; None likewise, else 1.
    activation: 'relu' or 'silu'; None means 'relu', and 'silu' for the networks
      of DeepMind's code, as in RobustBench.
    shortcut: of a PreActResNet: 'normalized' (None) or 'plain'. Required
      without a last normalization, where both are common.

  Returns:
    The model. `from_torch` checks that all names and shapes fit.

  Raises:
    ValueError: if it is none of our networks, only one of mean and std is
      given, they are not in units of [0, 1], a network of DeepMind's code,
      which always normalizes, has none, or a shortcut is needed.
  """
  state_dict = naming.plain_names(state_dict)
  if (mean is None) != (std is None):
    raise ValueError(
        f'mean and std must be given together, got {mean} and {std}.')
  if mean is None or std is None:
    stored = normalization(state_dict)
    if stored is None and 'batchnorm.weight' in state_dict:
      raise ValueError(
          "networks of DeepMind's code normalize the pixels, and their files "
          'do not hold mean and std: give both.')
    mean, std = stored or ((0.0,), (1.0,))
  if max(mean) > 1 or max(std) > 1:
    raise ValueError(
        f'mean and std must be in units of pixels in [0, 1], got {mean} and '
        f'{std}.')
  options: dict[str, Any] = {'mean': tuple(mean), 'std': tuple(std)}
  if activation is not None:
    options['activation'] = activation
  shapes = {name: np.shape(value) for name, value in state_dict.items()}
  names = shapes.keys()
  is_resnet = {'linear.weight', 'bn1.weight', 'layer1.0.bn2.weight'} <= names
  if not is_resnet and {'linear.weight', 'layer1.0.conv1.weight'} <= names:
    return _preact(
        shapes, options | ({'shortcut': shortcut} if shortcut else {}))
  if shortcut is not None:
    raise ValueError(
        f'shortcut={shortcut!r} is for a PreActResNet, which this is not.')
  if is_resnet:
    return _resnet(shapes, options)
  if {'logits.weight', 'batchnorm.weight'} <= names and (
      {'init_conv.weight', 'conv_2d.weight'} & names):
    return _deepmind(shapes, options)
  if {'fc.weight', 'block1.layer.0.conv1.weight'} <= names:
    return _wide(
        _count_blocks(shapes, [f'block{i}.layer' for i in (1, 2, 3)], 'conv1'),
        shapes['block1.layer.0.conv1.weight'][0], shapes['fc.weight'][0],
        options)
  raise ValueError(
      'the state dict must be of a PreActResNet, a ResNet, a WideResNet, or a '
      "network of DeepMind's code, got "
      f'{", ".join([*shapes][:3])}, ...')
