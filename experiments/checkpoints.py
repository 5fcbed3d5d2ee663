"""The last and the best state of a run on disk: whole or not at all."""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

#: Sub-folders of a workdir's `checkpoints/`.
KINDS = ('best', 'last')


class CheckpointError(ValueError):
  """There is no checkpoint, or none that this run can go on from."""


class Checkpoints:
  """The newest checkpoint of one kind in a workdir.

  A newer one replaces the older only once it is complete, so that a process
  killed at any moment leaves one to start from.
  """

  def __init__(self, workdir: pathlib.Path, kind: str) -> None:
    """Opens `workdir/checkpoints/<kind>`, which need not exist."""
    self.folder = (workdir / 'checkpoints' / kind).resolve()
    _remove_parts(self.folder)
    self._failed = False
    self._checkpointer = ocp.training.Checkpointer(
        self.folder, cleanup_tmp_directories=True,
        preservation_policy=(
            ocp.training.preservation_policies.LatestN(n=1)))

  def save(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
    """Writes a pytree of arrays and JSON-like notes, and waits until it stands.

    Args:
      step: the number of steps behind this state.
      tree: any pytree of arrays.
      notes: plain values that go with it.
    """
    latest = self._checkpointer.latest
    if latest is not None and latest.step == step:
      return
    try:
      self._checkpointer.save(step, tree, custom_metadata=notes)
    except (OSError, ValueError) as error:  # what a full disk comes as
      self._failed = True
      raise CheckpointError(
          f'the checkpoint of step {step} could not be written to '
          f'{self.folder}: {error}. When that is mended, the same command goes '
          'on from the last complete one.') from error

  def step(self) -> int | None:
    """The step of the checkpoint on disk, or None."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def load(self, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint.

    Args:
      like: a pytree with the structure, shapes and dtypes to expect.

    Returns:
      The pytree, with host arrays placed as in `like`, and the notes.

    Raises:
      CheckpointError: if there is none, or it holds another model's arrays.
    """
    latest = self._checkpointer.latest
    if latest is None:
      raise CheckpointError(f'there is no checkpoint in {self.folder}.')
    metadata = self._checkpointer.metadata(latest)
    _check_same(like, metadata.metadata, self.folder)
    tree = self._checkpointer.load(latest, like)
    return tree, dict(metadata.custom_metadata or {})

  def read(self) -> Any:
    """The checkpoint as nested dicts of arrays, whatever network it is of.

    Raises:
      CheckpointError: if there is none.
    """
    latest = self._checkpointer.latest
    if latest is None:
      raise CheckpointError(f'there is no checkpoint in {self.folder}.')
    # NumPy arrays: those of the devices that wrote it need not be here.
    like = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        self._checkpointer.metadata(latest).metadata,
        is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    return self._checkpointer.load(latest, like)

  def close(self) -> None:
    """Lets go of the folder."""
    if not self._failed:  # else it would raise the failure again
      self._checkpointer.close()


def _remove_parts(folder: pathlib.Path) -> None:
  """Removes what a process killed while deleting an old checkpoint left."""
  for step in folder.glob('[0-9]*'):
    if step.name.isdecimal() and not (step / '_CHECKPOINT_METADATA').exists():
      shutil.rmtree(step)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
      for path, leaf in leaves if hasattr(leaf, 'shape')}


def _check_same(like: Any, stored: Any, folder: pathlib.Path) -> None:
  wanted, found = _shapes(like), _shapes(stored)
  for name in sorted(wanted.keys() | found.keys()):
    if wanted.get(name) != found.get(name):
      raise CheckpointError(
          f'the checkpoint in {folder} is of another model: {name!r} has shape '
          f'{found.get(name, "(absent)")} there, this run needs '
          f'{wanted.get(name, "(absent)")}.')
