"""Networks of DeepMind's code, of Wong et al., and ResNets, against PyTorch.

The names are those of RobustBench. The passes are written out here with
PyTorch's functions. At 9 x 9 pixels padding on one side differs from 'SAME'.
"""

import jax
import numpy as np
import pytest

from awp_jax.models import PreActResNet, ResNet, WideResNet
from awp_jax.models.torch_exchange import (
    from_torch,
    model_from_torch,
    to_torch,
)
from tests.helpers.torch_layout import (
    CIFAR,
    GIVEN,
    MODELS,
    assert_same,
    prepared,
    random_variables,
)


class Passes:
  """Passes over a state dict, in evaluation mode."""

  def __init__(self, torch, tensors):
    self.torch, self.f = torch, torch.nn.functional
    self.tensors = tensors

  def has(self, name):
    return f'{name}.weight' in self.tensors

  def norm(self, name, x):
    return self.f.batch_norm(
        x, *(self.tensors[f'{name}.{part}'] for part in (
            'running_mean', 'running_var', 'weight', 'bias')), eps=1e-5)

  def conv(self, name, x, stride=1, padding=None):
    kernel = self.tensors[f'{name}.weight']
    if padding is None:
      padding = kernel.shape[-1] // 2
    return self.f.conv2d(x, kernel, stride=stride, padding=padding)

  def padded_conv(self, name, x, stride):
    """As DeepMind's code pads: (1, 1) at stride 1, (0, 1) at stride 2."""
    sides = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
    return self.conv(name, self.f.pad(x, sides), stride, padding=0)

  def classify(self, name, x):
    return self.f.linear(
        x.mean((2, 3)), *(self.tensors[f'{name}.{part}']
                          for part in ('weight', 'bias')))

  def blocks(self, stages):
    """(name, stride) of each block."""
    for number, stage in enumerate(stages):
      i = 0
      while any(name.startswith(f'{stage}.{i}.') for name in self.tensors):
        yield f'{stage}.{i}', 2 if number and not i else 1
        i += 1

  def dm_wide(self, x):
    x = self.conv('init_conv', x)
    for block, stride in self.blocks([f'layer.{i}.block' for i in range(3)]):
      out = self.f.silu(self.norm(f'{block}.batchnorm_0', x))
      if self.has(f'{block}.shortcut'):
        x = self.conv(f'{block}.shortcut', out, stride)
      out = self.padded_conv(f'{block}.conv_0', out, stride)
      out = self.f.silu(self.norm(f'{block}.batchnorm_1', out))
      x = x + self.conv(f'{block}.conv_1', out)
    return self.classify('logits', self.f.silu(self.norm('batchnorm', x)))

  def dm_preact(self, x):
    x = self.conv('conv_2d', x)
    for block, stride in self.blocks([f'layer_{i}' for i in range(4)]):
      out = self.f.silu(self.norm(f'{block}.batchnorm_0', x))
      if self.has(f'{block}.shortcut'):  # of the block's input
        x = self.padded_conv(f'{block}.shortcut', x, stride)
      out = self.padded_conv(f'{block}.conv_2d_1', out, stride)
      out = self.f.silu(self.norm(f'{block}.batchnorm_1', out))
      x = x + self.conv(f'{block}.conv_2d_2', out)
    return self.classify('logits', self.f.silu(self.norm('batchnorm', x)))

  def wong(self, x):
    x = self.conv('conv1', x)
    for block, stride in self.blocks([f'layer{i}' for i in (1, 2, 3, 4)]):
      out = self.f.relu(self.norm(f'{block}.bn1', x))
      if self.has(f'{block}.shortcut.0'):
        x = self.conv(f'{block}.shortcut.0', x, stride)
      out = self.conv(f'{block}.conv1', out, stride)
      x = x + self.conv(
          f'{block}.conv2', self.f.relu(self.norm(f'{block}.bn2', out)))
    return self.classify('linear', x)

  def resnet(self, x):
    x = self.f.relu(self.norm('bn1', self.conv('conv1', x)))
    for block, stride in self.blocks([f'layer{i}' for i in (1, 2, 3, 4)]):
      deep = self.has(f'{block}.conv3')
      out = self.norm(
          f'{block}.bn1', self.conv(f'{block}.conv1', x, 1 if deep else stride))
      out = self.norm(f'{block}.bn2', self.conv(
          f'{block}.conv2', self.f.relu(out), stride if deep else 1))
      if deep:
        out = self.norm(
            f'{block}.bn3', self.conv(f'{block}.conv3', self.f.relu(out)))
      if self.has(f'{block}.shortcut.0'):
        x = self.norm(f'{block}.shortcut.1', self.conv(
            f'{block}.shortcut.0', x, stride))
      x = self.f.relu(out + x)
    return self.classify('linear', x)


PASSES = {
    'PreActResNet-18 of Wong': Passes.wong, 'DMPreActResNet-18':
    Passes.dm_preact, 'DMWideResNet-16-2': Passes.dm_wide,
    'ResNet-18': Passes.resnet, 'ResNet-50': Passes.resnet}


