"""Files that are written whole or not at all, whoever else writes them."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import secrets
from typing import IO, Any

_SUFFIX = '.tmp'


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[IO[bytes]]:
  """Opens a file that takes the place of `path` when the block ends.

  The content goes into a hidden file beside `path` under a name of its own, so
  that concurrent writers do not collide: the last one to finish wins. After an
  exception `path` is as it was and nothing is left behind; a killed process
  leaves its hidden file.

  Args:
    path: of the file to write.

  Yields:
    A binary file to write to.

  Raises:
    OSError: if the file cannot be written.
  """
  temporary = path.with_name(
      f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}')
  try:
    with temporary.open('xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes UTF-8 text whole or not at all."""
  with replacing(path) as file:
    file.write(text.encode())


def create_text(path: pathlib.Path, text: str) -> bool:
  """Writes UTF-8 text whole unless the file exists.

  Args:
    path: of the file.
    text: its content.

  Returns:
    Whether this call made the file; of concurrent callers one gets True.
  """
  temporary = path.with_name(
      f'.{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}')
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
  """Writes JSON at once or not at all."""
  write_text(path, json.dumps(values, indent=2) + '\n')


def is_leftover(path: pathlib.Path) -> bool:
  """Whether a file is what a process killed inside `replacing` leaves."""
  return path.name.startswith('.') and path.name.endswith(_SUFFIX)
