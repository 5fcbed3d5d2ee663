"""Writes files atomically, also with concurrent writers."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import secrets
from typing import IO, Any

_SUFFIX = '.tmp'


def _temporary(path: pathlib.Path) -> pathlib.Path:
  """A hidden file beside `path`, under a name of its own."""
  return path.with_name(
      f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}')


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """Opens a file that replaces `path` when the block ends.

  The content is written to a hidden file next to `path`. Its name is unique, so
  concurrent writers do not collide: the last one to finish wins. After an
  exception `path` is unchanged and the hidden file is removed; a killed process
  leaves it.

  Args:
    path: the file to write.

  Yields:
    A binary file to write to.

  Raises:
    OSError: if the file cannot be written.
  """
  temporary = _temporary(path)
  try:
    with temporary.open('xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text atomically."""
  with replacing(path) as file:
    file.write(text.encode())


def create_text(path: pathlib.Path, text: str) -> bool:
  """Writes UTF-8 text atomically unless the file exists.

  Args:
    path: the file to create.
    text: its content.

  Returns:
    Whether this call created the file; True for one of concurrent callers.
  """
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


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes JSON atomically."""
  write_text(path, json.dumps(values, indent=2) + '\n')


def is_leftover(path: pathlib.Path) -> bool:
  """Whether a file was left by a process killed inside `replacing`."""
  return path.name.startswith('.') and path.name.endswith(_SUFFIX)
