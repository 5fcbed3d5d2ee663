"""The jobs of a sweep: names of runs, and parsing of the command's lists.

A run's name is that of its folder: the stem of the config's file, a plus and
the config's argument if there is one, the varied fields, each after an @, and
the seed, as in `cifar10_awp+L2-seed0` and
`cifar10_awp@awp.gamma=0.01-seed0`. A slash in a value is written as %2F.
"""

from collections.abc import Sequence
import itertools
import pathlib
import re
from typing import NamedTuple
import urllib.parse

from experiments.util import paths
from experiments.util.errors import UserError

_NAME = re.compile(
    r'(?P<stem>[^+@]+)(?:\+(?P<argument>[^+@]+))?'
    r'(?P<varied>(?:@[\w.]+=[^@]*)*)-seed(?P<seed>0|[1-9][0-9]*)')
_CONFIG = re.compile(
    r'(?:.*/)?(?P<stem>[^/+:@]+)\.py(?::(?P<argument>[^/+:@]+))?')

#: Limit of file systems, less the length of '.stderr'.
_LONGEST_NAME = 255 - 7

#: Varied fields and their values, as on the command line.
Varied = tuple[tuple[str, str], ...]


class Job(NamedTuple):
  """A config, a seed and varied fields.

  Attributes:
    config: the path of the config's file, optionally with a colon and an
      argument, as for `main.py --config`.
    seed: of the run.
    varied: fields that differ between runs of the config.
  """

  config: str
  seed: int
  varied: Varied = ()

  @property
  def name(self) -> str:
    """The name of the run's folder."""
    varied = ''.join(
        f'@{field}={paths.file_name(value)}'
        for field, value in self.varied)
    label = label_of(self.config).replace(':', '+')
    return f'{label}{varied}-seed{self.seed}'


class Name(NamedTuple):
  """What the name of a run's folder says.

  Attributes:
    label: of its config, such as 'cifar10_awp:L2'.
    seed: of the run.
    varied: as in `Job`.
  """

  label: str
  seed: int
  varied: Varied = ()

  @property
  def row(self) -> str:
    """The name of its row in the table."""
    return row_name(self.label, self.varied)


def row_name(label: str, varied: Varied) -> str:
  """Returns 'cifar10_awp, awp.gamma=0.01' for its two parts."""
  return ', '.join([label, *(f'{field}={value}' for field, value in varied)])


def label_of(config: str) -> str:
  """Returns `cifar10_awp:L2` for `some/folder/cifar10_awp.py:L2`.

  Raises:
    UserError: if it is not the path of a config.
  """
  match = _CONFIG.fullmatch(config)
  if match is None:
    raise UserError(
        f'{config!r} is not a config: it must be the path of a .py file, '
        "optionally followed by a colon and an argument, without '+' and '@'.")
  return ':'.join(filter(None, match.groups()))


def parse_name(name: str) -> Name | None:
  """Parses a folder's name; None if it is not that of a run."""
  match = _NAME.fullmatch(name)
  if match is None:
    return None
  varied = []
  for part in match['varied'].split('@')[1:]:
    field, _, value = part.partition('=')
    varied.append((field, urllib.parse.unquote(value)))
  return Name(
      ':'.join(filter(None, match.group(1, 2))), int(match['seed']),
      tuple(varied))


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


def parse_varied(texts: Sequence[str]) -> list[Varied]:
  """Combines the values of one or more --vary options.

  Args:
    texts: such as 'awp.gamma=0.005,0.01' and 'weight_perturbation=awp,
      rwp(gamma=0.01,c_min=1.7)'. Commas in brackets and quotes are part of a
      value.

  Returns:
    Every combination of one value for each field, the last field changing
    fastest; a single empty one without texts.

  Raises:
    UserError: for other text, and for a field or a value given twice.
  """
  lists: list[list[tuple[str, str]]] = []
  for text in texts:
    field, mark, values = text.partition('=')
    parts = _split(values)
    if not mark or not re.fullmatch(r'[\w.]+', field) or not all(parts):
      raise UserError(
          '--vary must be a field and its values like '
          f"'awp.gamma=0.005,0.01', got {text!r}.")
    if len(set(parts)) < len(parts):
      raise UserError(f'--vary={text} has a value more than once.')
    if any(field == known[0][0] for known in lists):
      raise UserError(f'--vary has {field!r} more than once.')
    lists.append([(field, part) for part in parts])
  return list(itertools.product(*lists))


def _split(text: str) -> list[str]:
  """Splits at commas outside of brackets and quotes.

  Spaces around a part, and quotes around a whole part, are stripped.
  """
  parts, depth, quote = [''], 0, ''
  for character in text:
    if quote:
      quote = '' if character == quote else quote
    elif character in '\'"':
      quote = character
    else:
      depth += (character in '([{') - (character in ')]}')
    if character == ',' and depth <= 0 and not quote:
      parts.append('')
    else:
      parts[-1] += character
  stripped = [part.strip() for part in parts]
  return [part[1:-1] if re.fullmatch(r"""'[^']*'|"[^"]*\"""", part) else part
          for part in stripped]


def make(
    configs: Sequence[str], seeds: Sequence[int], varied: Sequence[Varied]
) -> list[Job]:
  """Every config with every combination of values, seed by seed.

  Raises:
    UserError: if the name of a run would be too long for a file system.
  """
  made = [
      Job(config, seed, values)
      for seed in seeds for config in configs for values in varied]
  for job in made:
    if len(job.name.encode()) > _LONGEST_NAME:
      raise UserError(
          f'--vary makes the name of a run longer than {_LONGEST_NAME} bytes: '
          f'{job.name!r}. Write a config file for it.')
  return made
