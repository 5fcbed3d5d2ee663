"""Converts PyTorch state dicts to Flax variables, and back."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from awp_jax.models.torch_exchange import naming
from awp_jax.models.torch_exchange.naming import Network
from awp_jax.models.wide_resnet import WideResNet

#: Names of the buffers of mean and standard deviation, by wrapper.
_NORMALIZATION = tuple(
    (f'{prefix}{mean}', f'{prefix}{std}')
    for prefix in ('', 'normalize.', 'normalizer.', '0.')
    for mean, std in (('mu', 'sigma'), ('mean', 'std')))

_COUNTER = 'num_batches_tracked'


def _used_tensors(
    state_dict: Mapping[str, Any], model: Network) -> dict[str, Any]:
  """The tensors that affect the logits, by names without wrappers."""
  plain = naming.plain_names(state_dict)

  def is_unused(name: str) -> bool:
    module, _, leaf = name.rpartition('.')
    return (
        any(name in pair for pair in _NORMALIZATION)
        # Counters of batch normalization and of torch's AveragedModel.
        or (leaf == _COUNTER and f'{module}.running_mean' in plain)
        or name == 'n_averaged'
        or (isinstance(model, WideResNet) and name.startswith('sub_block1.')))

  return {name: np.asarray(value) for name, value in plain.items()
          if not is_unused(name)}


def normalization(
    state_dict: Mapping[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
  """Mean and standard deviation by channel, if the state dict has them.

  They are buffers of the network or of a layer before it: `mu` and `sigma`,
  `mean` and `std`, `normalize.mean` and `normalize.std`. Most published files
  have none; see `awp_jax.models.torch_exchange`.

  Args:
    state_dict: PyTorch names -> arrays.

  Returns:
    (mean, std), as the models take them, or None.

  Raises:
    ValueError: unless there is exactly one mean and one standard deviation.
  """
  state_dict = naming.plain_names(state_dict)
  found = [pair for pair in _NORMALIZATION
           if any(name in state_dict for name in pair)]
  if not found:
    return None
  names = [name for pair in found for name in pair if name in state_dict]
  if len(names) != 2:
    raise ValueError(
        'the normalization must be one mean and one std, got '
        f'{", ".join(names)}.')
  mean, std = (
      tuple(np.asarray(state_dict[name], np.float64).ravel().tolist())
      for name in names)
  return mean, std


def _check_normalization(
    state_dict: Mapping[str, Any], model: Network) -> None:
  """Raises ValueError if state dict and model normalize differently."""
  stored = normalization(state_dict)
  if stored is None:
    return
  ours = (model.mean, model.std)
  for got, expected in zip(ours, stored, strict=True):
    if len(got) not in (1, len(expected)) or not np.allclose(
        got, expected, rtol=1e-5, atol=1e-6):
      raise ValueError(
          f'the state dict normalizes with mean and std {stored}, the model '
          f'with {ours}.')


def from_torch(
    state_dict: Mapping[str, Any], model: Network) -> dict[str, Any]:
  """Converts a PyTorch state dict to the variables of one of our networks.

  Only tensors that do not affect the logits are dropped: batch counters,
  `sub_block1`, and buffers of mean and standard deviation. Running variances
  are copied unchanged. PyTorch averages the unbiased variance of a batch and
  Flax the biased one, which matters in training, not in evaluation.

  Args:
    state_dict: PyTorch names, with or without prefixes such as 'module.', ->
      arrays, as `read_state_dict` returns them.
    model: one of our networks; see `model_from_torch`.

  Returns:
    {'params': ..., 'batch_stats': ...} of jax arrays, cast to the model's types
    of parameters and statistics.

  Raises:
    TypeError: for another model.
    ValueError: if names or shapes do not fit, or if the normalization in the
      state dict differs from the model's.
  """
  tensors = _used_tensors(state_dict, model)
  leaves = naming.leaves(
      model, {name: value.shape for name, value in tensors.items()})
  _check_normalization(state_dict, model)
  return traverse_util.unflatten_dict({
      leaf.path: jnp.asarray(
          naming.flax_layout(tensors[name]), leaf.dtype)
      for name, leaf in leaves.items()})


def to_torch(
    variables: Mapping[str, Any], model: Network, *, prefix: str = '',
    with_normalization: bool = False
) -> dict[str, np.ndarray]:
  """Converts the variables of one of our networks to a PyTorch state dict.

  Args:
    variables: {'params': ..., 'batch_stats': ...}.
    model: their network.
    prefix: prefix of each name: 'module.' for a network in DataParallel, as
      the AWP authors' scripts load it.
    with_normalization: whether to add the model's mean and std as RobustBench's
      buffers `mu` and `sigma`. Networks without these buffers then need
      `strict=False` to load.

  Returns:
    PyTorch names -> arrays of the variables' types, in PyTorch's layout.
    `num_batches_tracked`, which Flax does not count, is 0.

  Raises:
    TypeError: for another model.
    ValueError: if the variables are not the model's.
  """
  ours = {
      naming.torch_name(path, model): naming.torch_layout(np.asarray(value))
      for path, value in traverse_util.flatten_dict({
          name: variables.get(name, {}) for name in ('params', 'batch_stats')
      }).items()}
  leaves = naming.leaves(
      model, {name: value.shape for name, value in ours.items()})
  state_dict = {}
  for name in leaves:
    state_dict[name] = np.array(ours[name], order='C')
    if name.endswith('.running_var'):
      counter = name.replace('running_var', _COUNTER)
      state_dict[counter] = np.zeros((), np.int64)
  if with_normalization:
    shape = (1, ours[naming.torch_name(naming.FIRST, model)].shape[1], 1, 1)
    for name, values in (('mu', model.mean), ('sigma', model.std)):
      by_channel = np.asarray(values, np.float32)[:, None, None]
      state_dict[name] = np.broadcast_to(by_channel, shape).copy()
  return {prefix + name: value for name, value in state_dict.items()}
