"""WideResNet in PyTorch, for comparisons of time.

Written from Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
"""

import torch
from torch import nn
from torch.nn import functional


class WideBlock(nn.Module):
  """Normalize, convolve, twice; a 1x1 convolution where the width changes."""

  def __init__(self, into: int, out: int, stride: int) -> None:
    super().__init__()
    self.bn1, self.bn2 = nn.BatchNorm2d(into), nn.BatchNorm2d(out)
    self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
    self.shortcut = None
    if into != out:
      self.shortcut = nn.Conv2d(into, out, 1, stride, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps features [B, C, H, W] to the block's output."""
    active = functional.relu(self.bn1(x))
    past = x if self.shortcut is None else self.shortcut(active)
    return past + self.conv2(functional.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
  """WideResNet-depth-width.

  Args:
    classes: Number of logits.
    depth: 6 n + 4.
    width: The widening factor.
  """

  def __init__(
      self, classes: int = 10, depth: int = 34, width: int = 10) -> None:
    super().__init__()
    into, layers = 16, []
    self.conv1 = nn.Conv2d(3, into, 3, 1, 1, bias=False)
    for stage in range(3):
      out = 16 * width * 2 ** stage
      for i in range((depth - 4) // 6):
        layers.append(WideBlock(into, out, 2 if stage and not i else 1))
        into = out
    self.blocks = nn.Sequential(*layers)
    self.bn1, self.fc = nn.BatchNorm2d(into), nn.Linear(into, classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps images [B, 3, H, W] to logits [B, classes]."""
    x = functional.relu(self.bn1(self.blocks(self.conv1(x))))
    return self.fc(x.mean((2, 3)))
