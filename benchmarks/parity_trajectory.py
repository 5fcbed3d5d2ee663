"""Writes the small trajectories of the parity tests of the training step.

  python benchmarks/parity_trajectory.py tests/data

The published algorithms of AT-AWP and TRADES-AWP (L_inf), reimplemented in
PyTorch from their description, on a tiny PreActResNet-10 and random images, in
float64. tests/helpers/torch_layout.py reads the files:

  cfg/*                eps, alpha (the attack's step), gamma, K (its steps), lr,
                       momentum, weight_decay, beta (of TRADES), steps
  x [T, B, 3, H, W]    images in [0, 1], y [T, B] their labels
  delta0               the attack starts from x + delta0
  x_adv, loss [T]      its result; the loss at w + v, without weight decay
  init/*, final/*      parameters and BatchNorm's statistics, before and after
  momentum/*           of the optimizer, after the last step

The running variance is the biased one, as in Flax.
"""

import argparse
from collections.abc import Callable
import pathlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional
import torch_preact_resnet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
SETTING = {'eps': 8 / 255, 'alpha': 2 / 255, 'K': 3, 'lr': 0.1, 'momentum': 0.9,
           'weight_decay': 5e-4, 'beta': 6.0, 'steps': 2}
GAMMA = {'at': 0.01, 'trades': 0.005}
NAMES = {'at': 'at_awp_small', 'trades': 'trades_awp_small'}
IMAGES, PIXELS, CLASSES = 4, 8, 5

Logits = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[], torch.Tensor]


class BatchNorm(nn.BatchNorm2d):
  """Batch normalization that tracks the biased variance."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Normalizes x [B, C, H, W] by batch or running statistics."""
    if not self.training:
      return super().forward(x)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    with torch.no_grad():
      self.running_mean.lerp_(mean, self.momentum)
      self.running_var.lerp_(var, self.momentum)
    return functional.batch_norm(
        x, None, None, self.weight, self.bias, True, eps=self.eps)


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
  """KL(p || q), summed over the examples."""
  p, q = (functional.log_softmax(z, 1) for z in (p_logits, q_logits))
  return (p.exp() * (p - q)).sum()


def attack(
    loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor,
    start: torch.Tensor) -> torch.Tensor:
  """PGD: sign steps that raise a loss, in the L_inf ball and in [0, 1]."""
  x_adv = start
  for _ in range(SETTING['K']):
    x_adv = x_adv.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(x_adv), x_adv)
    x_adv = x_adv.detach() + SETTING['alpha'] * g.sign()
    x_adv = torch.maximum(
        torch.minimum(x_adv, x + SETTING['eps']), x - SETTING['eps'])
    x_adv = x_adv.clamp(0, 1)
  return x_adv


def gradient(model: nn.Module, loss: Loss) -> tuple[torch.Tensor, list]:
  """The loss, and its gradient for every parameter."""
  value = loss()
  return value.detach(), list(
      torch.autograd.grad(value, list(model.parameters())))


def awp_step(
    model: nn.Module, loss: Loss, momenta: list[torch.Tensor],
    gamma: float) -> torch.Tensor:
  """Descends at w + v; updates weights, statistics and momenta in place.

  Args:
    model: The model in train mode.
    loss: The loss of the model at its current weights.
    momenta: Momenta of the optimizer, one per parameter.
    gamma: |v_l| / |w_l|, for parameters with two axes or more.

  Returns:
    The loss at w + v.
  """
  kept = {name: value.clone() for name, value in model.named_buffers()}
  _, ascent = gradient(model, loss)
  # The pass that finds v does not change the running statistics.
  for name, value in model.named_buffers():
    value.copy_(kept[name])
  w = [p.detach().clone() for p in model.parameters()]
  v = [gamma * p.norm() / (g.norm() + 1e-20) * g if p.ndim > 1
       else torch.zeros_like(p) for p, g in zip(w, ascent, strict=True)]
  with torch.no_grad():
    for p, change in zip(model.parameters(), v, strict=True):
      p.add_(change)
  value, descent = gradient(model, loss)
  with torch.no_grad():
    for p, g, momentum, change in zip(
        model.parameters(), descent, momenta, v, strict=True):
      momentum.mul_(SETTING['momentum']).add_(
          g + SETTING['weight_decay'] * p)
      p.sub_(SETTING['lr'] * momentum).sub_(change)
  return value


