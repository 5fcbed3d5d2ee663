"""PreActResNet-18 for PyTorch, reading this library's weights."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
  """Normalise, convolve, twice; the shortcut sees the normalised input."""

  def __init__(self, into: int, out: int, stride: int) -> None:
    super().__init__()
    self.bn1, self.bn2 = nn.BatchNorm2d(into), nn.BatchNorm2d(out)
    self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
    self.shortcut = None
    if stride != 1 or into != out:
      self.shortcut = nn.Conv2d(into, out, 1, stride, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps features [B, C, H, W] to the block's."""
    out = functional.relu(self.bn1(x))
    past = x if self.shortcut is None else self.shortcut(out)
    return past + self.conv2(functional.relu(self.bn2(self.conv1(out))))


class PreActResNet18(nn.Module):
  """Four stages of two blocks, 64 to 512 channels."""

  def __init__(self) -> None:
    super().__init__()
    self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    into = 64
    for stage, out in enumerate((64, 128, 256, 512)):
      for i in range(2):
        stride = 2 if stage and not i else 1
        self.add_module(f'layer{stage + 1}_{i}', Block(into, out, stride))
        into = out
    self.bn, self.linear = nn.BatchNorm2d(512), nn.Linear(512, 10)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps images [B, 3, 32, 32] to logits [B, 10]."""
    x = self.conv1(x)
    for stage in range(4):
      for i in range(2):
        x = getattr(self, f'layer{stage + 1}_{i}')(x)
    return self.linear(functional.relu(self.bn(x)).mean((2, 3)))


_NAMES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
          'mean': 'running_mean', 'var': 'running_var'}


def load(weights: Any) -> PreActResNet18:
  """A network in eval mode from flat Flax variables, params/conv1/kernel."""
  state = {}
  for path in weights:
    *parts, leaf = path.split('/')[1:]
    value = torch.tensor(weights[path])
    if leaf == 'kernel':
      value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
    state['.'.join([*parts, _NAMES[leaf]])] = value.contiguous()
  model = PreActResNet18()
  missing, unexpected = model.load_state_dict(state, strict=False)
  if unexpected or any('num_batches' not in name for name in missing):
    raise ValueError(f'weights do not fit: {missing}, {unexpected}.')
  return model.eval()
