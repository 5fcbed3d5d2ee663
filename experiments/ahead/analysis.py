"""What a compiled program communicates, reuses and computes with.

All functions read the module from `hlo.parse`, after the compiler's own passes.
"""

from collections import Counter
import re
from typing import Any, NamedTuple

from experiments.ahead import hlo

_COLLECTIVES = (
    'all-reduce', 'all-gather', 'all-to-all', 'collective-broadcast',
    'collective-permute', 'ragged-all-to-all', 'reduce-scatter')

#: Instructions that move no data, or whose data their computations move.
_FREE = frozenset((
    'after-all', 'bitcast', 'call', 'conditional', 'constant',
    'get-tuple-element', 'iota', 'opt-barrier', 'parameter', 'partition-id',
    'replica-id', 'tuple', 'while'))

#: Instructions that read only the rows that they return.
_SLICES = frozenset(('dynamic-slice', 'gather', 'slice'))


class Memory(NamedTuple):
  """Memory of a program on each device, in bytes.

  Attributes:
    arguments: of the function.
    outputs: results that do not take the place of an argument.
    temporaries: intermediate results, where they overlap least.
    code: the program.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    """All kinds together."""
    return sum(self)


class Collective(NamedTuple):
  """A collective operation.

  Attributes:
    opcode: such as 'all-reduce'.
    bytes: of the arrays that each device contributes, each time.
    times: how often it runs in a step.
    loops: the loops around it.
  """

  opcode: str
  bytes: int
  times: int
  loops: tuple[hlo.Loop, ...]


class Convolution(NamedTuple):
  """A convolution.

  Attributes:
    dtypes: of its operands.
    precision: its operands' precision in HLO, such as 'highest'.
    times: how often it runs in a step.
    loops: the loops around it.
  """

  dtypes: tuple[str, ...]
  precision: str
  times: int
  loops: tuple[hlo.Loop, ...]


class Kernel(NamedTuple):
  """A kernel.

  Attributes:
    bytes: that it reads from and writes to the memory of the device.
    times: how often it runs in a step.
  """

  bytes: int
  times: int


def memory(compiled: Any) -> Memory:
  """The memory of a compiled program."""
  found = compiled.memory_analysis()
  return Memory(
      found.argument_size_in_bytes,
      found.output_size_in_bytes - found.alias_size_in_bytes,
      found.temp_size_in_bytes, found.generated_code_size_in_bytes)


def collectives(module: hlo.Module) -> list[Collective]:
  """The collective operations of a program; an asynchronous one counts once."""
  found = []
  for place in hlo.places(module):
    computation = module.computations[place.computation]
    for part in computation.values():
      opcode = part.opcode.removesuffix('-start')
      if opcode in _COLLECTIVES:
        size = sum(array.bytes for name in part.operands
                   for array in computation[name].arrays)
        found.append(Collective(opcode, size, place.times, place.loops))
  return found


def convolutions(module: hlo.Module) -> list[Convolution]:
  """The convolutions of a program, those of cuDNN included."""
  found = []
  for place in hlo.places(module):
    computation = module.computations[place.computation]
    for part in computation.values():
      if part.opcode == 'convolution' or '"__cudnn$conv' in part.attributes:
        precision = re.search(
            r'operand_precision=\{(\w+)', part.attributes)
        found.append(Convolution(
            tuple(computation[name].arrays[0].dtype
                  for name in part.operands[:2]),
            precision.group(1) if precision else 'default', place.times,
            place.loops))
  return found


def loops_of_convolutions(
    module: hlo.Module) -> list[tuple[hlo.Loop, ...]]:
  """The loops around convolutions, such as the attack; the outermost first."""
  return list(dict.fromkeys(
      part.loops for part in convolutions(module) if part.loops))


def reused_arguments(module: hlo.Module) -> set[int]:
  """Numbers of the arguments whose memory an output takes over."""
  start = module.header.find('input_output_alias={')
  if start < 0:
    return set()
  depth, position = 0, module.header.index('{', start)
  for end in range(position, len(module.header)):
    depth += {'{': 1, '}': -1}.get(module.header[end], 0)
    if depth == 0:
      break
  return {int(number) for number in re.findall(
      r'\((\d+), \{[^}]*\}', module.header[position:end])}


def kernels(module: hlo.Module) -> list[Kernel]:
  """The kernels of a program, and the bytes they move.

  An array that a kernel reads and one that it writes count in full, but only
  the rows that it selects of an array which it indexes. Asynchronous copies
  count at their start.
  """
  found = []
  for place in hlo.places(module):
    if place.is_fused:
      continue
    computation = module.computations[place.computation]
    for part in computation.values():
      if part.opcode not in _FREE and not part.opcode.endswith('-done'):
        found.append(Kernel(_moved(module, computation, part), place.times))
  return found


def _moved(
    module: hlo.Module, computation: dict[str, hlo.Instruction],
    part: hlo.Instruction) -> int:
  """Bytes that an instruction reads and writes."""
  written = _size(part)
  if part.opcode.endswith('-start'):  # its result repeats its operands
    return 2 * sum(_size(computation[name]) for name in part.operands)
  if part.opcode in _SLICES:
    return 2 * written
  inner = None
  if part.opcode == 'fusion':
    inner = module.computations[part.called['calls'][0]]
  return written + sum(
      _read(inner, number, _size(computation[name]))
      for number, name in enumerate(part.operands))


def _read(
    fused: dict[str, hlo.Instruction] | None, number: int, size: int) -> int:
  """Bytes that a fusion reads of its operand `number`, of `size` bytes."""
  if fused is None:
    return size
  name = next(part.name for part in fused.values()
              if part.opcode == 'parameter' and part.arguments == str(number))
  users = [part for part in fused.values() if name in part.operands]
  if users and all(
      part.opcode in _SLICES and part.operands[0] == name for part in users):
    return min(size, sum(_size(part) for part in users))
  return size


def _size(part: hlo.Instruction) -> int:
  return sum(array.bytes for array in part.arrays if not array.is_on_chip)


def compiler_cycles(module: hlo.Module) -> int:
  """Cycles of a step by the compiler's own cost model; 0 if it has none."""
  total = 0
  for place in hlo.places(module):
    if not place.is_fused:
      for part in module.computations[place.computation].values():
        cycles = re.search(r'"estimated_cycles":"(\d+)"', part.attributes)
        total += place.times * int(cycles.group(1)) if cycles else 0
  return total


def kinds(found: list[Convolution]) -> Counter[str]:
  """Number of convolutions in a program by dtype and precision."""
  return Counter(
      f'{"*".join(dict.fromkeys(part.dtypes))} {part.precision}'
      for part in found)
