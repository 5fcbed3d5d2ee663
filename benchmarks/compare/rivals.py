"""The PyTorch side: the released code, and steps written for speed."""

from collections.abc import Callable
import copy
import importlib.util
import pathlib
from typing import Any

import torch
import torch_preact_resnet
import torch_train_step
from torch_train_step import Method

from benchmarks.compare import cases
from benchmarks.compare.cases import Case

NETWORK = 'AT_AWP/preactresnet.py'
ADVERSARIES = {
    'at': 'AT_AWP/utils_awp.py', 'at-awp': 'AT_AWP/utils_awp.py',
    'trades-awp': 'trades_AWP/utils_awp.py'}


def _module(path: pathlib.Path) -> Any:
  """Imports one file of the released code; two have the same name."""
  spec = importlib.util.spec_from_file_location(
      f'released_{path.parent.name}_{path.stem}', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def released_adversary(
    folder: pathlib.Path, case: Case, x: torch.Tensor,
    y: torch.Tensor) -> torch_train_step.Adversary:
  """The released weight adversary of a task, for any network."""
  module = _module(folder / ADVERSARIES[case.task])
  beta = case.setting.beta

  def make(
      model: torch.nn.Module, loss_fn: Any, gamma: float
  ) -> Callable[[torch.Tensor], Callable[[], None]]:
    del loss_fn  # the released classes have their own
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    kind = module.AdvWeightPerturb if beta is None else module.TradesAWP
    found = kind(model, proxy, optimizer, gamma)

    def perturb(x_adv: torch.Tensor) -> Callable[[], None]:
      inputs: dict[str, Any] = {'inputs_adv': x_adv, 'targets': y}
      if beta is not None:
        inputs |= {'inputs_clean': x, 'beta': beta}
      move = found.calc_awp(**inputs)
      found.perturb(move)
      return lambda: found.restore(move)

    return perturb

  return make


def evaluation(
    variant: str, model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor,
    method: Method, precision: str) -> Callable[[], torch.Tensor]:
  """Prepares PGD in eval mode.

  Args:
    variant: 'tuned', 'compiled', or 'eager', which computes gradients of the
      weights in the attack and a pass that compares the restarts.
    model: the network.
    x: images [B, 3, H, W].
    y: labels [B].
    method: the attack.
    precision: bfloat16 runs under autocast.

  Returns:
    A function that returns which images are classified correctly at x and at
    x', [2, B].
  """
  model.eval()
  context = torch_train_step.casts(x, precision)
  if variant != 'eager':
    model = model.to(memory_format=torch.channels_last).requires_grad_(False)
    x = x.to(memory_format=torch.channels_last)
  run: Any = torch.compile(model) if variant == 'compiled' else model

  def attack() -> torch.Tensor:
    if variant == 'eager':
      return torch_train_step.eager_attack(model, x, y, method, context)
    return torch_train_step.tuned_attack(run, x, y, method, context)

  def evaluate() -> torch.Tensor:
    x_adv = attack()
    with torch.no_grad(), context():
      return torch.stack([
          run(images).argmax(1) == y for images in (x, x_adv.detach())])

  return evaluate


def prepare(
    case: Case, implementation: str,
    folder: str | None) -> dict[str, Callable[[], None]]:
  """The call to time; a value is fetched, so it is complete."""
  torch.manual_seed(0)
  x = torch.rand(case.batch_size, 3, case.image_size, case.image_size)
  y = torch.randint(0, 10, (case.batch_size,))
  method, adversary = Method(*case.setting), None
  if implementation == cases.RELEASED:
    assert folder is not None
    variant, path = 'eager', pathlib.Path(folder)
    model = _module(path / NETWORK).PreActResNet18()
    if method.gamma:
      adversary = released_adversary(path, case, x, y)
  else:
    variant = implementation.removeprefix('torch-')
    model = torch_preact_resnet.PreActResNet(10, case.width)
  if case.task in cases.TRAINING:
    step = torch_train_step.make_step(
        variant, model, x, y, method, case.precision, adversary)
  else:
    step = evaluation(variant, model, x, y, method, case.precision)
  return {case.task: lambda: step().tolist()}
