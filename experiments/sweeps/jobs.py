"""The jobs of a sweep: names of runs, and parsing of --configs and --seeds.

A run's name is that of its folder: the stem of the config's file, a plus and
the config's argument if there is one, and the seed, as in
`cifar10_awp+L2-seed0`.
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
    config: the path of the config's file, optionally with a colon and an
      argument, as for `main.py --config`.
    seed: of the run.
  """

  config: str
  seed: int

  @property
  def name(self) -> str:
    """The name of the run's folder."""
    return f'{label_of(self.config).replace(":", "+")}-seed{self.seed}'


def label_of(config: str) -> str:
  """Returns `cifar10_awp:L2` for `some/folder/cifar10_awp.py:L2`.

  Raises:
    UserError: if it is not the path of a config.
  """
  match = _CONFIG.fullmatch(config)
  if match is None:
    raise UserError(
        f'{config!r} is not a config: it must be the path of a .py file, '
        "optionally followed by a colon and an argument, without a '+'.")
  return ':'.join(filter(None, match.groups()))


def parse_name(name: str) -> tuple[str, int] | None:
  """(label, seed) of a folder's name, or None if it is not a run's name."""
  match = _NAME.fullmatch(name)
  if match is None:
    return None
  return ':'.join(filter(None, match.group(1, 2))), int(match['seed'])


def parse_configs(text: str) -> list[str]:
  """Splits a list of configs at the commas between them.

  Args:
    text: such as 'a.py,b.py:L2,WRN-34-10,c.py', which has three configs; the
      second has an argument with a comma.

  Returns:
    The configs; each file exists.

  Raises:
    UserError: for an invalid config, and for two of the same name.
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
      raise UserError(f'--configs contains {label!r} more than once.')
  return configs


def parse_seeds(text: str) -> list[int]:
  """Distinct whole numbers from a list like '0,1,2'."""
  parts = text.split(',')
  if not all(re.fullmatch('0|[1-9][0-9]*', part) for part in parts) or (
      len(set(parts)) < len(parts)):
    raise UserError(
        f"--seeds must be distinct whole numbers like '0,1,2', got {text!r}.")
  return [int(part) for part in parts]
