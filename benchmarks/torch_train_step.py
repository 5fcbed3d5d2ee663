"""Training steps of AT, AT-AWP and TRADES-AWP in PyTorch, to compare times.

`eager` computes what the published training code computes: a proxy network for
the weight perturbation, gradients of the weights in every step of AT's attack,
the natural logits again in every step of that of TRADES, and forward passes
that only update statistics. `tuned` returns the same updates with less work: it
differentiates only the inputs in the attack, computes natural logits once,
needs no proxy, stores images with channels last, and uses a fused optimizer.
`compiled` is `tuned` under `torch.compile`.
"""

from collections.abc import Callable
import contextlib
import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
import torch_preact_resnet
import torch_wide_resnet

VARIANTS = ('eager', 'tuned', 'compiled')
EPSILON = 8 / 255
#: Standard deviation of the start of the attack of TRADES.
START_STD = 0.001
_TINY = 1e-12

Casts = Callable[[], Any]
#: Maps a network and x' to the train loss.
LossFn = Callable[[Any, torch.Tensor], torch.Tensor]
#: Maps (model, loss function, gamma) to the function that perturbs the weights
#: at x' and returns the function that restores them.
Adversary = Callable[
    [nn.Module, LossFn, float], Callable[[torch.Tensor], Callable[[], None]]]


class Method(NamedTuple):
  """What a step computes; AT-AWP of the paper by default.

  Attributes:
    gamma: the size of the weight perturbation; 0: none.
    beta: the weight of the robust term of TRADES; None: AT.
    step_size: of the attack, in pixels of [0, 1].
    num_steps: of the attack.
  """

  gamma: float = 0.01
  beta: float | None = None
  step_size: float = 2 / 255
  num_steps: int = 10


def network(name: str, width: int, depth: int) -> nn.Module:
  """PreActResNet-18 or WideResNet; 0 selects the published width and depth."""
  if name == 'preact_resnet':
    return torch_preact_resnet.PreActResNet(10, width or 64)
  return torch_wide_resnet.WideResNet(10, depth or 34, width or 10)


def make_step(
    variant: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor,
    method: Method, precision: str, adversary: Adversary | None = None
) -> Callable[[], torch.Tensor]:
  """Prepares a step.

  Args:
    variant: one of `VARIANTS`.
    model: the network, on the device of the batch; the step trains it.
    x: images [B, 3, H, W] in [0, 1].
    y: labels [B].
    method: the losses and the attack.
    precision: bfloat16 runs under autocast.
    adversary: of `eager`, instead of the one written here.

  Returns:
    A function that trains for one step and returns the loss.
  """
  model.train()
  if variant == 'eager':
    return _eager_step(
        model, x, y, method, casts(x, precision), adversary or proxy_adversary)
  model = model.to(memory_format=torch.channels_last)
  x = x.to(memory_format=torch.channels_last)
  run: Any = torch.compile(model) if variant == 'compiled' else model
  return _tuned_step(model, run, x, y, method, casts(x, precision))


def casts(x: torch.Tensor, precision: str) -> Casts:
  """The context of a forward pass: autocast for bfloat16."""
  if precision == 'bfloat16':
    return lambda: torch.autocast(x.device.type, torch.bfloat16)
  return contextlib.nullcontext


def start(x: torch.Tensor, method: Method) -> torch.Tensor:
  """x' before the first step: uniform in the ball, or close to x for TRADES."""
  if method.beta is not None:
    return x + START_STD * torch.randn_like(x)
  noise = torch.empty_like(x).uniform_(-EPSILON, EPSILON)
  return (x + noise).clamp(0, 1)


def ascend(
    x: torch.Tensor, x_adv: torch.Tensor, grad: torch.Tensor,
    step_size: float) -> torch.Tensor:
  """A step of sign gradient ascent, projected onto the ball and the box."""
  moved = x_adv.detach() + step_size * grad.sign()
  return (x + (moved - x).clamp(-EPSILON, EPSILON)).clamp(0, 1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
  """Losses are computed in float32 or wider, as in awp_jax."""
  return logits.float() if logits.dtype == torch.bfloat16 else logits


def _divergence(
    logits: torch.Tensor, natural: torch.Tensor,
    reduction: str) -> torch.Tensor:
  return functional.kl_div(
      functional.log_softmax(_wide(logits), 1),
      functional.softmax(_wide(natural), 1), reduction=reduction)


def _train_loss(
    x: torch.Tensor, y: torch.Tensor, method: Method, context: Casts,
    repeats: bool) -> LossFn:
  """The loss of the weights; `repeats` the natural pass, as published."""

  def loss_fn(run: Any, x_adv: torch.Tensor) -> torch.Tensor:
    with context():
      logits = run(x_adv)
      if method.beta is None:
        return functional.cross_entropy(_wide(logits), y)
      natural = run(x)
      other = run(x) if repeats else natural
      return functional.cross_entropy(_wide(other), y) + (
          method.beta * _divergence(logits, natural, 'batchmean'))

  return loss_fn


def proxy_adversary(
    model: nn.Module, loss_fn: LossFn, gamma: float
) -> Callable[[torch.Tensor], Callable[[], None]]:
  """AWP by a step of gradient descent on the negative loss of a copy."""
  proxy = copy.deepcopy(model)
  optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)

  def add(found: dict[str, torch.Tensor], sign: int) -> None:
    with torch.no_grad():
      for name, w in model.named_parameters():
        if name in found:
          w.add_(found[name], alpha=sign)

  def perturb(x_adv: torch.Tensor) -> Callable[[], None]:
    proxy.load_state_dict(model.state_dict())
    proxy.train()
    optimizer.zero_grad()
    (-loss_fn(proxy, x_adv)).backward()
    optimizer.step()
    with torch.no_grad():
      pairs = zip(model.named_parameters(), proxy.parameters(), strict=True)
      moves = {name: (w, p - w) for (name, w), p in pairs if w.ndim > 1}
      found = {name: gamma * w.norm() / (move.norm() + _TINY) * move
               for name, (w, move) in moves.items()}
    add(found, 1)
    return lambda: add(found, -1)

  return perturb


