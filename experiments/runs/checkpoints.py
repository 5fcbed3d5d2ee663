"""Checkpoints of the last and the best state of a run, written atomically.

The trainer saves and cleans up here, in all of its processes together; files
are written in the background, while training goes on. All other code reads
through `reading`. Two checkpoints of each kind are kept, so that there is one
to go back to if the newest is damaged.
"""

from collections.abc import Iterator
import contextlib
import gc
import logging
import pathlib
import secrets
import time
from typing import Any
import warnings

from absl import logging as absl_logging
from orbax import checkpoint as orbax_checkpoint
from orbax.checkpoint import v1 as ocp

from experiments.parallel import processes
from experiments.runs import mirrors, reading, seals
from experiments.util import paths

#: Complete checkpoints that are kept of each kind.
KEPT = 2

#: tensorstore's words for failures that may pass.
_PASSING = (
    'ABORTED', 'CANCELLED', 'DEADLINE_EXCEEDED', 'PERMISSION_DENIED',
    'RESOURCE_EXHAUSTED', 'UNAUTHENTICATED', 'UNAVAILABLE')

#: Seconds to wait for the reads that orbax gave up.
_GIVEN_UP = 0.2

#: Characters of a reason that are printed; orbax's may take pages.
_LONGEST = 300

#: The folder of orbax's code.
_ORBAX = str(pathlib.Path(orbax_checkpoint.__file__).parent)


