"""The fields of a config by dotted name, and which ones it must have."""

from collections.abc import Iterable
import difflib
from typing import Any

from flax import traverse_util
import ml_collections

from experiments.util import named
from experiments.util.errors import UserError

#: Groups whose fields a config file may choose freely.
USER_GROUPS = ('user.', 'model.kwargs.')

#: Fields that may name parts of other packages, whose code is run where a run
#: is read. `loggers` are for training alone.
PART_FIELDS = (
    'dataset', 'augmentation.function', 'model.name', 'objective',
    'attack.name', 'weight_perturbation', 'optimizer.name',
    'evaluation.attacks', 'evaluation.curve_attacks')

_PLAIN = (bool, int, float, str, type(None))


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The values of all fields by dotted name."""
  return traverse_util.flatten_dict(config.to_dict(), sep='.')


def is_free(name: str) -> bool:
  """Whether a field is in one of the groups `USER_GROUPS`."""
  return name.startswith(USER_GROUPS)


def external_parts(fields: dict[str, Any]) -> dict[str, str]:
  """The parts of other packages that a config names.

  Args:
    fields: values by dotted name.

  Returns:
    Text of each part -> the field that names it.
  """
  found = {}
  for field in PART_FIELDS:
    value = fields.get(field)
    for text in value if isinstance(value, tuple | list) else (value,):
      if isinstance(text, str) and named.is_external(text):
        found[text] = field
  return found


def unknown(name: str, known: Iterable[str]) -> str:
  """An error message for an unknown field, with the most similar one."""

  def similarity(field: str) -> float:
    # `gama` should match `awp.gamma`: users often omit the group.
    return max(
        difflib.SequenceMatcher(None, name, candidate).ratio()
        for candidate in (field, field.rpartition('.')[2]))

  return (
      f'the config has an unknown field {name!r}. Did you mean '
      f'{max(known, key=similarity)!r}? Fields of your own belong in the group '
      'user.')


def check(
    config: ml_collections.ConfigDict, known: ml_collections.ConfigDict
) -> None:
  """Raises UserError unless `config` has the fields of `known`.

  It may have more in the groups `USER_GROUPS`, with plain values.
  """
  wanted, given = flatten(known), flatten(config)
  for name, value in given.items():
    if is_free(name):
      parts = value if isinstance(value, tuple | list) else (value,)
      if not all(isinstance(part, _PLAIN) for part in parts):
        raise UserError(
            f'{name} must be a plain value (a number, text, True, False, None, '
            f'or a tuple of these), got {value!r}.')
    elif name not in wanted:
      raise UserError(unknown(name, wanted))
  for name in wanted:
    if name not in given:
      raise UserError(f'the config lacks the field {name!r}.')


def update(config: ml_collections.ConfigDict, values: dict[str, Any]) -> None:
  """Sets fields by dotted name; those in `USER_GROUPS` are created if absent.

  Raises:
    TypeError: for a value of another type than the field's.
  """
  config.update_from_flattened_dict(
      {name: value for name, value in values.items() if not is_free(name)})
  with config.unlocked():
    for name, value in values.items():
      if is_free(name):
        *groups, last = name.split('.')
        group = config
        for part in groups:
          if part not in group:
            group[part] = ml_collections.ConfigDict()
          group = group[part]
        group[last] = value
