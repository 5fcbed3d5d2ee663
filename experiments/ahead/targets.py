"""Names of targets, such as v5e:2x4 and h100:8, and their devices.

  >>> target = parse('h100:16')
  >>> target.num_devices, target.num_hosts, target.topology
  (16, 2, '1x2x8')
  >>> parse('v5p:2x2x2').num_devices
  8
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from experiments.ahead import chips
from experiments.util.errors import UserError

#: Slices of v5e and v6e (https://docs.cloud.google.com/tpu/docs/v6e).
_SLICES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_GPUS_PER_HOST = 8
_CHIPS_PER_HOST = 4

#: Modules of the extra, by platform.
_MODULES = {
    'tpu': ('libtpu',),
    'gpu': ('jax_cuda13_plugin', 'jax_plugins.xla_cuda13', 'nvidia.cu13')}

#: Without these the compilers look for chips, or for other processes.
_ENVIRONMENT = {
    'tpu': {
        'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'},
    'gpu': {
        'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1', 'CUDA_VISIBLE_DEVICES': '-1'}}

EXAMPLES = 'v5e:2x4, v5p:2x2x1, v6e:2x2, a100:8, h100:8, h200:1'


class Target(NamedTuple):
  """Chips to compile for.

  Attributes:
    name: as given.
    chip: each of them.
    num_devices: their number.
    num_hosts: number of machines that hold them.
    topology: their arrangement, in the form of the platform.
  """

  name: str
  chip: chips.Chip
  num_devices: int
  num_hosts: int
  topology: str


def parse(name: str) -> Target:
  """Parses and checks the name of a target.

  Args:
    name: CHIP:SHAPE for TPUs, such as v5e:2x4, and CHIP:NUMBER for GPUs.

  Returns:
    The target.

  Raises:
    UserError: for an unknown chip or an impossible shape.
  """
  kind, _, shape = name.partition(':')
  if kind not in chips.CHIPS:
    raise UserError(
        f'--target={name}: the chip must be one of {", ".join(chips.CHIPS)}, '
        f'followed by their arrangement, for instance {EXAMPLES}.')
  chip = chips.CHIPS[kind]
  if chip.platform == 'gpu':
    return _gpus(name, chip, shape)
  return _slice(name, chip, shape)


def _gpus(name: str, chip: chips.Chip, shape: str) -> Target:
  if not re.fullmatch('[1-9][0-9]*', shape):
    raise UserError(
        f'--target={name}: the number of GPUs must follow the colon, as in '
        f'{chip.name}:8.')
  number = int(shape)
  if number > _GPUS_PER_HOST and number % _GPUS_PER_HOST:
    raise UserError(
        f'--target={name}: more than {_GPUS_PER_HOST} GPUs are machines of '
        f'{_GPUS_PER_HOST}, so their number must be a multiple of it.')
  hosts = max(number // _GPUS_PER_HOST, 1)
  return Target(name, chip, number, hosts, f'1x{hosts}x{number // hosts}')


def _slice(name: str, chip: chips.Chip, shape: str) -> Target:
  three = chip.name == 'v5p'
  sizes = re.fullmatch('([1-9][0-9]*)x([1-9][0-9]*)' + (
      'x([1-9][0-9]*)' if three else ''), shape)
  if not sizes or (not three and shape not in _SLICES):
    allowed = 'for instance 2x2x1 or 2x2x2' if three else ', '.join(_SLICES)
    raise UserError(
        f'--target={name}: the slices of {chip.name} are {allowed}.')
  number = math.prod(map(int, sizes.groups()))
  return Target(
      name, chip, number, -(-number // _CHIPS_PER_HOST), name)


def _has_module(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # of a parent package
    return False


def missing(target: Target) -> list[str]:
  """Modules of the extra `aot` that the target needs and that are absent."""
  return [name for name in _MODULES[target.chip.platform]
          if not _has_module(name)]


def check_installed(target: Target) -> None:
  """Raises UserError unless the compiler of the target is installed."""
  if absent := missing(target):
    raise UserError(
        f'--target={target.name} needs {", ".join(absent)}: pip install '
        '"awp_jax[aot]" (in a clone, pip install -e ".[aot]"), with Python '
        '3.12 or later.')


def devices(target: Target) -> Any:
  """The devices of a target, none of which is there.

  Args:
    target: from `parse`; its compiler is installed.

  Returns:
    A list of devices that programs can be compiled for.

  Raises:
    UserError: if the platform has no such arrangement.
  """
  import jax
  from jax.experimental import topologies

  for variable, value in _ENVIRONMENT[target.chip.platform].items():
    os.environ.setdefault(variable, value)
  try:
    if target.chip.platform == 'tpu':
      found = topologies.get_topology_desc(
          platform='tpu', topology_name=target.topology)
    else:
      found = topologies.get_topology_desc(
          '', 'cuda', target_config=chips.target_config(target.chip),
          topology=target.topology)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'--target={target.name}: {error}') from error
  return found.devices
