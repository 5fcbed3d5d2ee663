"""The names of a table's runs, and the lists that it is asked for.

A run is known by its folder's name: the stem of its config, the config's
argument behind a plus, and the seed, as in `cifar10_awp+L2-seed0`.
"""

import pathlib
import re
from typing import NamedTuple

from experiments.util.errors import UserError

_NAME = re.compile(
    r'(?P<stem>[^+]+)(?:\+(?P<argument>[^+]+))?-seed(?P<seed>0|[1-9][0-9]*)')
_CONFIG = re.compile(
    r'(?:.*/)?(?P<stem>[^/+:]+)\.py(?::(?P<argument>[^/+:]+))?')


class Job(NamedTuple):
  """A config and a seed.

  Attributes:
    config: the path of the config's file, maybe with an argument behind a
      colon, as `main.py --config` takes it.
    seed: of the run.
  """

  config: str
  seed: int

  @property
  def name(self) -> str:
    """Of the run's folder."""
    return f'{label_of(self.config).replace(":", "+")}-seed{self.seed}'


def label_of(config: str) -> str:
  """`cifar10_awp:L2` for `some/folder/cifar10_awp.py:L2`.

  Raises:
    UserError: for what is no path of a config.
  """
  match = _CONFIG.fullmatch(config)
  if match is None:
    raise UserError(
        f'{config!r} is no config: it must be the path of a .py file, with an '
        "argument behind a colon if it takes one, and no '+' in either.")
  return ':'.join(filter(None, match.groups()))


def parse_name(name: str) -> tuple[str, int] | None:
  """(label, seed) of a folder's name; None if it is none of a sweep."""
  match = _NAME.fullmatch(name)
  if match is None:
    return None
  return ':'.join(filter(None, match.group(1, 2))), int(match['seed'])


def parse_configs(text: str) -> list[str]:
  """Splits a list of configs at its commas, but not within an argument.

  Args:
    text: such as 'a.py,b.py:L2,WRN-34-10,c.py', which is three configs.

  Returns:
    The configs; each file exists.

  Raises:
    UserError: for what is no config, and for two of the same name.
  """
  configs: list[str] = []
  for part in text.split(','):
    if configs and ':' in configs[-1] and not re.search(r'\.py(:|$)', part):
      configs[-1] += f',{part}'
    else:
      configs.append(part)
  labels = [label_of(config) for config in configs]
  for config, label in zip(configs, labels, strict=True):
    if not pathlib.Path(config.partition(':')[0]).is_file():
      raise UserError(f'--configs: there is no file {config!r}.')
    if labels.count(label) > 1:
      raise UserError(f'--configs names {label!r} more than once.')
  return configs


def parse_seeds(text: str) -> list[int]:
  """Whole numbers, each once, from a list like '0,1,2'."""
  parts = text.split(',')
  if not all(re.fullmatch('0|[1-9][0-9]*', part) for part in parts) or (
      len(set(parts)) < len(parts)):
    raise UserError(
        f"--seeds must be different whole numbers like '0,1,2', got {text!r}.")
  return [int(part) for part in parts]