def eager_attack(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, method: Method,
    context: Casts) -> torch.Tensor:
  """x' as the published code computes it, in the model's mode.

  Args:
    model: the network.
    x: images.
    y: labels.
    method: the attack; beta selects that of TRADES.
    context: the context of a forward pass.

  Returns:
    Adversarial images.
  """
  x_adv = start(x, method)
  for _ in range(method.num_steps):
    x_adv.requires_grad_()
    with context():
      logits = model(x_adv)
      if method.beta is None:
        # Gradients of the weights as well.
        functional.cross_entropy(_wide(logits), y).backward()
        grad = x_adv.grad
      else:
        loss = _divergence(logits, model(x), 'sum')
        grad, = torch.autograd.grad(loss, x_adv)
    assert grad is not None
    x_adv = ascend(x, x_adv, grad, method.step_size)
  if method.beta is None:
    with context():
      model(x_adv)  # compares the restarts
  return x_adv


def _eager_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, method: Method,
    context: Casts, adversary: Adversary) -> Callable[[], torch.Tensor]:
  optimizer = torch.optim.SGD(
      model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
  loss_fn = _train_loss(x, y, method, context, repeats=True)
  perturb = adversary(model, loss_fn, method.gamma) if method.gamma else None

  def step() -> torch.Tensor:
    model.train(method.beta is None)
    x_adv = eager_attack(model, x, y, method, context)
    model.train()
    restore = perturb(x_adv) if perturb else None
    optimizer.zero_grad()
    loss = loss_fn(model, x_adv)
    loss.backward()
    optimizer.step()
    if restore:
      restore()
    if method.beta is None:
      with context():
        model(x)  # natural accuracy
    return loss.detach()

  return step


def tuned_attack(
    run: Any, x: torch.Tensor, y: torch.Tensor, method: Method, context: Casts
) -> torch.Tensor:
  """x' by gradients of the inputs alone.

  Args:
    run: a network whose parameters need no gradient, in the mode to attack.
    x: images.
    y: labels.
    method: the attack; beta selects that of TRADES.
    context: the context of a forward pass.

  Returns:
    Adversarial images.
  """
  natural = None
  if method.beta is not None:
    with torch.no_grad(), context():
      natural = run(x)
  x_adv = start(x, method)
  for _ in range(method.num_steps):
    x_adv.requires_grad_()
    with context():
      logits = run(x_adv)
      if natural is None:
        loss = functional.cross_entropy(_wide(logits), y)
      else:
        loss = _divergence(logits, natural, 'sum')
    grad, = torch.autograd.grad(loss, x_adv)
    x_adv = ascend(x, x_adv, grad, method.step_size)
  return x_adv


def _tuned_step(
    model: nn.Module, run: Any, x: torch.Tensor, y: torch.Tensor,
    method: Method, context: Casts) -> Callable[[], torch.Tensor]:
  params = list(model.parameters())
  weights = [w for w in params if w.ndim > 1]
  optimizer = torch.optim.SGD(
      params, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
  loss_fn = _train_loss(x, y, method, context, repeats=False)

  def perturbation(x_adv: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss_fn(run, x_adv), params)
    moves = [g for w, g in zip(params, grads, strict=True) if w.ndim > 1]
    norms = torch._foreach_norm(weights), torch._foreach_norm(moves)
    return [method.gamma * n / (m + _TINY) * g
            for n, m, g in zip(*norms, moves, strict=True)]

  def step() -> torch.Tensor:
    model.requires_grad_(False)
    model.train(method.beta is None)
    x_adv = tuned_attack(run, x, y, method, context)
    model.requires_grad_(True)
    model.train()
    found = perturbation(x_adv) if method.gamma else []
    with torch.no_grad():
      if found:
        torch._foreach_add_(weights, found)
    optimizer.zero_grad()
    loss = loss_fn(run, x_adv)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      if found:
        torch._foreach_sub_(weights, found)
    return loss.detach()

  return step
