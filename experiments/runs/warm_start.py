"""Initializes weights from a checkpoint: `config.init_from`.

The source is a PyTorch file of one of our networks, or the folder of a run, of
which the best checkpoint is used (its moving average, if it has one). A
classifier with another number of classes is initialized randomly instead.
"""

from typing import Any

import jax
import jax.numpy as jnp

from awp_jax.models import torch_exchange
from experiments.runs import reading
from experiments.util import paths
from experiments.util.errors import user_errors

#: Modules whose shape depends on the number of classes.
CLASSIFIERS = ('fc', 'linear')


@user_errors()
def check(path: str) -> None:
  """Raises ValueError unless `path` is a file or the workdir of a run."""
  place = paths.parse(path)
  with paths.errors(place):
    is_folder = place.is_dir()
    is_run = (place / 'checkpoints' / 'best').is_dir()
  if is_folder:
    if not is_run:
      raise ValueError(
          f'init_from={path!r} is a folder without checkpoints/best: it is not '
          'the workdir of a run.')
  elif paths.is_bucket(place):
    raise ValueError(
        f'init_from={path!r} is not the workdir of a run; a PyTorch file must '
        'be local.')
  elif not place.is_file():
    raise ValueError(
        f'init_from={path!r}: no such file or folder.')


@user_errors()
def read(path: str) -> dict[str, Any]:
  """Reads 'params' and 'batch_stats' from a PyTorch file or a workdir.

  Raises:
    ValueError: if it is unreadable, or of an unsupported network.
  """
  check(path)
  place = paths.parse(path)
  if place.is_dir():
    return reading.read_variables(place, 'best').tree
  state_dict = torch_exchange.read_state_dict(place)
  # The run's config sets the normalization of pixels, not the file.
  model = torch_exchange.model_from_torch(
      state_dict, mean=(0.0,), std=(1.0,))
  return dict(torch_exchange.from_torch(state_dict, model))


def _by_path(tree: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in leaves}


@user_errors()
def graft(variables: Any, found: Any, source: str) -> tuple[Any, list[str]]:
  """Replaces `variables` by `found`, except a classifier of another shape.

  Args:
    variables: randomly initialized variables, a pytree.
    found: variables of another network, with the same names.
    source: where they were read from, for errors.

  Returns:
    The pytree, with the dtypes of `variables`, and the paths not replaced.

  Raises:
    ValueError: if the networks differ in more than the classifier.
  """
  old, new = _by_path(variables), _by_path(found)
  kept = []
  for path in sorted(old.keys() | new.keys()):
    shapes = [
        tuple(tree[path].shape) if path in tree else None
        for tree in (old, new)]
    if shapes[0] == shapes[1]:
      continue
    if None in shapes or not set(path.split('/')) & set(CLASSIFIERS):
      raise ValueError(
          f'init_from={source!r} holds another network: {path} has shape '
          f'{"(absent)" if shapes[1] is None else shapes[1]} there, this run '
          f'needs {"(absent)" if shapes[0] is None else shapes[0]}.')
    kept.append(path)
  if kept:
    # A classifier's kernel and bias belong together.
    module = kept[0].rpartition('/')[0]
    kept = [path for path in old if path.startswith(f'{module}/')]
  leaves = [
      leaf if path in kept else jnp.asarray(new[path], leaf.dtype)
      for path, leaf in old.items()]
  return jax.tree.unflatten(jax.tree.structure(variables), leaves), kept
