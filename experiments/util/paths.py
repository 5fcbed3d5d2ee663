"""Paths of workdirs: local folders, and folders in buckets.

Local paths are `pathlib.Path`. Paths in buckets are `etils.epath.Path`, which
has the same methods except those below, and reads and writes by the packages
gcsfs or s3fs. A bucket has objects and no folders: a folder exists as long as
an object is in it. An object is written whole and replaces the old one at once;
it cannot be appended to, renamed or locked.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
from typing import TypeAlias
import urllib.parse

from etils import epath
import fsspec

from experiments.util.errors import UserError

Path: TypeAlias = pathlib.Path | epath.Path

#: Scheme -> the package that reads and writes there.
PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}


def caches() -> pathlib.Path | None:
  """The folder of caches, `$AWP_CACHE_DIR`, by default `~/.cache/awp_jax`.

  Returns:
    The folder, which need not exist; None if the variable is empty or the user
    has no home: no caches.
  """
  root = os.environ.get('AWP_CACHE_DIR', '~/.cache/awp_jax')
  try:
    return pathlib.Path(root).expanduser() if root else None
  except RuntimeError:
    return None


def parse(text: str | os.PathLike[str]) -> Path:
  """A path of the command line: local, with `~` expanded, or in a bucket.

  Args:
    text: 'runs/x', '~/runs/x', 'gs://bucket/x' or 's3://bucket/x'; or a path,
      of which those in buckets are returned as they are.

  Returns:
    The path. Nothing is read from there.

  Raises:
    UserError: for another scheme, an address without a bucket, or if the
      package for the scheme is missing.
  """
  name = os.fspath(text)
  scheme, mark, rest = name.partition('://')
  # `pathlib` merges slashes; the result would be a local folder named 'gs:'.
  merged = name.startswith(tuple(f'{known}:/' for known in PACKAGES))
  if not mark and not merged:
    return pathlib.Path(name).expanduser()
  if mark and scheme not in PACKAGES:
    raise UserError(
        f'{name!r} is neither a local path nor in a bucket: allowed are '
        f'{" and ".join(f"{known}://" for known in PACKAGES)}, not '
        f'{scheme}://.')
  if not rest.strip('/') or rest.startswith('/'):
    raise UserError(
        f'{name!r} must name a bucket, as in {name[:2]}://bucket/folder.')
  # Read at the first use. Otherwise objects of other processes stay unseen.
  fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False
  try:
    fsspec.get_filesystem_class(scheme)
  except ImportError:
    raise UserError(
        f'{name!r} needs the package {PACKAGES[scheme]}: pip install '
        f'{PACKAGES[scheme]}.') from None
  return epath.Path(name)


def is_bucket(path: Path) -> bool:
  """Whether a path is in a bucket."""
  return str(path).startswith(tuple(f'{scheme}://' for scheme in PACKAGES))


def absolute(path: Path) -> Path:
  """The absolute path without symbolic links."""
  # `epath` would resolve an address relative to the current folder.
  return path if is_bucket(path) else path.resolve()


def file_name(text: str) -> str:
  """Text as the name of a file: slashes, colons, ... as %2F, %3A, ...

  `urllib.parse.unquote` returns the text.
  """
  return urllib.parse.quote(text, safe='()=,+ ')


def children(folder: Path) -> list[Path]:
  """The files and folders in a folder; none if it does not exist."""
  try:
    found = [folder / path.name for path in folder.iterdir()]
  except FileNotFoundError:
    return []
  # A folder made by hand is an object, 'run/', and is listed in itself.
  return [
      path for path in found
      if not is_bucket(path) or path.name != folder.name or path.exists()]


def remove_tree(folder: Path) -> None:
  """Removes a folder and everything in it."""
  if is_bucket(folder):
    epath.Path(folder).rmtree()
  else:
    shutil.rmtree(folder)


def create(path: Path, data: bytes) -> bool:
  """Writes an object in a bucket unless it exists.

  Args:
    path: in a bucket.
    data: its content.

  Returns:
    Whether this call created the object; True for one of concurrent callers.
  """
  system, name = fsspec.core.url_to_fs(str(path))
  try:
    system.pipe_file(name, data, mode='create')
  except FileExistsError:
    return False
  return True


@contextlib.contextmanager
def errors(path: Path) -> Iterator[None]:
  """Converts errors of a bucket to an `OSError` that names the path.

  Clients of buckets have exceptions of their own, many without the path. Those
  of local files have it and are not changed.

  Args:
    path: that the block reads or writes.

  Yields:
    Nothing.

  Raises:
    OSError: for any exception, if the path is in a bucket.
  """
  try:
    yield
  except Exception as error:
    if not is_bucket(path):
      raise
    reason = str(error) or type(error).__name__
    raise OSError(f'{path}: {reason}') from error
