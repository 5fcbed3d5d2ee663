"""Opens, claims and locks the folder of a run, and reads its config."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import tempfile
from typing import Any

import ml_collections

from experiments.config import schema
from experiments.configs import base
from experiments.util import atomic, digests, paths
from experiments.util.errors import UserError

#: Fields of older versions -> their present names.
RENAMED = {
    'model.normalise': 'model.normalize', 'awp.decay_at': 'awp.update_at'}

#: Fields that may differ when a run is resumed. They set where data is, what is
#: kept in memory and how often to log or save, and change no result.
FREE_FIELDS = (
    'data_dir', 'data_on_device_gib', 'model.remat', 'log_every_steps',
    'loggers', 'checkpoint_every_steps')

#: Groups of fields that may differ: they apply after training.
FREE_GROUPS = ('evaluation.', 'landscape.')

#: Fields that may differ when a run is read. The images may have moved; a
#: checksum verifies that they are the same.
READER_FIELDS = (*FREE_FIELDS, 'npz_path')

#: The file that a trainer locks.
LOCK = '.lock'


class WorkdirBusy(UserError):
  """Another process trains in the folder."""


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The fields after a round trip through JSON."""
  return json.loads(json.dumps(schema.flatten(config)))


def open_workdir(
    workdir: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> paths.Path:
  """Creates the folder, or opens the one of a run with the same config.

  Args:
    workdir: the folder.
    config: the config of the run.

  Returns:
    The folder. `claim` then writes the config to it.

  Raises:
    UserError: if it is not writable, or holds a run with another config.
  """
  folder = paths.parse(workdir)
  try:
    _check_writable(folder)
  except OSError as error:
    raise UserError(
        f'the workdir {str(folder)!r} cannot be written to '
        f'({error.strerror or error}); choose another with --workdir.'
    ) from None
  path = folder / 'config.json'
  foreign = [
      file for file in paths.children(folder)
      if file not in (path, folder / LOCK) and not atomic.is_leftover(file)]
  if path.exists():
    _check_same(folder, _plain(config))
  elif foreign:
    raise UserError(
        f'the workdir {str(folder)!r} holds files but no config.json of a run; '
        'choose an empty or new folder with --workdir.')
  return folder


def _check_writable(folder: paths.Path) -> None:
  """Creates the folder; raises OSError if no file can be written there."""
  if paths.is_bucket(folder):
    probe = folder / atomic.leftover_name('probe')
    with paths.errors(folder):
      probe.write_bytes(b'')
      probe.unlink()
    return
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder):
    pass


def claim(folder: paths.Path, config: ml_collections.ConfigDict) -> None:
  """Writes `config.json`, or checks the existing one.

  Called last, after all other checks: a config with a mistyped `npz_path` must
  not block the corrected one.

  Args:
    folder: from `open_workdir`.
    config: the config of the run.

  Raises:
    UserError: if another process has just claimed the folder for another
      config.
  """
  path, wanted = folder / 'config.json', _plain(config)
  text = json.dumps(wanted, indent=2) + '\n'
  if path.exists() or not atomic.create_text(path, text):
    _check_same(folder, wanted)


def check_present(workdir: paths.Path) -> None:
  """Raises UserError if a local workdir was removed under a run."""
  # The run would go on in a new folder, without its first epochs.
  path = workdir / 'config.json'
  if not paths.is_bucket(workdir) and not path.exists():
    raise UserError(
        f'{str(path)!r} was removed while a run wrote there: it cannot go on.')


def read_fields(workdir: paths.Path) -> dict[str, Any]:
  """The fields in a run's `config.json` as they are; {} without the file.

  Raises:
    UserError: if the file cannot be read.
  """
  path = workdir / 'config.json'
  try:
    return dict(json.loads(path.read_text()))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f'{path} is not the config of a run: {error}.') from None


def stored_fields(workdir: paths.Path) -> dict[str, Any]:
  """The fields of a run's config, with defaults for absent ones.

  Args:
    workdir: a folder that holds a run, of this version or an older one.

  Returns:
    JSON values by dotted name.

  Raises:
    UserError: if there is no run in the folder.
  """
  path = workdir / 'config.json'
  with paths.errors(workdir):
    is_run = path.is_file()
  if not is_run:
    raise UserError(
        f'{str(workdir)!r} holds no config.json of a run: train there first.')
  stored = read_fields(workdir)
  # Before `data_seed` existed, `seed` also selected the images.
  implied = {'data_seed': stored['seed']} if 'seed' in stored else {}
  try:
    return with_defaults(implied | stored)
  except UserError as error:
    raise UserError(f'{path} is not the config of a run: {error}.') from None