@pytest.mark.torch
@pytest.mark.parametrize('name, side', [
    # Odd sides do not fit the shortcuts of DMWideResNet.
    *((name, 16) for name in PASSES), ('DMPreActResNet-18', 9),
    ('ResNet-18', 9)])
def test_logits_equal_those_of_pytorch(name, side):
  """Of random PyTorch weights, to 1e-5 of the largest logit."""
  torch = pytest.importorskip('torch')
  _, state_dict = prepared(name)
  generator = torch.Generator().manual_seed(3)
  tensors = {}
  for key, value in state_dict.items():
    if value.ndim > 1:
      drawn = torch.randn(value.shape, generator=generator)
      tensors[key] = drawn * value[0].size ** -0.5
    else:
      tensors[key] = torch.rand(value.shape, generator=generator) + 0.5
  x = np.random.default_rng(1).uniform(
      size=(2, side, side, 3)).astype(np.float32)
  mean, std = (np.asarray(value, np.float32) for value in CIFAR.values())
  theirs = torch.from_numpy(((x - mean) / std).transpose(0, 3, 1, 2).copy())
  logits = PASSES[name](Passes(torch, tensors), theirs).numpy()
  arrays = {key: value.numpy() for key, value in tensors.items()}
  found = model_from_torch(arrays, **{**GIVEN.get(name, {}), **CIFAR})
  assert found == MODELS[name].clone(**CIFAR)
  ours = np.asarray(jax.jit(found.apply)(from_torch(arrays, found), x))
  scale = np.abs(logits).max()
  assert scale > 0.1
  np.testing.assert_allclose(ours / scale, logits / scale, atol=1e-5)


def test_names_are_those_of_robustbench():
  names = {name: set(prepared(name)[1]) for name in PASSES}
  assert {'init_conv.weight', 'layer.0.block.0.batchnorm_0.running_var',
          'layer.1.block.0.shortcut.weight', 'layer.2.block.1.conv_1.weight',
          'batchnorm.bias', 'logits.bias'} < names['DMWideResNet-16-2']
  assert {'conv_2d.weight', 'layer_3.1.conv_2d_2.weight',
          'layer_1.0.shortcut.weight', 'layer_0.0.batchnorm_1.weight',
          'batchnorm.weight', 'logits.weight'} < names['DMPreActResNet-18']
  assert {'bn1.weight', 'layer2.0.shortcut.0.weight',
          'layer2.0.shortcut.1.running_mean', 'layer4.2.conv3.weight',
          'linear.weight'} < names['ResNet-50']
  assert 'bn.weight' not in names['PreActResNet-18 of Wong']
  shapes = {key: value.shape
            for key, value in prepared('DMPreActResNet-18')[1].items()}
  assert shapes['layer_1.0.shortcut.weight'] == (8, 4, 3, 3)


@pytest.mark.parametrize('make, shown', [
    (lambda: ResNet(3, depth=20), 'depth must be one of'),
    (lambda: WideResNet(3, depth=10, padding='same'),
     "padding must be one of 'around', 'after', got 'same'"),
    (lambda: PreActResNet(3, padding=''), 'padding must be one of'),
    (lambda: PreActResNet(3, shortcut='none'), 'shortcut must be one of'),
    (lambda: ResNet(3, activation='gelu'), 'activation must be one of')])
def test_wrong_settings(make, shown):
  with pytest.raises(ValueError, match=shown):
    make()


@pytest.mark.parametrize('given', [
    {'shortcut': 'normalized', 'final_norm': False},
    {'shortcut': 'plain', 'final_norm': True},
    {'shortcut': 'plain', 'final_norm': False},
    {'activation': 'silu'}])
def test_what_names_do_not_determine_can_be_given(given):
  model = PreActResNet(5, width=4, **given)
  variables = random_variables(model)
  state_dict = to_torch(variables, model)
  known = {key: value for key, value in given.items() if key != 'final_norm'}
  assert model_from_torch(state_dict, **known) == model
  assert_same(from_torch(state_dict, model), variables)


def test_a_shortcut_of_another_network_is_refused():
  _, state_dict = prepared('ResNet-18')
  with pytest.raises(ValueError, match='is for a PreActResNet'):
    model_from_torch(state_dict, shortcut='plain')


@pytest.mark.parametrize('settings', [
    {'padding': 'after'}, {'shortcut': 'plain3'},
    {'padding': 'after', 'shortcut': 'plain3', 'depth': 50},
    {'padding': 'after', 'shortcut': 'plain3', 'final_norm': False}])
def test_networks_without_pytorch_names(settings):
  model = PreActResNet(5, width=4, **settings)
  with pytest.raises(ValueError, match='has PyTorch names with'):
    to_torch(random_variables(model), model)


def test_rematerialized_resnet():
  model, variables = MODELS['ResNet-18'], prepared('ResNet-18')[0]
  x = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)

  def loss(network):
    return lambda params: network.apply(
        {**variables, 'params': params}, x, train=True,
        mutable=['batch_stats'])[0].sum()

  plain, again = (jax.jit(jax.grad(loss(network)))(variables['params'])
                  for network in (model, model.clone(remat=True)))
  for one, two in zip(
      jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)
