"""The fields that a sweep sets: parsed, checked, compared with stored runs."""

import ast
from collections.abc import Sequence
import functools
import importlib.util
import json
from typing import Any

from absl import flags
from ml_collections.config_flags import tuple_parser

from experiments.config import schema
from experiments.configs import base
from experiments.runs import workdirs
from experiments.sweeps.jobs import Job, Varied
from experiments.util import named, paths
from experiments.util.errors import UserError

#: How main.py reads a field, by the type of its default; text is kept.
_PARSERS: dict[type, Any] = {
    bool: flags.BooleanParser(), int: flags.IntegerParser(),
    float: flags.FloatParser(), tuple: tuple_parser.TupleParser()}


def check_overrides(
    jobs: Sequence[Job], workdir: paths.Path, overrides: Sequence[str]
) -> None:
  """Raises UserError if a run already exists with other values or fields.

  An unfinished run would reject them itself. A finished one is not started, so
  the table would show it as if it had the new values.
  """
  overrides = [o for o in overrides if o.startswith('--config.')]
  parse_flags(overrides)
  _check_varied(jobs, overrides)
  for job in jobs:
    if not (workdir / job.name / 'config.json').exists():
      continue
    given = parse_flags([*overrides, *flags_of(job.varied)])
    stored = workdirs.stored_fields(workdir / job.name)
    for name, value in given.items():
      if name in workdirs.FREE_FIELDS or name.startswith(workdirs.FREE_GROUPS):
        continue
      if not is_same(name, value, stored.get(name)):
        raise UserError(
            f'{str(workdir / job.name)!r} holds a run with '
            f'{name}={stored.get(name)!r}, not {value!r}; choose another '
            '--workdir.')


def _check_varied(jobs: Sequence[Job], overrides: Sequence[str]) -> None:
  """Raises UserError unless varied fields distinguish the jobs."""
  names: dict[str, str] = {}
  for job in jobs:
    for (field, value), flag in zip(
        job.varied, flags_of(job.varied), strict=True):
      parsed = parse_flags([flag])
      if field == 'seed':
        raise UserError('--vary=seed: set seeds with --seeds=0,1,2.')
      if field in workdirs.FREE_FIELDS or field.startswith(
          workdirs.FREE_GROUPS):
        raise UserError(
            f'--vary={field}: this field does not change the training.')
      if any(o.startswith(f'--config.{field}=') for o in overrides):
        raise UserError(f'{field} is set by --vary and by --config.{field}.')
      if schema.is_free(field):
        _check_free(job.config, field, value)
      key = f'{field}={_plain(parsed[field])}'
      if names.setdefault(key, value) != value:
        raise UserError(
            f'--vary={field} has one value twice, {names[key]!r} and '
            f'{value!r}.')


def flags_of(varied: Varied) -> list[str]:
  """The flags of `main.py` for varied fields."""
  return [f'--config.{field}={value}' for field, value in varied]


def parse_flags(overrides: Sequence[str]) -> dict[str, Any]:
  """The fields that flags of `main.py` set, as JSON and read as it does.

  Args:
    overrides: such as '--config.epochs=2'; of two for one field the last
      counts.

  Returns:
    The values by dotted name; in the groups `schema.USER_GROUPS` as text, since
    only the config file has their types.

  Raises:
    UserError: for an unknown field or a value of another type.
  """
  known, found = schema.flatten(base.get_config()), {}
  for override in overrides:
    name, mark, text = override.removeprefix('--config.').partition('=')
    if schema.is_free(name):  # its type is known to the config file only
      found[name] = text
      continue
    if name not in known:
      raise UserError(schema.unknown(name, known))
    kind = type(known[name])
    if not mark and kind is bool:
      text = 'true'
    try:
      value = _PARSERS[kind].parse(text) if kind in _PARSERS else text
    except (TypeError, ValueError) as error:
      raise UserError(f'{override}: {error}') from error
    found[name] = json.loads(json.dumps(value))
  return found


def _check_free(config: str, field: str, value: str) -> None:
  """Raises UserError unless a config file has such a field of its own."""
  fields = _own_fields(config)
  if fields is None:  # its run will say what is wrong with it
    return
  if field not in fields:
    raise UserError(
        f'{config} has no field {field!r}, only '
        f'{", ".join(filter(schema.is_free, fields)) or "none of its own"}.')
  kind = type(fields[field])
  try:
    if kind in _PARSERS:
      _PARSERS[kind].parse(value)
  except (TypeError, ValueError) as error:
    raise UserError(f'--vary={field}: {value!r}: {error}') from error


@functools.cache
def _own_fields(config: str) -> dict[str, Any] | None:
  """The fields of a config file by dotted name; None if it cannot be loaded."""
  path, _, argument = config.partition(':')
  named.search_here(path)
  spec = importlib.util.spec_from_file_location('_varied_config', path)
  try:
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return schema.flatten(module.get_config(*filter(None, [argument])))
  except Exception:
    return None


def _plain(value: Any) -> str:
  """The same text for values that a config may read as equal: 1 and 1.0."""
  if isinstance(value, str):
    try:
      value = ast.literal_eval(value.capitalize() if value.lower() in (
          'true', 'false') else value)
    except (SyntaxError, ValueError):
      return value
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return repr(float(value) if is_number else value)


def is_same(field: str, value: Any, stored: Any) -> bool:
  """Whether a value from `parse_flags` is that of a run's stored config."""
  if not schema.is_free(field) or value == stored:
    return bool(value == stored)
  if isinstance(stored, bool):
    return value.lower() in (('true', '1') if stored else ('false', '0'))
  try:
    if isinstance(stored, int | float):
      return float(value) == stored
    return bool(json.loads(json.dumps(ast.literal_eval(value))) == stored)
  except (SyntaxError, TypeError, ValueError):
    return False
