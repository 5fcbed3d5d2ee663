"""A run's folder: made, recognised, or refused."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from typing import Any

import ml_collections

from experiments.config import build
from experiments.util import atomic
from experiments.configs import base
from experiments.util.errors import UserError

#: Fields that may differ when a run is taken up again: they change where data
#: lies and how often something is said or saved, never a number.
FREE_FIELDS = ('data_dir', 'log_every_steps', 'checkpoint_every_steps')

#: The same for whole groups: what they are about comes after the run.
FREE_GROUPS = ('evaluation.', 'landscape.')

#: Fields that may differ when a run is read: where its images lie now. That
#: they are the same images is checked.
READER_FIELDS = (*FREE_FIELDS, 'npz_path')


#: What a trainer locks. A hidden file: it says nothing to a reader.
LOCK = '.lock'


class WorkdirBusy(UserError):
  """Another process trains in the folder."""


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The fields as JSON gives them back."""
  return json.loads(json.dumps(build.flatten(config)))


def open_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> pathlib.Path:
  """Makes the folder, or takes up the one of the same config.

  Args:
    workdir: the folder.
    config: of the run.

  Returns:
    The folder. `claim` makes it this config's.

  Raises:
    UserError: if it cannot be written to, or holds another config's run.
  """
  folder = pathlib.Path(workdir).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise UserError(
        f'the workdir {str(folder)!r} cannot be written to '
        f'({error.strerror or error}); choose another with --workdir.'
    ) from None
  path = folder / 'config.json'
  foreign = [
      file for file in folder.iterdir()
      if file not in (path, folder / LOCK) and not atomic.is_leftover(file)]
  if path.exists():
    _check_same(folder, _plain(config))
  elif foreign:
    raise UserError(
        f'the workdir {str(folder)!r} holds files but no config.json of a run; '
        'choose an empty or new folder with --workdir.')
  return folder


def claim(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes `config.json`, or checks the one that is there.

  Not before all else is known to work: a mistyped `npz_path` shall not keep the
  corrected one out.

  Args:
    folder: of `open_workdir`.
    config: of the run.

  Raises:
    UserError: if another process has just claimed the folder for another
      config.
  """
  path, wanted = folder / 'config.json', _plain(config)
  text = json.dumps(wanted, indent=2) + '\n'
  if path.exists() or not atomic.create_text(path, text):
    _check_same(folder, wanted)


def stored_fields(workdir: pathlib.Path) -> dict[str, Any]:
  """The fields of a run's config, absent ones with their defaults.

  Args:
    workdir: a folder that holds a run, of this version or an older one.

  Returns:
    Values by dotted names, as JSON gives them back.

  Raises:
    UserError: if there is no run in the folder.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(
        f'{str(workdir)!r} holds no config.json of a run: train there first.')
  try:
    stored = dict(json.loads(path.read_text()))
    # The seed chose the images as well before they had one of their own.
    own = {'data_seed': stored['seed']} if 'seed' in stored else {}
    return with_defaults(own | stored)
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f'{path} is not the config of a run: {error}.') from None


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
  """Adds the defaults of fields that an older version did not have.

  Args:
    stored: the fields of a run's config by their dotted names.

  Returns:
    The same with the fields of `configs/base.py` that it lacks.

  Raises:
    UserError: if it has no field of a config at all.
  """
  defaults = _plain(base.get_config())
  if not stored.keys() & defaults.keys():
    raise UserError('it has no field of a config')
  return defaults | stored


def stored_config(
    workdir: pathlib.Path, like: ml_collections.ConfigDict | None = None
) -> ml_collections.ConfigDict:
  """The config of the run in a folder.

  Args:
    workdir: a folder that holds a run, of this version or an older one. Fields
      of training that no longer exist are left out.
    like: gives the fields that may differ, if they are not to be the run's own.

  Returns:
    The config.

  Raises:
    UserError: if there is no run in the folder.
  """
  config = base.get_config()
  known = build.flatten(config)
  fields = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in stored_fields(workdir).items() if name in known}
  if like is not None:
    fields |= {
        name: value for name, value in build.flatten(like).items()
        if _is_free(name)}
  try:
    config.update_from_flattened_dict(fields)
  except (TypeError, ValueError) as error:
    raise UserError(
        f'{workdir / "config.json"} is not the config of a run of this '
        f'version: {error}') from None
  return config


def reader_config(
    workdir: pathlib.Path, config: ml_collections.ConfigDict,
    overrides: dict[str, Any] | None) -> ml_collections.ConfigDict:
  """The config to evaluate a run with: its own, and what may differ.

  Args:
    workdir: of the run. Where it holds none, `config` is returned.
    config: of the command line.
    overrides: the fields that the command line sets, if it names no file; None
      if `config` comes from a file that the user has named.

  Returns:
    The config.

  Raises:
    UserError: if a field that is the run's own has another value.
  """
  if not (workdir / 'config.json').exists():
    return config
  if overrides is not None:
    config = stored_config(workdir)
    config.update_from_flattened_dict(overrides)
  stored = stored_fields(workdir)
  differing = _differences(
      {name: stored[name] for name in _plain(config)}, _plain(config),
      READER_FIELDS)
  if differing:
    named = '--config' if overrides is None else 'these fields'
    raise UserError(
        f'the workdir {str(workdir)!r} holds the run of another config; it '
        f'differs in {", ".join(differing)}. Leave {named} out: the config of '
        f'the run is read from the folder. {", ".join(READER_FIELDS)} and '
        f'those that begin with {" or ".join(FREE_GROUPS)} may differ.')
  return config


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other trainers out of a run's folder; readers need no lock.

  The lock is on a file of its own, which is never replaced, and ends with the
  process, however that ends.

  Args:
    workdir: of `claim`.

  Yields:
    Nothing.

  Raises:
    WorkdirBusy: if another process trains there.
  """
  with contextlib.ExitStack() as stack:
    try:
      # Network file systems lock only what is open for writing.
      file = stack.enter_context((workdir / LOCK).open('a'))
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise WorkdirBusy(
          f'another process trains in {str(workdir)!r}: wait for it, or choose '
          'another --workdir.') from None
    except OSError:  # a file system without locks
      pass
    yield


def _is_free(name: str) -> bool:
  return name in FREE_FIELDS or name.startswith(FREE_GROUPS)


def _differences(
    stored: dict[str, Any], wanted: dict[str, Any],
    free: tuple[str, ...] = FREE_FIELDS) -> list[str]:
  """Fields of different values, and both values, in words."""
  return [
      f'{name} ({stored.get(name, "absent")!r} there, '
      f'{wanted.get(name, "absent")!r} now)'
      for name in sorted(stored.keys() | wanted.keys())
      if name not in free and not name.startswith(FREE_GROUPS)
      and stored.get(name) != wanted.get(name)]


def _check_same(folder: pathlib.Path, wanted: dict[str, Any]) -> None:
  differing = _differences(stored_fields(folder), wanted)
  if differing:
    raise UserError(
        f'the workdir {str(folder)!r} holds the run of another config; it '
        f'differs in {", ".join(differing)}. Choose another --workdir.')
