"""PyTorch names, shapes and layouts of the arrays of our networks."""

from collections.abc import Mapping, Sequence
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp

from awp_jax.models.preact_resnet import PreActResNet
from awp_jax.models.resnet import ResNet
from awp_jax.models.wide_resnet import WideResNet

#: The networks that have PyTorch names.
Network = PreActResNet | ResNet | WideResNet

#: Prefixes of wrappers: DataParallel, torch.compile, RobustBench's and other
#: modules around a network, nn.Sequential(normalization, network).
_WRAPPERS = re.compile(r'^((module|_orig_mod|model|net|1)\.)+')

#: The kernel of the first convolution.
FIRST = ('params', 'conv1', 'kernel')

_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
           'mean': 'running_mean', 'var': 'running_var'}


class Leaf(NamedTuple):
  """An array of our variables that has a PyTorch name.

  Attributes:
    path: its path in the variables, with the collection first.
    shape: in PyTorch's layout.
    dtype: of the array.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: Any


def torch_layout(value: Any) -> Any:
  """Kernels [H, W, in, out] as [out, in, H, W], and [in, out] as [out, in]."""
  return value.transpose((3, 2, 0, 1) if value.ndim == 4 else None)


def flax_layout(value: Any) -> Any:
  """The inverse of `torch_layout`."""
  return value.transpose((2, 3, 1, 0) if value.ndim == 4 else None)


#: Names inside the networks of DeepMind's code, by ours.
_DEEPMIND = {
    WideResNet: {
        'bn1': 'batchnorm_0', 'bn2': 'batchnorm_1', 'conv1': 'conv_0',
        'conv2': 'conv_1'},
    PreActResNet: {
        'bn1': 'batchnorm_0', 'bn2': 'batchnorm_1', 'conv1': 'conv_2d_1',
        'conv2': 'conv_2d_2'}}
_DEEPMIND_TOP = {
    WideResNet: {'conv1': 'init_conv', 'bn1': 'batchnorm', 'fc': 'logits'},
    PreActResNet: {'conv1': 'conv_2d', 'bn': 'batchnorm', 'linear': 'logits'}}


def is_deepmind(model: Network) -> bool:
  """Whether a model is one of DeepMind's code, with its names.

  Raises:
    ValueError: for a PreActResNet that is like theirs in some ways only, which
      has no names.
  """
  after = getattr(model, 'padding', '') == 'after'
  if isinstance(model, PreActResNet):
    theirs = after, model.shortcut == 'plain3'
    if any(theirs) and not (
        all(theirs) and model.final_norm and model.depth in (18, 34)):
      raise ValueError(
          "a PreActResNet has PyTorch names with padding='after' and "
          "shortcut='plain3' of depth 18 or 34, or with neither, got "
          f'padding={model.padding!r}, shortcut={model.shortcut!r}, depth '
          f'{model.depth}.')
  return after


def _deepmind_modules(model: Network, modules: Sequence[str]) -> list[str]:
  """'layer.0.block.3', 'conv_0' of 'block1_3', 'conv1', for instance."""
  kind = WideResNet if isinstance(model, WideResNet) else PreActResNet
  if len(modules) == 1:
    return [_DEEPMIND_TOP[kind].get(name, name) for name in modules]
  block, name = modules
  match = re.fullmatch(r'(?:block|layer)(\d)_(\d+)', block)
  assert match is not None
  stage = int(match[1]) - 1
  place = (f'layer.{stage}.block.{match[2]}' if kind is WideResNet
           else f'layer_{stage}.{match[2]}')
  return [place, _DEEPMIND[kind].get(name, name)]


def torch_name(path: Sequence[str], model: Network) -> str:
  """'layer1.0.conv1.weight' of ('params', 'layer1_0', 'conv1', 'kernel')."""
  _, *modules, leaf = path
  if is_deepmind(model):
    modules = _deepmind_modules(model, modules)
    return '.'.join([*modules, _LEAVES.get(leaf, leaf)])
  name = '.'.join([*modules, _LEAVES.get(leaf, leaf)])
  if name.startswith('block'):
    # In a WideResNet each stage is a module with a list of blocks.
    name = name.replace('.shortcut.', '.convShortcut.')
    return re.sub(r'^block(\d)_(\d+)', r'block\1.layer.\2', name)
  name = name.replace('.shortcut.', '.shortcut.0.')
  name = name.replace('.shortcut_bn.', '.shortcut.1.')
  return re.sub(r'^layer(\d)_(\d+)', r'layer\1.\2', name)


def _first(names: Sequence[str]) -> str:
  return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _check_fit(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, Leaf],
    model: Network) -> None:
  """Raises one ValueError for all missing, unexpected and misshapen names."""
  missing = [name for name in expected if name not in shapes]
  unexpected = [name for name in shapes if name not in expected]
  misshapen = [
      f'{name} {shapes[name]} instead of {leaf.shape}'
      for name, leaf in expected.items()
      if name in shapes and shapes[name] != leaf.shape]
  problems = [
      f'{len(names)} {what} ({_first(names)})' for what, names in (
          ('missing', missing), ('unexpected', unexpected),
          ('misshapen', misshapen)) if names]
  if problems:
    raise ValueError(
        f'the weights do not fit {type(model).__name__}-{model.depth} of width '
        f'{model.width} with {model.num_classes} classes: '
        f'{"; ".join(problems)}.')


def leaves(
    model: Network, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Leaf]:
  """All arrays of a model, after a check that names and shapes fit.

  Args:
    model: a PreActResNet, ResNet or WideResNet.
    shapes: PyTorch names -> shapes to check against the model. They also
      determine the number of image channels.

  Returns:
    PyTorch names -> arrays.

  Raises:
    TypeError: for another model.
    ValueError: one for all missing, unexpected and misshapen names.
  """
  if not isinstance(model, Network):
    raise TypeError(
        'the model must be a PreActResNet, a ResNet or a WideResNet, got '
        f'{type(model).__name__}.')
  first = shapes.get(torch_name(FIRST, model), ())
  channels = first[1] if len(first) == 4 else 3
  if len(model.mean) > 1:
    channels = len(model.mean)
  images = jnp.zeros((1, 8, 8, channels))
  variables = jax.eval_shape(
      lambda key: model.init(key, images), jax.random.key(0))
  expected = {}
  for path, value in traverse_util.flatten_dict(variables).items():
    shape = jax.eval_shape(torch_layout, value).shape
    expected[torch_name(path, model)] = Leaf(path, shape, value.dtype)
  _check_fit(shapes, expected, model)
  return expected


def plain_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The same entries without the prefixes of wrappers.

  Args:
    state_dict: names like 'module.conv1.weight' or 'model.conv1.weight';
      'conv1.weight' stays unchanged.

  Returns:
    A dictionary in the same order.

  Raises:
    ValueError: if two names become equal.
  """
  plain: dict[str, Any] = {}
  for name, value in state_dict.items():
    short = _WRAPPERS.sub('', name)
    if short in plain:
      raise ValueError(f'the state dict has two entries for {short!r}.')
    plain[short] = value
  return plain
