"""The network of a config: ours, or one of another package by name.

A network of another package is a linen, nnx or Equinox module. `Network` gives
all of them the interface of a linen module that the experiments use: `init`,
`apply` and `clone`, with variables 'params' and 'batch_stats'.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import ml_collections

from awp_jax import models
from awp_jax.frameworks import nnx as nnx_frameworks
from awp_jax.frameworks.functions import ModelFunctions
from awp_jax.perturbation.leaves import leaf_paths
from awp_jax.types import Array
from experiments.data import datasets
from experiments.parallel import mapping
from experiments.util import named
from experiments.util.errors import UserError, user_errors

MODELS = ('preact_resnet', 'resnet', 'wide_resnet')

#: Fields of the group `model` that only our networks have.
_OURS = ('depth', 'width', 'activation')


class Network:
  """A module of any framework, with the interface of a linen module.

  Networks with equal settings are equal, so one compiled function serves both.

  Attributes:
    settings: 'dtype' and 'param_dtype', if the module takes them; also
      attributes of the network.
    filter_axis: the axis of the output filters in its weights.
  """

  def __init__(
      self, make_fn: Callable[..., Any], key: Any,
      settings: Mapping[str, Any],
      normalization: tuple[Any, Any] | None) -> None:
    """Makes the module once, to see of which framework it is.

    Args:
      make_fn: (PRNG key, **settings) -> a linen module, an nnx module, an
        Equinox module, or a pair of that and its `eqx.nn.State`.
      key: identifies `make_fn` among equal networks; hashable.
      settings: as above.
      normalization: mean and std per channel, subtracted from the images and
        divided by; None if the module does that or nothing is to be done.

    Raises:
      UserError: if it is none of these.
    """
    self.settings = dict(settings)
    self._make_fn, self._key = make_fn, key
    self._normalization = normalization
    module = make_fn(jax.random.key(0), **self.settings)
    self._linen = module if isinstance(module, nn.Module) else None
    self._functions = None if self._linen else _functions(module)
    self.filter_axis = -1 if isinstance(
        module, nn.Module | nnx.Module) else 0

  def __getattr__(self, name: str) -> Any:
    settings = self.__dict__.get('settings', {})
    if name in settings:
      return settings[name]
    raise AttributeError(name)

  def _identity(self) -> Any:
    return self._key, tuple(
        (name, str(value)) for name, value in sorted(self.settings.items())
    ), self._normalization

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Network) and (
        self._identity() == other._identity())

  def __hash__(self) -> int:
    return hash(self._identity())

  def clone(self, **settings: Any) -> 'Network':
    """The same network with other settings."""
    if all(str(self.settings[name]) == str(value)
           for name, value in settings.items()):
      return self
    return Network(
        self._make_fn, self._key, self.settings | settings,
        self._normalization)

  def _normalized(self, images: Array) -> Array:
    if self._normalization is None:
      return images
    mean, std = (
        jnp.asarray(part, images.dtype) for part in self._normalization)
    return (images - mean) / std

  def init(self, key: Array, images: Array, *, train: bool) -> dict[str, Any]:
    """Random variables: 'params' and, if there are any, 'batch_stats'."""
    if self._linen:
      found: Any = self._linen.init(
          key, self._normalized(images), train=train)
      return {name: found[name] for name in ('params', 'batch_stats')
              if name in found}
    functions = _functions(self._make_fn(key, **self.settings))
    return {'params': _to_dict(functions.params),
            'batch_stats': _to_dict(functions.batch_stats)}

  def apply(
      self, variables: Mapping[str, Any], images: Array, *, train: bool,
      mutable: Any = False, rngs: Mapping[str, Array] | None = None) -> Any:
    """Logits [B, C]; with `mutable`, the pair of them and the statistics."""
    images = self._normalized(images)
    if self._linen:
      return self._linen.apply(
          variables, images, train=train, mutable=mutable,
          rngs=None if rngs is None else dict(rngs))
    functions = self._functions
    assert functions is not None
    logits, moved = functions.forward_fn(
        _from_dict(variables['params'], functions.params),
        _from_dict(variables.get('batch_stats', {}), functions.batch_stats),
        images, train, None if rngs is None else rngs['dropout'])
    return (logits, {'batch_stats': _to_dict(moved)}) if mutable else logits


def _functions(module: Any) -> ModelFunctions:
  """An nnx or Equinox module as functions."""
  if isinstance(module, nnx.Module):
    return nnx_frameworks.as_functions(module)
  try:
    import equinox as eqx
  except ImportError:
    pass
  else:
    from awp_jax.frameworks import equinox as eqx_frameworks

    if isinstance(module, eqx.Module):
      return eqx_frameworks.as_functions(module)
    if isinstance(module, tuple) and len(module) == 2 and isinstance(
        module[0], eqx.Module):
      return eqx_frameworks.as_functions(*module)
  raise UserError(
      'model.name must name a class or function that makes a linen module, an '
      'nnx module or an Equinox module (or a pair of that and its state), got '
      f'{type(module).__name__}.')


def _to_dict(tree: Any) -> dict[str, Any]:
  """A pytree as nested dicts by path, as linen has them."""
  return traverse_util.unflatten_dict(
      dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)), sep='/')


def _from_dict(tree: Mapping[str, Any], like: Any) -> Any:
  """The inverse of `_to_dict`, with the structure of `like`."""
  found = traverse_util.flatten_dict(dict(tree), sep='/')
  return jax.tree.unflatten(
      jax.tree.structure(like), [found[path] for path in leaf_paths(like)])


def build(
    config: ml_collections.ConfigDict, dataset: datasets.Dataset) -> Any:
  """The network of `config.model` for the images and classes of `dataset`.

  Args:
    config: a config with the fields of `experiments/configs/base.py`.
    dataset: the data set.

  Returns:
    A linen module, or a `Network`.

  Raises:
    UserError: for settings that the network does not take.
  """
  if named.is_external(config.model.name):
    return _external(config, dataset)
  if config.model.kwargs:
    raise UserError(
        f'model.kwargs are for networks of other packages, not for '
        f'{config.model.name!r}, got {config.model.kwargs.to_dict()}.')
  make: Any = {
      'preact_resnet': models.PreActResNet, 'resnet': models.ResNet,
      'wide_resnet': models.WideResNet}[config.model.name]
  scale = (dataset.mean, dataset.std) if config.model.normalize else (
      (0.0,), (1.0,))
  with user_errors():
    return make(
        num_classes=dataset.num_classes, depth=config.model.depth,
        width=config.model.width, mean=tuple(scale[0]), std=tuple(scale[1]),
        activation=config.model.activation,
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        axis_name=mapping.AXIS if config.model.sync_batch_norm else None,
        remat=config.model.remat)


def check_name(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for a network that cannot be imported or configured."""
  if not named.is_external(config.model.name):
    return
  name, found, options = _parse(config)
  for field in _OURS:
    # Neither ignoring the field nor passing our default would be clear.
    if named.takes(found, field) and field not in options:
      raise UserError(
          f'model.{field} is for our networks only, and {name!r} has an '
          f'argument {field}: set model.kwargs.{field}.')
  for field, wanted in (
      ('dtype', config.model.dtype != 'float32'),
      ('param_dtype', config.model.param_dtype != 'float32'),
      ('remat', config.model.remat),
      ('axis_name', config.model.sync_batch_norm)):
    if wanted and not named.takes(found, field):
      shown = 'sync_batch_norm' if field == 'axis_name' else field
      raise UserError(
          f'model.{shown}={config.model[shown]!r} needs a network with an '
          f'argument {field}; {name!r} has none.')