def digest(workdir: paths.Path) -> str:
  """SHA-256 of the fields of a run that must not change; '' without any."""
  fields = {name: value for name, value in read_fields(workdir).items()
            if name not in READER_FIELDS and not name.startswith(FREE_GROUPS)}
  return digests.of_values(fields, digits=None) if fields else ''


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
  """Brings the config of an older version up to date.

  Args:
    stored: the fields of a run's config by dotted name.

  Returns:
    The fields with those in `RENAMED` under their present names, and with the
    defaults of `configs/base.py` for absent ones.

  Raises:
    UserError: if it has no field of a config.
  """
  defaults = _plain(base.get_config())
  stored = {RENAMED.get(name, name): value for name, value in stored.items()}
  if not stored.keys() & defaults.keys():
    raise UserError('it has no field of a config')
  return defaults | stored


def stored_config(
    workdir: paths.Path, like: ml_collections.ConfigDict | None = None, *,
    is_trusted: bool = False) -> ml_collections.ConfigDict:
  """The config of the run in a folder.

  Args:
    workdir: a folder that holds a run, of this version or an older one. Fields
      that no longer exist are dropped.
    like: supplies the fields that may differ; None keeps the stored ones.
    is_trusted: whether it may name parts of other packages that `like` does
      not name. Their code would be run, and the folder may be a stranger's.

  Returns:
    The config.

  Raises:
    UserError: if there is no run in the folder, or it names such parts.
  """
  config = base.get_config()
  known = schema.flatten(config)
  fields = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in stored_fields(workdir).items()
      if name in known or schema.is_free(name)}
  if like is not None:
    fields |= {
        name: value for name, value in schema.flatten(like).items()
        if _is_free(name)}
  try:
    schema.update(config, fields)
  except (TypeError, ValueError) as error:
    raise UserError(
        f'{workdir / "config.json"} is not the config of a run of this '
        f'version: {error}') from None
  if not is_trusted:
    _refuse_parts(workdir, config, {} if like is None else schema.flatten(like))
  return config


def _refuse_parts(
    workdir: paths.Path, config: ml_collections.ConfigDict,
    given: dict[str, Any]) -> None:
  """Raises UserError if a stored config names code that the user does not."""
  known = schema.external_parts(given)
  for text, field in schema.external_parts(schema.flatten(config)).items():
    if text not in known:
      raise UserError(
          f'the run in {str(workdir)!r} names code of another package: '
          f'{field}={text!r}. Add --trust_run to run it if you know where the '
          'run comes from. main.py also takes your own config file of it, '
          '--config=FILE.')


def reader_config(
    workdir: paths.Path, config: ml_collections.ConfigDict,
    overrides: dict[str, Any] | None, *, is_trusted: bool = False
) -> ml_collections.ConfigDict:
  """The config to evaluate a run with.

  Args:
    workdir: the run's folder. If it holds no run, `config` is returned.
    config: the config of the command line.
    overrides: the fields set on the command line, if it names no config file;
      None if `config` comes from a file named by the user.
    is_trusted: as in `stored_config`.

  Returns:
    The stored config with the fields that may differ replaced.

  Raises:
    UserError: if any other field has another value, or the stored config names
      parts of other packages that `overrides` does not name.
  """
  with paths.errors(workdir):
    is_run = (workdir / 'config.json').exists()
  if not is_run:
    return config
  if overrides is not None:
    config = stored_config(workdir, is_trusted=True)
    config.update_from_flattened_dict(overrides)
    if not is_trusted:
      _refuse_parts(workdir, config, overrides)
  stored = stored_fields(workdir)
  differing = _differences(
      {name: value for name, value in stored.items()
       if name in _plain(config) or schema.is_free(name)},
      _plain(config), READER_FIELDS)
  if differing:
    named = '--config' if overrides is None else 'these fields'
    raise UserError(
        f'the workdir {str(workdir)!r} holds a run with another config; it '
        f'differs in {", ".join(differing)}. Omit {named}: the config of the '
        f'run is read from the folder. {", ".join(READER_FIELDS)} and fields '
        f'that begin with {" or ".join(FREE_GROUPS)} may differ.')
  return config


@contextlib.contextmanager
def locked(workdir: paths.Path) -> Iterator[None]:
  """Locks a run's folder against other trainers; readers need no lock.

  The lock is on a separate file, which is never replaced. The operating system
  releases it when the process ends. There are no locks in a bucket, as on some
  network file systems: there the user must not start a run twice.

  Args:
    workdir: the run's folder.

  Yields:
    Nothing.

  Raises:
    WorkdirBusy: if another process trains there.
  """
  with contextlib.ExitStack() as stack:
    if paths.is_bucket(workdir):
      yield
      return
    try:
      # Network file systems only lock files opened for writing.
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
  """Descriptions of the fields whose values differ."""
  return [
      f'{name} ({stored.get(name, "absent")!r} there, '
      f'{wanted.get(name, "absent")!r} now)'
      for name in sorted(stored.keys() | wanted.keys())
      if name not in free and not name.startswith(FREE_GROUPS)
      and stored.get(name) != wanted.get(name)]


def _check_same(folder: paths.Path, wanted: dict[str, Any]) -> None:
  differing = _differences(stored_fields(folder), wanted)
  if differing:
    raise UserError(
        f'the workdir {str(folder)!r} holds a run with another config; it '
        f'differs in {", ".join(differing)}. Choose another --workdir.')
