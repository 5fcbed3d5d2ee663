"""PreActResNet in PyTorch, which loads the weights of this library.

Names and layouts are those of the AWP authors' networks.
"""

from collections.abc import Sequence
import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
  """Twice normalize and convolve; the shortcut takes normalized input."""

  def __init__(
      self, into: int, out: int, stride: int, norm: type[nn.Module]) -> None:
    super().__init__()
    self.bn1, self.bn2 = norm(into), norm(out)
    self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
    self.shortcut = None
    if stride != 1 or into != out:
      self.shortcut = nn.Sequential(
          nn.Conv2d(into, out, 1, stride, bias=False))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps features [B, C, H, W] to the block's output."""
    out = functional.relu(self.bn1(x))
    past = x if self.shortcut is None else self.shortcut(out)
    return past + self.conv2(functional.relu(self.bn2(self.conv1(out))))


class PreActResNet(nn.Module):
  """Four stages, each twice as wide as the one before.

  Args:
    classes: Number of logits.
    width: Channels of the first stage.
    blocks: Number of blocks of each stage.
    norm: Normalization layer.
  """

  def __init__(
      self, classes: int = 10, width: int = 64,
      blocks: Sequence[int] = (2, 2, 2, 2),
      norm: type[nn.Module] = nn.BatchNorm2d) -> None:
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
    into = width
    for stage, count in enumerate(blocks):
      out, layers = width * 2 ** stage, []
      for i in range(count):
        layers.append(Block(into, out, 2 if stage and not i else 1, norm))
        into = out
      self.add_module(f'layer{stage + 1}', nn.Sequential(*layers))
    self.bn, self.linear = norm(into), nn.Linear(into, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps images [B, 3, H, W] to logits [B, classes]."""
    x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
    return self.linear(functional.relu(self.bn(x)).mean((2, 3)))


_NAMES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
          'mean': 'running_mean', 'var': 'running_var'}


def load(weights: Any) -> PreActResNet:
  """Makes a PreActResNet-18 in eval mode from flat Flax variables.

  Args:
    weights: Arrays by path, such as params/layer1_0/conv1/kernel.
  """
  state = {}
  for path in weights:
    *parts, leaf = path.split('/')[1:]
    value = torch.tensor(weights[path])
    if leaf == 'kernel':
      value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
    name = '.'.join([*parts, _NAMES[leaf]])
    name = re.sub(r'^(layer\d)_', r'\1.', name)
    name = name.replace('.shortcut.', '.shortcut.0.')
    state[name] = value.contiguous()
  out, *_ = state['conv1.weight'].shape
  model = PreActResNet(len(state['linear.bias']), out)
  missing, unexpected = model.load_state_dict(state, strict=False)
  if unexpected or any('num_batches' not in name for name in missing):
    raise ValueError(f'weights do not fit: {missing}, {unexpected}.')
  return model.eval()