def describe(config: ml_collections.ConfigDict) -> str:
  """The network of a config as text, such as 'preact_resnet 18, width 64'."""
  name = config.model.name
  if not named.is_external(name):
    return f'{name} {config.model.depth}, width {config.model.width}'
  return ', '.join([name, *(
      f'{key}={value!r}' for key, value in config.model.kwargs.items())])


def source(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Identifies the code of a network of another package; {} for ours."""
  if not named.is_external(config.model.name):
    return {}
  return {'source': named.digest(_parse(config)[1])}


def _parse(
    config: ml_collections.ConfigDict
) -> tuple[str, Callable[..., Any], dict[str, Any]]:
  """Name, class or function, and options of a network."""
  name, options = named.parse_call(config.model.name, 'model.name')
  kwargs = config.model.kwargs.to_dict()
  if both := sorted(options.keys() & kwargs.keys()):
    raise UserError(
        f'{both[0]} is set in model.name={config.model.name!r} and in '
        'model.kwargs.')
  return name, named.load('model.name', name), options | kwargs


def _external(
    config: ml_collections.ConfigDict, dataset: datasets.Dataset) -> Network:
  name, found, options = _parse(config)
  scale = (tuple(map(float, dataset.mean)), tuple(map(float, dataset.std)))
  if not config.model.normalize:
    scale = (0.0,), (1.0,)
  own = named.takes(found, 'mean') and named.takes(found, 'std')
  # A parameter of only one of these names means something else.
  offered: dict[str, Any] = (
      {'mean': scale[0], 'std': scale[1]} if own else {})
  offered |= {
      'num_classes': dataset.num_classes,
      'image_shape': tuple(dataset.x_train.shape[1:]),
      'axis_name': mapping.AXIS if config.model.sync_batch_norm else None,
      'remat': config.model.remat,
      'config': ml_collections.FrozenConfigDict(config)}

  def make_fn(key: Array, **settings: Any) -> Any:
    keys = {name: make for name, make in (
        ('rngs', nnx.Rngs), ('key', lambda key: key)) if named.takes(
            found, name)}
    return named.call(
        'model.name', found, name, options=options,
        offered=offered | settings | {
            name: make(key) for name, make in keys.items()})

  settings = {
      field: jnp.dtype(config.model[field])
      for field in ('dtype', 'param_dtype') if named.takes(found, field)}
  network = Network(
      make_fn, (name, repr(sorted(options.items())), repr(offered)), settings,
      scale if config.model.normalize and not own else None)
  if network.filter_axis == 0 and config.model.sync_batch_norm:
    raise UserError(
        f'model.sync_batch_norm=True is not for Equinox, got {name!r}: its '
        'layers average over the images of a device.')
  _check_logits(network, name, dataset, config.model.sync_batch_norm)
  return network


def _check_logits(
    network: Network, name: str, dataset: datasets.Dataset, is_synced: bool
) -> None:
  """Traces both modes; raises UserError unless there are logits [B, C]."""
  images = jax.ShapeDtypeStruct(
      (2, *dataset.x_train.shape[1:]), jnp.float32)
  key = jax.random.key(0)
  try:
    variables = jax.eval_shape(
        functools.partial(network.init, train=False), key, images)
    logits = [jax.eval_shape(
        lambda variables, images, key: network.apply(
            variables, images, train=True, mutable=['batch_stats'],
            rngs={'dropout': key})[0], variables, images, key),
              jax.eval_shape(functools.partial(network.apply, train=False),
                             variables, images)]
  except UserError:
    raise
  except Exception as error:
    if is_synced and 'unbound axis' in str(error):
      return  # of the devices, which exists only where the step is mapped
    hint = '' if network.filter_axis else (
        ' An Equinox module with a state is made by eqx.nn.make_with_state, '
        "returns (logits, state), and names the axis of its layers 'batch'.")
    raise UserError(
        f'model.name={name!r}: a pass over images of shape {images.shape} '
        f'failed with {type(error).__name__}: {error} (--debug shows the '
        f'traceback).{hint}') from error
  for path, leaf in traverse_util.flatten_dict(
      variables['params'], sep='/').items():
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise UserError(
          f'model.name={name!r}: parameters must be floating point, but {path} '
          f'is {leaf.dtype}.')
  for found in logits:
    if found.shape != (2, dataset.num_classes):
      raise UserError(
          f'model.name={name!r} must return logits of shape '
          f'(2, {dataset.num_classes}) for two images of shape '
          f'{images.shape[1:]}, got {found.shape}.')
