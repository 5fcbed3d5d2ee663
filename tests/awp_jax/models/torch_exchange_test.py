"""Weights from and to PyTorch: names, normalization, and equal logits."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.models import PreActResNet, WideResNet
from awp_jax.models.torch_exchange import (
  from_torch,
  model_from_torch,
  normalization,
  read_state_dict,
  to_torch,
  write_state_dict,
)
from tests.helpers.torch_layout import (
  CIFAR,
  GIVEN,
  MODELS,
  assert_same,
  prepared,
  random_variables,
)


@pytest.fixture(scope='module')
def small():
  """A model, its variables and its state dict."""
  model = WideResNet(4, depth=10, width=2)
  variables = random_variables(model)
  return model, variables, to_torch(variables, model)


# Names and shapes.


@pytest.mark.parametrize('name', MODELS)
def test_round_trip_through_a_file_is_exact(name, tmp_path):
  model = MODELS[name]
  variables, state_dict = prepared(name)
  write_state_dict(tmp_path / 'a.pth', state_dict)
  again = read_state_dict(tmp_path / 'a.pth')
  assert list(again) == list(state_dict)
  assert_same(again, state_dict)
  found = model_from_torch(again, **GIVEN.get(name, {}))
  assert found == model
  assert_same(from_torch(again, found), variables)
  assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def test_names_and_layouts_are_those_of_pytorch():
  _, state_dict = prepared('PreActResNet-18')
  shapes = {name: value.shape for name, value in state_dict.items()}
  assert len(shapes) == 107  # as in the AWP authors' PreActResNet18
  assert shapes['conv1.weight'] == (4, 3, 3, 3)
  assert shapes['layer2.0.shortcut.0.weight'] == (8, 4, 1, 1)
  assert shapes['layer2.0.bn1.running_var'] == (4,)
  assert shapes['bn.num_batches_tracked'] == ()
  assert shapes['linear.weight'] == (5, 32)
  assert state_dict['bn.num_batches_tracked'].dtype == np.int64
  variables, _ = prepared('WRN-16-2')
  model = MODELS['WRN-16-2']
  state_dict = to_torch(variables, model, prefix='module.')
  shapes = {name: value.shape for name, value in state_dict.items()}
  assert len(shapes) == 83
  assert shapes['module.block1.layer.0.convShortcut.weight'] == (32, 16, 1, 1)
  assert shapes['module.block3.layer.1.conv2.weight'] == (128, 128, 3, 3)
  assert shapes['module.fc.bias'] == (7,)
  # A kernel keeps its orientation: entry [out, in, row, column].
  kernel = np.arange(16 * 3 * 9, dtype=np.float32).reshape(16, 3, 3, 3)
  state_dict['module.conv1.weight'] = kernel
  ours = from_torch(state_dict, model)['params']['conv1']['kernel']
  assert ours[2, 1, 0, 5] == kernel[5, 0, 2, 1]


@pytest.mark.parametrize('prefix', [
    'module.', 'model.', 'module.model.', '_orig_mod.', '1.'])
def test_prefixes_of_wrappers(small, prefix):
  model, variables, state_dict = small
  wrapped = {prefix + name: value for name, value in state_dict.items()}
  assert model_from_torch(wrapped) == model
  assert_same(from_torch(wrapped, model), variables)
  with pytest.raises(ValueError, match=r"two entries for 'conv1.weight'"):
    from_torch(wrapped | {'conv1.weight': 0}, model)


def test_idle_tensors_are_left_out_and_nothing_else(small):
  model, variables, state_dict = small
  first = {name.replace('block1', 'sub_block1'): value + 1
           for name, value in state_dict.items() if name.startswith('block1')}
  assert len(first) == 13
  idle = first | {'n_averaged': np.asarray(3)}
  without_counters = {name: value for name, value in state_dict.items()
                      if not name.endswith('num_batches_tracked')}
  assert model_from_torch(state_dict | idle) == model
  for extended in (state_dict | idle, without_counters):
    assert_same(from_torch(extended, model), variables)
  with pytest.raises(ValueError, match=r'1 unexpected \(conv9.num_batches'):
    from_torch(state_dict | {'conv9.num_batches_tracked': 0}, model)
  other, (_, fitting) = MODELS['PreActResNet-18'], prepared('PreActResNet-18')
  with pytest.raises(ValueError, match='11 unexpected'):
    from_torch(fitting | first, other)


def test_what_does_not_fit_is_named(small):
  model, variables, state_dict = small
  broken = dict(state_dict)
  del broken['bn1.weight'], broken['block2.layer.0.bn1.running_var']
  broken['fc.scale'] = broken['fc.bias']
  broken['conv1.weight'] = broken['conv1.weight'][:8]
  with pytest.raises(ValueError, match=(
      r'WideResNet-10 of width 2 with 4 classes: '
      r'2 missing \(block2.layer.0.bn1.running_var, bn1.weight\); '
      r'1 unexpected \(fc.scale\); 1 misshapen '
      r'\(conv1.weight \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)\)')):
    from_torch(broken, model)
  with pytest.raises(ValueError, match=(
      r'PreActResNet-18 .*: 89 missing \(bn.running_mean, .*, \.\.\.\); '
      r'39 unexpected \(.*\); 1 misshapen')):
    from_torch(state_dict, PreActResNet(4, width=4))
  with pytest.raises(ValueError, match=r'fc.weight \(4, 128\) instead of'):
    from_torch(state_dict, WideResNet(9, depth=10, width=2))
  with pytest.raises(ValueError, match='14 missing'):
    to_torch({'params': variables['params']}, model)
  for call in (from_torch, to_torch):
    with pytest.raises(TypeError, match='got Dense'):
      call(state_dict, nn.Dense(3))


def test_other_numbers_of_channels_and_types():
  model = WideResNet(2, depth=10, width=1, param_dtype=jnp.bfloat16)
  variables = random_variables(model, channels=1)
  state_dict = to_torch(variables, model)
  assert state_dict['conv1.weight'].shape == (16, 1, 3, 3)
  assert state_dict['conv1.weight'].dtype == jnp.bfloat16
  assert_same(from_torch(state_dict, model), variables)
  wide = {name: value.astype(np.float64) for name, value in state_dict.items()}
  assert_same(from_torch(wide, model), variables)
  with pytest.raises(ValueError, match=r'\(16, 1, 3, 3\) instead of'):
    from_torch(state_dict, WideResNet(2, depth=10, width=1, **CIFAR))


# Which network, which normalization.


@pytest.mark.parametrize('names', [
    ('mu', 'sigma'), ('module.mu', 'module.sigma'), ('mean', 'std'),
    ('normalize.mean', 'normalize.std'), ('0.mean', '0.std')])
def test_normalization_in_the_state_dict(small, names):
  model, variables, state_dict = small
  assert normalization(state_dict) is None
  for name, values in zip(names, CIFAR.values(), strict=True):
    state_dict = state_dict | {
        name: np.asarray(values, np.float32)[None, :, None, None]}
  for got, expected in zip(
      normalization(state_dict), CIFAR.values(), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-7)
  found = model_from_torch(state_dict)
  assert found.mean == normalization(state_dict)[0]
  assert_same(from_torch(state_dict, found), variables)
  assert_same(from_torch(state_dict, model.clone(**CIFAR)), variables)
  with pytest.raises(ValueError, match=r'normalizes with .* \(\(0.49'):
    from_torch(state_dict, model)
  del state_dict[names[0]]
  with pytest.raises(
      ValueError, match=f'one mean and one std, got .*{names[1][-3:]}'):
    normalization(state_dict)


def test_normalization_is_written_on_demand(small):
  _, variables, _ = small
  model = WideResNet(4, depth=10, width=2, mean=(0.5,), std=(0.25,))
  assert normalization(to_torch(variables, model)) is None
  state_dict = to_torch(variables, model, with_normalization=True)
  assert state_dict['mu'].shape == (1, 3, 1, 1)
  assert normalization(state_dict) == ((0.5,) * 3, (0.25,) * 3)


def test_model_from_torch_takes_the_normalization(small):
  _, _, state_dict = small
  assert model_from_torch(state_dict, **CIFAR) == WideResNet(
      4, depth=10, width=2, **CIFAR)
  with pytest.raises(ValueError, match='mean and std must be given together'):
    model_from_torch(state_dict, mean=(0.5,))


def test_networks_that_are_not_ours(small):
  _, _, state_dict = small
  with pytest.raises(ValueError, match=r'no WideResNet has \(1, 1, 2\) blocks'):
    model_from_torch(state_dict | {
        'block3.layer.1.conv1.weight': np.zeros((128, 128, 3, 3))})
  with pytest.raises(ValueError, match='and 24 channels'):
    model_from_torch(
        state_dict | {'block1.layer.0.conv1.weight': np.zeros((24, 16, 3, 3))})
  _, state_dict = prepared('PreActResNet-18')
  with pytest.raises(ValueError, match=r'has \(2, 2, 2, 3\) blocks of .*Block'):
    model_from_torch(
        state_dict | {'layer4.2.conv1.weight': np.zeros((32, 32, 3, 3))})
  with pytest.raises(ValueError, match='must be of a PreActResNet, a ResNet'):
    model_from_torch({name: value for name, value in state_dict.items()
                      if not name.startswith('linear.')})
  _, state_dict = prepared('ResNet-18')
  with pytest.raises(ValueError, match=r'ResNet has \(2, 2, 2, 3\) blocks'):
    model_from_torch(
        state_dict | {'layer4.2.conv1.weight': np.zeros((32, 32, 3, 3))})
  _, state_dict = prepared('DMWideResNet-16-2')
  with pytest.raises(ValueError, match=r'WideResNet has \(2, 2, 3\) blocks'):
    model_from_torch(state_dict | {
        'layer.2.block.2.conv_0.weight': np.zeros((128, 128, 3, 3))}, **CIFAR)
  with pytest.raises(ValueError, match='do not hold mean and std: give both'):
    model_from_torch(state_dict)
  with pytest.raises(ValueError, match='in units of pixels'):
    model_from_torch(state_dict, mean=(125.0,), std=(63.0,))
  _, state_dict = prepared('PreActResNet-18 of Wong')
  with pytest.raises(ValueError, match="give shortcut='plain', as in"):
    model_from_torch(state_dict)


# Against PyTorch, if it is installed.


def torch_logits(torch, tensors, x):
  """Logits of the network of a state dict, in evaluation mode."""
  functional = torch.nn.functional

  def activated(name, x):
    return functional.relu(functional.batch_norm(
        x, *(tensors[f'{name}.{part}'] for part in (
            'running_mean', 'running_var', 'weight', 'bias')), eps=1e-5))

  def conv(name, x, stride=1):
    kernel = tensors[f'{name}.weight']
    return functional.conv2d(
        x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

  wide = 'fc.weight' in tensors
  stages, shortcut, norm, classifier = (
      (('block1.layer', 'block2.layer', 'block3.layer'), 'convShortcut', 'bn1',
       'fc') if wide else
      (('layer1', 'layer2', 'layer3', 'layer4'), 'shortcut.0', 'bn', 'linear'))
  x = conv('conv1', x)
  for number, stage in enumerate(stages):
    i = 0
    while f'{stage}.{i}.conv1.weight' in tensors:
      block = f'{stage}.{i}'
      stride = 2 if number and not i else 1
      deep = f'{block}.conv3.weight' in tensors  # a bottleneck
      out = activated(f'{block}.bn1', x)
      if f'{block}.{shortcut}.weight' in tensors:
        x = conv(f'{block}.{shortcut}', out, stride)
      out = conv(f'{block}.conv1', out, 1 if deep else stride)
      out = conv(f'{block}.conv2', activated(f'{block}.bn2', out),
                 stride if deep else 1)
      if deep:
        out = conv(f'{block}.conv3', activated(f'{block}.bn3', out))
      x = x + out
      i += 1
  features = activated(norm, x).mean((2, 3))
  return functional.linear(
      features, tensors[f'{classifier}.weight'], tensors[f'{classifier}.bias'])


@pytest.mark.torch
@pytest.mark.parametrize('name,legacy', [
    ('PreActResNet-18', True), ('PreActResNet-50', False), ('WRN-10-1', False),
    ('WRN-16-2', True)])
def test_logits_equal_those_of_pytorch(name, legacy, tmp_path):
  torch = pytest.importorskip('torch')
  model = MODELS[name].clone(**CIFAR)
  x = np.random.default_rng(1).uniform(size=(2, 16, 16, 3)).astype(np.float32)
  mean, std = (np.asarray(value, np.float32) for value in CIFAR.values())
  theirs = torch.from_numpy(((x - mean) / std).transpose(0, 3, 1, 2).copy())
  apply = jax.jit(model.apply)

  # From us to PyTorch,
  variables, state_dict = prepared(name)
  write_state_dict(tmp_path / 'ours.pth', state_dict)
  tensors = torch.load(tmp_path / 'ours.pth', weights_only=True)
  np.testing.assert_allclose(
      torch_logits(torch, tensors, theirs).numpy(), apply(variables, x),
      atol=1e-4)

  # and from PyTorch to us, with other weights.
  generator = torch.Generator().manual_seed(3)
  for key, value in tensors.items():
    if value.ndim > 1:
      drawn = torch.randn(value.shape, generator=generator)
      tensors[key] = drawn * value[0].numel() ** -0.5
    elif value.ndim:
      tensors[key] = torch.rand(value.shape, generator=generator) + 0.5
  logits = torch_logits(torch, tensors, theirs).numpy()
  assert np.abs(logits).max() > 0.5
  torch.save(
      {'state_dict': collections.OrderedDict(
          (f'module.{key}', torch.nn.Parameter(value, requires_grad=False))
          for key, value in tensors.items()), 'test_robust_acc': 0.5},
      tmp_path / 'theirs.pth', _use_new_zipfile_serialization=not legacy)
  state_dict = read_state_dict(tmp_path / 'theirs.pth')
  found = model_from_torch(state_dict, **CIFAR)
  assert found == model
  np.testing.assert_allclose(
      apply(from_torch(state_dict, found), x), logits, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize('legacy', [False, True])
def test_tensors_of_every_kind_from_pytorch(legacy, tmp_path):
  torch = pytest.importorskip('torch')
  base = torch.arange(24.0).reshape(4, 6)
  tensors = {
      'half': base.half(), 'bfloat': base.bfloat16(), 'double': base.double(),
      'long': torch.tensor(3), 'bool': base > 4, 'byte': base.byte(),
      'view': base[1:, ::2], 'transposed': base.t(), 'tied': base,
      'empty': torch.zeros(0, 2)}
  torch.save(tensors, tmp_path / 'a.pt',
             _use_new_zipfile_serialization=not legacy)
  got = read_state_dict(tmp_path / 'a.pt')
  assert list(got) == list(tensors)
  for name, value in tensors.items():
    assert str(value.dtype) == f'torch.{got[name].dtype}'
    np.testing.assert_array_equal(
        got[name].astype(np.float64), value.double().numpy())
  write_state_dict(tmp_path / 'b.pt', got)
  back = torch.load(tmp_path / 'b.pt', weights_only=True)
  assert isinstance(back, collections.OrderedDict)
  for name, value in tensors.items():
    assert back[name].dtype == value.dtype and torch.equal(back[name], value)
  if legacy:
    whole = (tmp_path / 'a.pt').read_bytes()
    (tmp_path / 'a.pt').write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r'truncated in storage|damaged'):
      read_state_dict(tmp_path / 'a.pt')


@pytest.mark.torch
def test_pickled_module_is_refused(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save(torch.nn.Linear(2, 3), tmp_path / 'a.pt')
  with pytest.raises(ValueError, match=r'names torch\.nn\..*Linear'):
    read_state_dict(tmp_path / 'a.pt')