def at_step(model, logits: Logits, x, y, start, momenta, gamma):
  """AT-AWP: (x', loss). The attack, in train mode, updates statistics."""
  model.train()
  x_adv = attack(lambda z: functional.cross_entropy(logits(z), y), x, start)
  with torch.no_grad():
    logits(x_adv)  # The published code computes the loss of x' again.
  value = awp_step(
      model, lambda: functional.cross_entropy(logits(x_adv), y), momenta, gamma)
  with torch.no_grad():
    logits(x)  # It also logs the natural accuracy at the new weights.
  return x_adv, value


def trades_step(model, logits: Logits, x, y, start, momenta, gamma):
  """TRADES-AWP: (x', loss). The attack runs in evaluation mode."""
  model.eval()
  with torch.no_grad():
    natural = logits(x)
  x_adv = attack(lambda z: kl(natural, logits(z)), x, start)
  model.train()

  def loss() -> torch.Tensor:
    adversarial = logits(x_adv)
    clean = logits(x)
    return functional.cross_entropy(clean, y) + (
        SETTING['beta'] / len(x) * kl(clean, adversarial))

  return x_adv, awp_step(model, loss, momenta, gamma)


def trajectory(kind: str) -> dict[str, np.ndarray]:
  """Computes all arrays of a file.

  Args:
    kind: 'at' or 'trades'.
  """
  generator = torch.Generator().manual_seed(0)

  def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)

  model = torch_preact_resnet.PreActResNet(
      CLASSES, width=1, blocks=(1, 1, 1, 1), norm=BatchNorm).double()
  for name, value in model.state_dict().items():
    if value.ndim > 1:
      value.copy_((2 * uniform(*value.shape) - 1) * 2 / value[0].numel() ** 0.5)
    elif 'num_batches' not in name:
      value.copy_(0.5 + uniform(*value.shape))

  def state(prefix: str) -> dict[str, np.ndarray]:
    return {f'{prefix}/{name}': value.numpy().copy()
            for name, value in model.state_dict().items()
            if 'num_batches' not in name}

  def logits(x: torch.Tensor) -> torch.Tensor:
    if kind == 'at':
      mean, std = (torch.tensor(value, dtype=x.dtype)[:, None, None]
                   for value in (MEAN, STD))
      x = (x - mean) / std
    return model(x)

  arrays = state('init')
  momenta = [torch.zeros_like(p) for p in model.parameters()]
  shape = (SETTING['steps'], IMAGES, 3, PIXELS, PIXELS)
  x = (uniform(*shape) * 255).round() / 255
  y = (uniform(*shape[:2]) * CLASSES).long()
  if kind == 'at':
    noise = SETTING['eps'] * (2 * uniform(*shape) - 1)
    delta = (x + noise).clamp(0, 1) - x
  else:
    delta = 1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64)
  step = {'at': at_step, 'trades': trades_step}[kind]
  ends, losses = [], []
  for images, labels, noise in zip(x, y, delta, strict=True):
    x_adv, loss = step(
        model, logits, images, labels, images + noise, momenta, GAMMA[kind])
    ends.append(x_adv.numpy())
    losses.append(loss.item())
  return arrays | state('final') | {
      f'momentum/{name}': momentum.numpy() for (name, _), momentum in zip(
          model.named_parameters(), momenta, strict=True)} | {
      'x': x.numpy(), 'y': y.numpy(), 'delta0': delta.numpy(),
      'x_adv': np.stack(ends), 'loss': np.asarray(losses)} | {
      f'cfg/{name}': np.asarray(value)
      for name, value in (SETTING | {'gamma': GAMMA[kind]}).items()}


def main() -> None:
  """Writes both files."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('folder', type=pathlib.Path)
  folder = parser.parse_args().folder
  for kind, name in NAMES.items():
    np.savez_compressed(folder / f'{name}.npz', **trajectory(kind))


if __name__ == '__main__':
  main()
