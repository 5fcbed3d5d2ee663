"""Checkpoints of the last and the best state of a run, written atomically.

The trainer saves and cleans up through `Checkpoints`, in all of its processes
together; files are written in the background, while training goes on. All
other code reads through `Reader`, which changes nothing in the folder, so a run
can be evaluated while it trains.
"""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.parallel import processes
from experiments.runs import mirrors
from experiments.util import paths
from experiments.util.errors import UserError

#: Sub-folders of a workdir's `checkpoints/`.
KINDS = ('best', 'last')

#: A local step without this file is incomplete or partly removed.
_COMPLETE = '_CHECKPOINT_METADATA'


class CheckpointError(UserError):
  """There is no checkpoint that this run can resume from."""


class Checkpoints:
  """The newest checkpoint of one kind in a workdir, for its trainer.

  Opening it removes the incomplete checkpoints of a killed trainer. A new
  checkpoint replaces the old one only once it is complete, so a process killed
  at any moment leaves a valid one.
  """

  def __init__(self, workdir: paths.Path, kind: str) -> None:
    """Opens `workdir/checkpoints/<kind>`, which need not exist."""
    self.folder = paths.absolute(workdir / 'checkpoints' / kind)
    self._mirror = (
        mirrors.Mirror(self.folder) if mirrors.is_needed(self.folder) else None)
    processes.on_main(lambda: _remove_parts(self.folder))
    self._failed = False
    self._pending: tuple[int, Any] | None = None
    self._checkpointer = ocp.training.Checkpointer(
        self._mirror.local if self._mirror else self.folder,
        cleanup_tmp_directories=True,
        preservation_policy=(
            ocp.training.preservation_policies.LatestN(n=1)))

  def save(self, step: int, tree: Any, notes: dict[str, Any]) -> None:
    """Starts to write a pytree of arrays and JSON-like notes.

    Returns once the arrays are copied, so the caller may donate them. They are
    written in the background; `finish`, and all other methods, wait for it.

    Args:
      step: number of completed steps.
      tree: any pytree of arrays.
      notes: plain values stored with it.

    Raises:
      CheckpointError: if the previous checkpoint could not be written, or this
        one cannot be started.
    """
    self.finish()
    if self._latest() == step:
      return
    with self._writing(step):
      response = self._checkpointer.save_async(
          step, tree, custom_metadata=notes)
      if response is None:
        raise ValueError(f'orbax skipped it, after step {self._latest()}')
      self._pending = step, response
    if self._mirror:  # uploads only what is complete
      self.finish()

  def finish(self) -> None:
    """Waits until the checkpoint is complete on the disk.

    Raises:
      CheckpointError: if it could not be written.
    """
    if self._pending is None:
      return
    (step, response), self._pending = self._pending, None
    with self._writing(step):
      response.result()
      if self._mirror:
        self._mirror.upload(step)

  @contextlib.contextmanager
  def _writing(self, step: int) -> Iterator[None]:
    """Raises what a disk or bucket refuses as one clear error."""
    try:
      with paths.errors(self.folder):
        yield
    except (OSError, ValueError) as error:  # raised for a full disk
      self._failed = True
      raise CheckpointError(
          f'the checkpoint of step {step} could not be written to '
          f'{self.folder}: {error}. Once this is fixed, the same command '
          'resumes from the last complete checkpoint.') from error

  def step(self) -> int | None:
    """The step of the checkpoint on disk, or None."""
    self.finish()
    return self._latest()

  def _latest(self) -> int | None:
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def load(self, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads the checkpoint.

    Args:
      like: a pytree with the expected structure, shapes and dtypes.

    Returns:
      The pytree, with arrays placed as in `like`, and the notes.

    Raises:
      CheckpointError: if there is none, or its arrays are of another model.
    """
    self.finish()
    latest = self._checkpointer.latest
    if latest is None:
      raise CheckpointError(f'there is no checkpoint in {self.folder}.')
    metadata = self._checkpointer.metadata(latest)
    check_same(like, metadata.metadata, self.folder)
    tree = self._checkpointer.load(latest, like)
    return tree, dict(metadata.custom_metadata or {})

  def close(self) -> None:
    """Finishes, and closes the checkpointer.

    Raises:
      CheckpointError: as `finish`.
    """
    try:
      self.finish()
    finally:
      if not self._failed:  # otherwise it would raise the failure again
        self._checkpointer.close()
      if self._mirror:
        self._mirror.close()


class Stored(NamedTuple):
  """A checkpoint that was read.

  Attributes:
    step: number of completed steps.
    tree: nested dicts and lists of NumPy arrays.
    notes: the plain values stored with it.
  """

  step: int
  tree: Any
  notes: dict[str, Any]


class Reader:
  """Reads the newest complete checkpoint of one kind.

  The trainer may save at the same time, in another process. Do not read in the
  process that is saving: orbax numbers its operations per process, so the save
  could hang. Nothing is written, removed or locked.
  """

  def __init__(self, workdir: paths.Path, kind: str) -> None:
    """Sets the folder `workdir/checkpoints/<kind>`, which need not exist."""
    self.folder = paths.absolute(workdir / 'checkpoints' / kind)

  def step(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    listed = None
    while True:
      before, listed = listed, sorted(
          int(step.name) for step in self.folder.glob('[0-9]*')
          if step.name.isdecimal())
      complete = [n for n in listed if _is_complete(self.folder / str(n))]
      # All that were listed may have been replaced since.
      if complete or listed == before:
        return max(complete, default=None)

  def notes(self) -> dict[str, Any]:
    """The notes of the newest checkpoint; {} if there is none."""
    return {} if self.step() is None else self._newest(_notes)

  def read(self) -> Stored:
    """Reads the newest complete checkpoint, of any network.

    Raises:
      CheckpointError: if there is none, or it cannot be read.
    """
    return self._newest(_read)

  def _newest(self, read: Callable[[paths.Path], Any]) -> Any:
    """Calls `read` until the checkpoint is still the newest afterwards.

    The trainer removes a checkpoint as soon as a newer one is complete, so a
    concurrent read may be partial.
    """
    step = self.step()
    while step is not None:
      found, failure = None, None
      try:
        found = read(self.folder / str(step))
      except Exception as error:
        failure = error
      before, step = step, self.step()
      if step == before:
        if failure is None:
          return found
        raise CheckpointError(
            f'the checkpoint of step {step} in {self.folder} cannot be read: '
            f'{failure}') from failure
    raise CheckpointError(f'there is no checkpoint in {self.folder}.')


def _alone() -> ocp.Context:
  """The context for reading in one process, without waiting for others."""
  own, context = processes.index(), ocp.Context()
  context.multiprocessing.primary_host = own
  context.multiprocessing.active_processes = {own}
  context.multiprocessing.barrier_sync_key_prefix = f'reader-{own}'
  return context


def _notes(path: paths.Path) -> dict[str, Any]:
  with _alone(), mirrors.readable(path) as place:
    return dict(ocp.metadata(place).custom_metadata or {})


def _read(path: paths.Path) -> Stored:
  # As NumPy arrays: the devices that wrote them may not exist here.
  with _alone(), mirrors.readable(path) as place:
    metadata = ocp.metadata(place)
    like = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        metadata.metadata, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    return Stored(
        int(path.name), ocp.load(place, like),
        dict(metadata.custom_metadata or {}))


def read_variables(workdir: paths.Path, kind: str) -> Stored:
  """Reads the weights to evaluate: the moving average, if there is one.

  Args:
    workdir: folder of a run, which may be training.
    kind: 'best' or 'last'.

  Returns:
    The checkpoint, with its tree reduced to 'params' and 'batch_stats'.

  Raises:
    CheckpointError: if there is none, or it cannot be read.
  """
  stored = Reader(workdir, kind).read()
  network = stored.tree.get('average') or stored.tree
  return stored._replace(tree={
      'params': network['params'],
      'batch_stats': network.get('batch_stats') or {}})


def check_same(like: Any, stored: Any, folder: paths.Path) -> None:
  """Raises CheckpointError unless both have the same names and shapes."""
  wanted, found = _shapes(like), _shapes(stored)
  for name in sorted(wanted.keys() | found.keys()):
    if wanted.get(name) != found.get(name):
      raise CheckpointError(
          f'the checkpoint in {folder} is of another model: {name!r} has shape '
          f'{found.get(name, "(absent)")} there, this run needs '
          f'{wanted.get(name, "(absent)")}.')


def _is_complete(step: paths.Path) -> bool:
  return (step / (
      mirrors.MARKER if paths.is_bucket(step) else _COMPLETE)).exists()


def _remove_parts(folder: paths.Path) -> None:
  """Removes checkpoints that a killed process had not fully deleted."""
  if paths.is_bucket(folder) and not mirrors.is_needed(folder):
    return  # orbax removes steps without its marker itself
  for step in folder.glob('[0-9]*'):
    if step.name.isdecimal() and not _is_complete(step):
      paths.remove_tree(step)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
      for path, leaf in leaves if hasattr(leaf, 'shape')}
