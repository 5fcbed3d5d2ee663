"""A training step of AT or AT-AWP in PyTorch, for comparisons of time.

`eager` computes what the published training code computes: a proxy network for
the weight perturbation, gradients of the weights in every step of the attack,
and forward passes that only update statistics. `tuned` returns the same
updates with less work: it differentiates only the inputs in the attack, needs
no proxy, runs in bfloat16 with channels last, and uses a fused optimizer.
`compiled` is `tuned` under `torch.compile`.
"""

from collections.abc import Callable
import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
import torch_preact_resnet
import torch_wide_resnet

VARIANTS = ('eager', 'tuned', 'compiled')
EPSILON, ETA, NUM_STEPS = 8 / 255, 2 / 255, 10
_TINY = 1e-12


def network(name: str, width: int, depth: int) -> nn.Module:
  """PreActResNet-18 or WideResNet; 0 selects the published width and depth."""
  if name == 'preact_resnet':
    return torch_preact_resnet.PreActResNet(10, width or 64)
  return torch_wide_resnet.WideResNet(10, depth or 34, width or 10)


def make_step(
    variant: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor,
    gamma: float, precision: str) -> Callable[[], torch.Tensor]:
  """Prepares a step.

  Args:
    variant: one of `VARIANTS`.
    model: the network, on the device of the batch; the step trains it.
    x: images [B, 3, H, W] in [0, 1].
    y: labels [B].
    gamma: the size of the weight perturbation; 0: AT.
    precision: bfloat16 runs under autocast.

  Returns:
    A function that trains for one step and returns the loss.
  """
  model.train()
  if variant == 'eager':
    return _eager_step(model, x, y, gamma, _casts(x, precision))
  model = model.to(memory_format=torch.channels_last)
  x = x.to(memory_format=torch.channels_last)
  run: Any = torch.compile(model) if variant == 'compiled' else model
  return _tuned_step(model, run, x, y, gamma, _casts(x, precision))


def _casts(x: torch.Tensor, precision: str) -> Callable[[], Any]:
  if precision == 'bfloat16':
    return lambda: torch.autocast(x.device.type, torch.bfloat16)
  return contextlib.nullcontext


def _start(x: torch.Tensor) -> torch.Tensor:
  noise = torch.empty_like(x).uniform_(-EPSILON, EPSILON)
  return (x + noise).clamp(0, 1)


def _ascend(
    x: torch.Tensor, x_adv: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
  moved = x_adv.detach() + ETA * grad.sign()
  return x + (moved - x).clamp(-EPSILON, EPSILON)


def _eager_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, gamma: float,
    casts: Callable[[], Any]) -> Callable[[], torch.Tensor]:
  optimizer = torch.optim.SGD(
      model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
  proxy = copy.deepcopy(model)
  adversary = torch.optim.SGD(proxy.parameters(), lr=0.01)

  def loss_of(run: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with casts():
      return functional.cross_entropy(run(images), y)

  def perturbation(x_adv: torch.Tensor) -> dict[str, torch.Tensor]:
    proxy.load_state_dict(model.state_dict())
    adversary.zero_grad()
    (-loss_of(proxy, x_adv)).backward()
    adversary.step()
    with torch.no_grad():
      pairs = zip(model.named_parameters(), proxy.parameters(), strict=True)
      moves = {name: (w, p - w) for (name, w), p in pairs if w.ndim > 1}
      return {name: gamma * w.norm() / (move.norm() + _TINY) * move
              for name, (w, move) in moves.items()}

  def add(found: dict[str, torch.Tensor], sign: int) -> None:
    with torch.no_grad():
      for name, w in model.named_parameters():
        if name in found:
          w.add_(found[name], alpha=sign)

  def step() -> torch.Tensor:
    x_adv = _start(x)
    for _ in range(NUM_STEPS):
      x_adv.requires_grad_()
      loss_of(model, x_adv).backward()  # gradients of the weights as well
      x_adv = _ascend(x, x_adv, x_adv.grad).clamp(0, 1).detach()
    loss_of(model, x_adv)  # compares the restarts
    found = perturbation(x_adv) if gamma else {}
    add(found, 1)
    optimizer.zero_grad()
    loss = loss_of(model, x_adv)
    loss.backward()
    optimizer.step()
    add(found, -1)
    loss_of(model, x)  # natural accuracy
    return loss.detach()

  return step


def _tuned_step(
    model: nn.Module, run: Any, x: torch.Tensor, y: torch.Tensor, gamma: float,
    casts: Callable[[], Any]) -> Callable[[], torch.Tensor]:
  params = list(model.parameters())
  weights = [w for w in params if w.ndim > 1]
  optimizer = torch.optim.SGD(
      params, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)

  def loss_of(images: torch.Tensor) -> torch.Tensor:
    with casts():
      return functional.cross_entropy(run(images), y)

  def perturbation(x_adv: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss_of(x_adv), params)
    moves = [g for w, g in zip(params, grads, strict=True) if w.ndim > 1]
    norms = torch._foreach_norm(weights), torch._foreach_norm(moves)
    return [gamma * n / (m + _TINY) * g
            for n, m, g in zip(*norms, moves, strict=True)]

  def step() -> torch.Tensor:
    model.requires_grad_(False)
    x_adv = _start(x)
    for _ in range(NUM_STEPS):
      x_adv.requires_grad_()
      grad, = torch.autograd.grad(loss_of(x_adv), x_adv)
      x_adv = _ascend(x, x_adv, grad).clamp(0, 1)
    model.requires_grad_(True)
    found = perturbation(x_adv) if gamma else []
    with torch.no_grad():
      if found:
        torch._foreach_add_(weights, found)
    optimizer.zero_grad()
    loss = loss_of(x_adv)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      if found:
        torch._foreach_sub_(weights, found)
    return loss.detach()

  return step
