"""A run's folder: made, recognised, or refused."""

import json
import os
import pathlib
import tempfile
from typing import Any

import ml_collections

from experiments import results, setup

#: Fields that may differ when a run is taken up again: they change where data
#: lies and how often something is said or saved, never a number.
FREE_FIELDS = ('data_dir', 'log_every_steps', 'checkpoint_every_steps')

#: The same for whole groups: what they are about comes after the run.
FREE_GROUPS = ('evaluation.', 'landscape.')


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The fields as JSON gives them back."""
  return json.loads(json.dumps(dict(setup.flatten(config))))


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
    ValueError: if it cannot be written to, or holds another config's run.
  """
  folder = pathlib.Path(workdir).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise ValueError(
        f'the workdir {str(folder)!r} cannot be written to '
        f'({error.strerror or error}); choose another with --workdir.'
    ) from None
  path = folder / 'config.json'
  # A process killed while it wrote config.json leaves config.json.tmp.
  foreign = [file for file in folder.iterdir() if file.stem != path.name]
  if path.exists():
    _check_same(path, _plain(config))
  elif foreign:
    raise ValueError(
        f'the workdir {str(folder)!r} holds files but no config.json of a run; '
        'choose an empty or new folder with --workdir.')
  return folder


def claim(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """Writes `config.json` unless it is there.

  Not before all else is known to work: a mistyped `npz_path` shall not keep the
  corrected one out.

  Args:
    folder: of `open_workdir`.
    config: of the run.
  """
  path = folder / 'config.json'
  if not path.exists():
    results.write_json(path, _plain(config))


def stored_config(
    workdir: pathlib.Path, like: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """The config of the run in a folder.

  Args:
    workdir: a folder that holds a run.
    like: gives the fields that may differ, and those that the run's config does
      not have.

  Returns:
    The config.

  Raises:
    ValueError: if there is no run in the folder.
  """
  path = workdir / 'config.json'
  try:
    stored = dict(json.loads(path.read_text()))
  except (OSError, ValueError, TypeError):
    raise ValueError(
        f'{str(workdir)!r} holds no config.json of a run: train there first.'
    ) from None
  config = ml_collections.ConfigDict(like.to_dict())
  known = dict(setup.flatten(config))
  config.update_from_flattened_dict({
      name: tuple(value) if isinstance(value, list) else value
      for name, value in stored.items()
      if name in known and name not in FREE_FIELDS
      and not name.startswith(FREE_GROUPS)})
  return config


def _check_same(path: pathlib.Path, wanted: dict[str, Any]) -> None:
  try:
    stored = dict(json.loads(path.read_text()))
  except (OSError, ValueError, TypeError) as error:
    raise ValueError(f'{path} is not the config of a run: {error}.') from None
  differing = [
      f'{name} ({stored.get(name, "absent")!r} there, '
      f'{wanted.get(name, "absent")!r} now)'
      for name in sorted(stored.keys() | wanted.keys())
      if name not in FREE_FIELDS and not name.startswith(FREE_GROUPS)
      and stored.get(name) != wanted.get(name)]
  if differing:
    raise ValueError(
        f'the workdir {str(path.parent)!r} holds the run of another config; '
        f'it differs in {", ".join(differing)}. Choose another --workdir, or '
        'remove this one.')
