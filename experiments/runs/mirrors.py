"""Local copies of checkpoints in buckets that orbax cannot write to.

Orbax writes to local folders and to `gs://`. For `s3://` it writes to a
temporary local folder, whose files are then copied to the bucket. A checkpoint
counts only with the file `MARKER`, which is copied last and removed first.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import tempfile

from etils import epath

from experiments.parallel import processes
from experiments.util import atomic, paths
from experiments.util.errors import UserError

#: Orbax writes this file last, where it cannot rename a complete step.
MARKER = 'commit_success.txt'


def is_needed(folder: paths.Path) -> bool:
  """Whether orbax cannot use the folder itself."""
  return str(folder).startswith('s3://')


class Mirror:
  """The newest checkpoints in a bucket, copied to a temporary folder.

  Attributes:
    local: the temporary folder, for orbax to read and write.
  """

  def __init__(self, folder: paths.Path, kept: int) -> None:
    """Copies the newest complete checkpoints to the temporary folder.

    Args:
      folder: with one folder per step, named by its number; need not exist.
      kept: how many of them to copy and to keep, at least 1.

    Raises:
      UserError: if there are several processes, each with its own disk.
    """
    if processes.count() > 1:
      raise UserError(
          f'{folder}: {processes.count()} processes cannot write checkpoints '
          'there together; choose a --workdir in gs:// or a folder that all '
          'processes share.')
    self._folder, self._kept = epath.Path(folder), kept
    self._temporary = tempfile.TemporaryDirectory()
    self.local = pathlib.Path(self._temporary.name)
    for step in _steps(self._folder)[-kept:]:
      _download(self._folder / str(step), self.local)

  def upload(self, step: int) -> None:
    """Copies a checkpoint to the bucket and removes all but the newest `kept`.

    Args:
      step: of a complete checkpoint in `local`.

    Raises:
      OSError: if the bucket cannot be written to.
    """
    source, target = self.local / str(step), self._folder / str(step)
    for file in sorted(source.rglob('*')):
      name = file.relative_to(source).as_posix()
      if file.is_file() and name != MARKER:
        with atomic.replacing(target / name) as copy:
          copy.write(file.read_bytes())
    atomic.write_text(target / MARKER, 'complete\n')
    with paths.errors(self._folder):
      for other in _steps(self._folder)[:-self._kept]:
        (self._folder / str(other) / MARKER).unlink()
        (self._folder / str(other)).rmtree()

  def close(self) -> None:
    """Removes the temporary folder."""
    self._temporary.cleanup()


@contextlib.contextmanager
def readable(step: paths.Path) -> Iterator[paths.Path]:
  """A folder of the same name from which orbax can read a checkpoint.

  Args:
    step: the folder of a complete checkpoint.

  Yields:
    The same folder, or a temporary copy if orbax cannot read there.

  Raises:
    OSError: if it cannot be copied.
  """
  if not is_needed(step):
    yield step
    return
  with tempfile.TemporaryDirectory() as temporary:
    yield _download(epath.Path(step), pathlib.Path(temporary))


def _steps(folder: epath.Path) -> list[int]:
  """The complete checkpoints in a bucket, oldest first."""
  with paths.errors(folder):
    return sorted(
        int(step.name) for step in paths.children(folder)
        if step.name.isdecimal() and (step / MARKER).exists())


def _download(step: epath.Path, folder: pathlib.Path) -> pathlib.Path:
  """Copies a checkpoint into a local folder; returns the copy."""
  target = folder / step.name
  target.mkdir()
  with paths.errors(step):
    for path in paths.children(step):
      if path.is_dir():
        _download(path, target)
      else:
        (target / path.name).write_bytes(path.read_bytes())
  return target