class _NoTracebacks(logging.Filter):
  """Drops what orbax warns of: it raises errors as well, and ours say why."""

  def filter(self, record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or not (
        record.pathname.startswith(_ORBAX))


#: A single object, so that it is added to the logger once.
_FILTER = _NoTracebacks()


class Checkpoints:
  """The newest checkpoints of one kind in a workdir, for its trainer.

  Opening them removes the incomplete checkpoints of a killed trainer. Of the
  complete ones the newest two are kept: a process killed at any moment leaves a
  valid one, and if the newest turns out to be damaged there is another. A
  damaged checkpoint is set aside: moved to `checkpoints/set_aside/`. In a
  bucket, where folders cannot be moved, it is an error that names it.
  """

  def __init__(self, workdir: paths.Path, kind: str) -> None:
    """Opens `workdir/checkpoints/<kind>`, which need not exist."""
    self.folder = paths.absolute(workdir / 'checkpoints' / kind)
    self._mirror = (
        mirrors.Mirror(self.folder, KEPT)
        if mirrors.is_needed(self.folder) else None)
    processes.on_main(lambda: _remove_parts(self.folder))
    absl_logging.get_absl_logger().addFilter(_FILTER)
    self._failed = False
    self._pending: tuple[int, Any] | None = None
    self._place = self._mirror.local if self._mirror else self.folder
    self._checkpointer = self._open()

  def _open(self) -> ocp.training.Checkpointer:
    context = ocp.Context()
    # Otherwise orbax waits five minutes for a folder that cannot be created.
    context.asynchronous.create_directories_asynchronously = False
    return ocp.training.Checkpointer(
        self._place, cleanup_tmp_directories=True, context=context,
        preservation_policy=(
            ocp.training.preservation_policies.LatestN(n=KEPT)))

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
          step, tree, custom_metadata=seals.sealed(
              tree, reading.with_config(
                  notes, reading.workdir_of(self.folder))))
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
      # Of what orbax gave up with this checkpoint.
      warnings.filterwarnings('ignore', 'coroutine .* was never awaited')
      raise reading.CheckpointError(
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
    """Reads the newest checkpoint that is whole; sets damaged ones aside.

    Args:
      like: a pytree with the expected structure, shapes and dtypes.

    Returns:
      The pytree as NumPy arrays, and the notes.

    Raises:
      NoCheckpoint: if there is none, or none is left.
      CheckpointError: if it cannot be read for another reason than damage, or
        its arrays are of another model.
    """
    self.finish()
    while (step := self._latest()) is not None:
      stored = self._try(step)
      if stored is not None:
        return reading.as_tree(like, stored.tree, self.folder), stored.notes
    raise reading.NoCheckpoint(f'there is no checkpoint in {self.folder}.')

  def drop_unusable(self, newest: int) -> reading.Stored | None:
    """Sets aside what is damaged or newer than the state training starts from.

    Args:
      newest: the step of that state.

    Returns:
      The newest checkpoint that is left, or None.

    Raises:
      CheckpointError: if one cannot be read for another reason than damage.
    """
    self.finish()
    while (step := self._latest()) is not None:
      if step > newest:
        self._set_aside(step, f'it is newer than step {newest}')
      elif stored := self._try(step):
        return stored
    return None

  def _try(self, step: int) -> reading.Stored | None:
    """Reads a checkpoint in all processes; sets it aside if it is damaged.

    Each process reads alone. If orbax read in all of them together, those that
    find different things would wait for each other.

    Args:
      step: of the checkpoint.

    Returns:
      The checkpoint, or None if it was damaged.

    Raises:
      CheckpointError: if it cannot be read for another reason.
    """
    found, reason = None, ''
    for _ in range(2):  # a second time, before a good one is set aside
      try:
        with reading.quietly():
          found, reason = reading.read_step(
              self._place / str(step), reading.workdir_of(self.folder)), ''
          break
      except Exception as error:  # orbax and tensorstore have many
        reason = ' '.join(str(error).split()) or type(error).__name__
        if not _is_damage(error):
          raise reading.CheckpointError(
              f'the checkpoint of step {step} in {self.folder} cannot be read: '
              f'{reason}') from error
    reasons = [text for text in processes.gather(reason) if text]
    if not reasons:
      return found
    with reading.quietly(), warnings.catch_warnings():
      # Reads that orbax gave up end here, and their coroutines, which warn.
      time.sleep(_GIVEN_UP)
      warnings.simplefilter('ignore', RuntimeWarning)
      gc.collect()
    self._set_aside(step, reasons[0])
    return None

  def _set_aside(self, step: int, reason: str) -> None:
    """Moves a checkpoint to `checkpoints/set_aside`, and says so.

    Raises:
      CheckpointError: in a bucket, where nothing can be moved.
    """
    reason = reason[:_LONGEST]
    if paths.is_bucket(self.folder):
      raise reading.CheckpointError(
          f'the checkpoint of step {step} in {self.folder} cannot be used: '
          f'{reason}. Remove {self.folder / str(step)} to go on without it.')
    self._checkpointer.close()
    processes.on_main(lambda: _move_away(self.folder, step, reason))
    self._checkpointer = self._open()

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


def _is_damage(error: Exception) -> bool:
  """Whether a failed read shows damage.

  The alternatives are a disk or network that failed, and a fault in this
  program or in orbax. These are the errors that every file of a checkpoint
  gave when it was cut off, emptied, removed or changed.
  """
  if isinstance(error, reading.CheckpointError):
    return False
  if isinstance(error, ValueError):  # of tensorstore, JSON and the seal
    return not any(code in str(error) for code in _PASSING)
  return isinstance(
      error, KeyError | NotImplementedError | FileNotFoundError
      | NotADirectoryError)


def _move_away(folder: paths.Path, step: int, reason: str) -> None:
  """Moves the files of a step out of the folder, and says where to and why."""
  source = folder / str(step)
  try:
    target = folder.parent / 'set_aside' / (
        f'{folder.name}-{step}-{secrets.token_hex(4)}')
    target.parent.mkdir(exist_ok=True)
    source.rename(target)
  except OSError as error:
    raise reading.CheckpointError(
        f'the checkpoint {source} cannot be used, nor moved away: {error}.'
    ) from None
  print(
      f'the checkpoint of step {step} in {folder} is not used: {reason}. It '
      f'was moved to {target}.', flush=True)


def _remove_parts(folder: paths.Path) -> None:
  """Removes checkpoints that a killed process had not fully deleted.

  One is deleted when there is a newer one. A part without a newer checkpoint
  has lost the file that marks it as complete, and is moved away.
  """
  if paths.is_bucket(folder) and not mirrors.is_needed(folder):
    return  # orbax removes steps without its marker itself
  steps = [step for step in folder.glob('[0-9]*') if step.name.isdecimal()]
  newest = max((int(step.name) for step in steps
                if reading.is_complete(step)), default=-1)
  for step in steps:
    if reading.is_complete(step):
      continue
    if paths.is_bucket(folder) or int(step.name) < newest:
      paths.remove_tree(step)
    else:
      _move_away(folder, int(step.name), 'it is not complete')
