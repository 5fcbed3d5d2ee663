"""Writes files atomically, also with concurrent writers, and reads JSON."""

from collections.abc import Iterator
import contextlib
import io
import json
import os
import secrets
from typing import IO, Any

from experiments.util import paths
from experiments.util.errors import UserError

_SUFFIX = '.tmp'


def _temporary(path: paths.Path) -> paths.Path:
  """A hidden file beside `path`, under a name of its own."""
  return path.with_name(leftover_name(path.name))


@contextlib.contextmanager
def replacing(path: paths.Path) -> Iterator[IO[bytes]]:
  """Opens a file that replaces `path` when the block ends.

  The content is written to a hidden file next to `path`. Its name is unique, so
  concurrent writers do not collide: the last one to finish wins. After an
  exception `path` is unchanged and the hidden file is removed; a killed process
  leaves it. An object in a bucket is written whole, without a hidden file.

  Args:
    path: the file to write.

  Yields:
    A binary file to write to.

  Raises:
    OSError: if the file cannot be written.
  """
  if paths.is_bucket(path):
    buffer = io.BytesIO()
    yield buffer
    with paths.errors(path):
      path.write_bytes(buffer.getvalue())
    return
  temporary = _temporary(path)
  try:
    with temporary.open('xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: paths.Path, text: str) -> None:
  """Writes UTF-8 text atomically."""
  with replacing(path) as file:
    file.write(text.encode())


def create_text(path: paths.Path, text: str) -> bool:
  """Writes UTF-8 text atomically unless the file exists.

  Args:
    path: the file to create.
    text: its content.

  Returns:
    Whether this call created the file; True for one of concurrent callers.
  """
  if paths.is_bucket(path):
    with paths.errors(path):
      return paths.create(path, text.encode())
  temporary = _temporary(path)
  try:
    with temporary.open('x') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.link(temporary, path)
  except FileExistsError:
    return False
  finally:
    temporary.unlink(missing_ok=True)
  return True


def append_text(path: paths.Path, text: str) -> None:
  """Appends UTF-8 text to a file; on disk before this returns.

  An object in a bucket is rewritten, by one process only.

  Args:
    path: the file; created if absent.
    text: to append.

  Raises:
    OSError: if the file cannot be written.
  """
  if paths.is_bucket(path):
    with paths.errors(path):
      before = path.read_bytes() if path.exists() else b''
      path.write_bytes(before + text.encode())
    return
  with path.open('a') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def write_json(path: paths.Path, values: Any) -> None:
  """Writes JSON atomically."""
  write_text(path, json.dumps(values, indent=2) + '\n')


def read_json(path: paths.Path) -> dict[str, Any]:
  """The values of a JSON file; {} if it does not exist.

  Raises:
    UserError: if it does not hold JSON values by name.
  """
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise UserError(
        f'{path} is damaged: remove it, and repeat the command that wrote it.')
  return found


def leftover_name(purpose: str) -> str:
  """A new name that `is_leftover` recognizes, for a file of a few seconds."""
  return f'.{purpose}.{secrets.token_hex(8)}{_SUFFIX}'


def is_leftover(path: paths.Path) -> bool:
  """Whether a killed process left a file with a name of `leftover_name`."""
  return path.name.startswith('.') and path.name.endswith(_SUFFIX)
