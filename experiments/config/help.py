"""The fields of `configs/base.py` with their comments, as text for `--help`."""

import inspect
import re

from experiments.config import schema
from experiments.configs import base

_GROUP = re.compile(r'  config\.(\w+) = ml_collections\.ConfigDict\(\{')
_FIELD = re.compile(r"  (?:config\.|    ')(\w+)'?(?: = |: )[^#]*(?:  # (.*))?")


def text(width: int = 44) -> str:
  """Lists each field's flag with its default and its comment.

  Comments above fields in the file are also printed above them.

  Args:
    width: width of the first column.

  Returns:
    The lines.
  """
  defaults = schema.flatten(base.get_config())
  group = ''
  lines: list[str] = []
  for line in inspect.getsource(base).splitlines():
    if match := _GROUP.fullmatch(line):
      group = f'{match[1]}.'
      if lines and not lines[-1].startswith('  #'):
        lines.append('')
    elif line.strip() == '})' or line.startswith('def '):
      group = ''
      lines.append('')
    elif line.lstrip().startswith('# '):
      if lines and lines[-1].startswith('  --'):
        lines.append('')
      lines.append(f'  {line.strip()}')
    elif (match := _FIELD.fullmatch(line)) and group + match[1] in defaults:
      name = group + match[1]
      flag = f'  --config.{name}={_shown(defaults[name])}'
      lines.append(f'{flag:<{width}}  {match[2] or ""}'.rstrip())
  return re.sub('\n\n+', '\n\n', '\n'.join(lines)).strip('\n')


def _shown(value: object) -> str:
  """A default as typed on the command line."""
  return f'"{value}"' if isinstance(value, tuple) else str(value)
