"""Reads the checkpoints of a run, which may be training.

Everything but the trainer reads here. Nothing is written, removed or locked.
What is read is compared with the digest that was stored with it.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import sys
from typing import Any, NamedTuple
import warnings

from absl import logging
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.parallel import processes
from experiments.runs import mirrors, seals, workdirs
from experiments.util import digests, paths
from experiments.util.errors import UserError

#: Sub-folders of a workdir's `checkpoints/`.
KINDS = ('best', 'last')

#: The digest of the run's config among the notes.
CONFIG = 'config_sha256'

#: A local step without this file is incomplete or partly removed.
COMPLETE = '_CHECKPOINT_METADATA'


class CheckpointError(UserError):
  """A checkpoint that cannot be read, written or used."""


class NoCheckpoint(CheckpointError):
  """There is no checkpoint."""


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
  could hang.
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
      complete = [n for n in listed if is_complete(self.folder / str(n))]
      # All that were listed may have been replaced since.
      if complete or listed == before:
        return max(complete, default=None)

  def notes(self) -> dict[str, Any]:
    """The notes of the newest checkpoint; {} if there is none."""
    return {} if self.step() is None else self._newest(_read_notes)

  def read(self) -> Stored:
    """Reads the newest complete checkpoint, of any network.

    Raises:
      CheckpointError: if there is none, or it cannot be read.
    """
    return self._newest(read_step)

  def _newest(self, read: Callable[[paths.Path, paths.Path], Any]) -> Any:
    """Calls `read` until the checkpoint is still the newest afterwards.

    The trainer removes old checkpoints, so a concurrent read may be partial.
    """
    step = self.step()
    while step is not None:
      found, failure = None, None
      try:
        with quietly():
          found = read(
              self.folder / str(step), workdir_of(self.folder))
      except Exception as error:
        failure = error
      before, step = step, self.step()
      if step == before:
        if failure is None:
          return found
        raise CheckpointError(
            f'the checkpoint of step {step} in {self.folder} cannot be read: '
            f'{failure}') from failure
    raise NoCheckpoint(f'there is no checkpoint in {self.folder}.')


def workdir_of(folder: paths.Path) -> paths.Path:
  """The workdir whose checkpoints of one kind are in a folder."""
  return folder.parent.parent


def with_config(notes: dict[str, Any], workdir: paths.Path) -> dict[str, Any]:
  """The notes to store: with the digest of the run's config."""
  return {**notes, CONFIG: workdirs.digest(workdir)}


def _of_run(stored: dict[str, Any], workdir: paths.Path) -> dict[str, Any]:
  """The notes that `with_config` was given.

  Args:
    stored: the notes as read. Those of older versions do not name the config.
    workdir: of the run.

  Raises:
    CheckpointError: if the config of the run in the workdir is another.
  """
  wanted, present = stored.get(CONFIG), workdirs.digest(workdir)
  if wanted and present and wanted != present:
    raise CheckpointError(
        f'it is not of the run whose config.json is in {workdir}: one of them '
        'was changed or is of another run')
  return {name: value for name, value in stored.items() if name != CONFIG}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Silences orbax.

  For a damaged checkpoint it shows pages, with tracebacks: its log, and errors
  in the background of reads that it gave up. Our errors give the reason.

  Yields:
    Nothing.
  """
  verbosity, hook = logging.get_verbosity(), sys.unraisablehook
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Sharding info not provided')
      yield
  finally:
    logging.set_verbosity(verbosity)
    sys.unraisablehook = hook


def _alone() -> ocp.Context:
  """The context for reading in one process, without waiting for others."""
  own, context = processes.index(), ocp.Context()
  context.multiprocessing.primary_host = own
  context.multiprocessing.active_processes = {own}
  context.multiprocessing.barrier_sync_key_prefix = f'reader-{own}'
  return context


def _read_notes(path: paths.Path, workdir: paths.Path) -> dict[str, Any]:
  with mirrors.readable(path) as place:
    return _of_run(seals.without_seal(_stored_notes(place)), workdir)


def _stored_notes(step: paths.Path) -> dict[str, Any]:
  """The notes of a checkpoint with their seal, unchecked.

  orbax reads them too, but takes a damaged file for one without notes.
  """
  notes = json.loads((step / COMPLETE).read_text())['custom_metadata']
  if not notes:
    raise seals.Damaged('it has lost its notes')
  return notes


def read_step(path: paths.Path, workdir: paths.Path) -> Stored:
  """Reads one checkpoint; raises any exception if it is damaged.

  Args:
    path: of the checkpoint, in the workdir or in a local copy of it.
    workdir: of the run.
  """
  # As NumPy arrays: the devices that wrote them may not exist here.
  with _alone(), mirrors.readable(path) as place:
    like = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        ocp.metadata(place).metadata,
        is_leaf=lambda leaf: hasattr(leaf, 'shape'))
    tree = ocp.load(place, like)
    notes = seals.checked(tree, _stored_notes(place))
    return Stored(int(path.name), tree, _of_run(notes, workdir))


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


def as_tree(like: Any, stored: Any, folder: paths.Path) -> Any:
  """The arrays of a checkpoint in the containers of another pytree.

  Args:
    like: a pytree with the expected structure, shapes and dtypes.
    stored: the tree of a `Stored`.
    folder: of the checkpoint, for the error.

  Returns:
    The pytree, with NumPy arrays of the dtypes of `like`.

  Raises:
    CheckpointError: if names or shapes differ.
  """
  check_same(like, stored, folder)
  arrays = dict(digests.named(stored))
  return jax.tree.unflatten(jax.tree.structure(like), [
      np.asarray(arrays[name]).astype(leaf.dtype)
      for name, leaf in digests.named(like)])


def is_complete(step: paths.Path) -> bool:
  """Whether a checkpoint was written to its end."""
  return (step / (
      mirrors.MARKER if paths.is_bucket(step) else COMPLETE)).exists()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {name: tuple(leaf.shape) for name, leaf in digests.named(tree)}
