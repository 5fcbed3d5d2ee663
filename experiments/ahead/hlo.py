"""Reads the text of an optimized HLO module.

  >>> module = parse('''
  ... HloModule two, input_output_alias={ {}: (0, {}, may-alias) }
  ...
  ... ENTRY %main (x: f32[2,3]) -> f32[2,3] {
  ...   %x = f32[2,3]{1,0} parameter(0)
  ...   ROOT %y = f32[2,3]{1,0} add(%x, %x), metadata={op_name="add"}
  ... }
  ... ''')
  >>> [(part.name, part.opcode, part.operands) for part in module.entry]
  [('x', 'parameter', ()), ('y', 'add', ('x', 'x'))]
  >>> module.entry[1].arrays[0].bytes
  24
"""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

_BITS = {
    'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
    'f16': 16, 'bf16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64,
    'u64': 64, 'f64': 64, 'c64': 64, 'c128': 128}

_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
    r'(calls|to_apply|body|condition|branch_computations|'
    r'called_computations|true_computation|false_computation)='
    r'(\{[^}]*\}|%[\w.\-]+)')


class Array(NamedTuple):
  """One array of an instruction's result.

  Attributes:
    dtype: as HLO writes it, such as 'bf16'.
    shape: its dimensions.
    is_on_chip: whether it is in a TPU's vector memory, not in HBM.
  """

  dtype: str
  shape: tuple[int, ...]
  is_on_chip: bool

  @property
  def bytes(self) -> int:
    """Its size without padding; 0 for tokens and other opaque types."""
    return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name: without the percent sign.
    opcode: such as 'fusion'.
    arrays: those of its result, of which a tuple has several.
    operands: names of instructions in the same computation.
    arguments: the text in its parentheses.
    attributes: the text behind them.
    is_root: whether it is the result of the computation.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  arguments: str
  attributes: str
  is_root: bool

  @property
  def called(self) -> dict[str, tuple[str, ...]]:
    """Names of computations by attribute, such as 'body'."""
    return {key: tuple(name.strip().lstrip('%')
                       for name in names.strip('{}').split(','))
            for key, names in _CALLED.findall(self.attributes)}


class Module(NamedTuple):
  """An HLO module.

  Attributes:
    header: its first line.
    computations: instructions by the name of their computation.
    entry_name: the computation that runs first.
  """

  header: str
  computations: dict[str, dict[str, Instruction]]
  entry_name: str

  @property
  def entry(self) -> list[Instruction]:
    """The instructions of the entry computation."""
    return list(self.computations[self.entry_name].values())


class Loop(NamedTuple):
  """A `while` loop.

  Attributes:
    body: the name of its body.
    trips: the number of iterations, or None if it is unknown.
  """

  body: str
  trips: int | None


class Place(NamedTuple):
  """A computation as it is reached from the entry.

  Attributes:
    computation: its name.
    times: how often it runs in a step; loops of unknown length count once.
    loops: the loops around it, the outermost first.
    is_fused: whether it is inside one kernel.
  """

  computation: str
  times: int
  loops: tuple[Loop, ...]
  is_fused: bool


def parse(text: str) -> Module:
  """Parses `compiled.as_text()`.

  Args:
    text: of an optimized module.

  Returns:
    The module.

  Raises:
    ValueError: if it has no entry computation.
  """
  header, entry = '', ''
  computations: dict[str, dict[str, Instruction]] = {}
  current: dict[str, Instruction] = {}
  for line in text.splitlines():
    if line.startswith('HloModule'):
      header = line
    elif found := _HEADER.match(line):
      current = computations.setdefault(found.group(2), {})
      entry = found.group(2) if found.group(1) else entry
    elif found := _INSTRUCTION.match(line):
      instruction = _instruction(*found.groups())
      current[instruction.name] = instruction
  if not entry:
    raise ValueError('the text is not an HLO module with an entry.')
  return Module(header, computations, entry)


def arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a type, such as `(f32[2]{0}, s32[])`."""
  return tuple(
      Array(dtype, tuple(int(size) for size in sizes.split(',') if size),
            'S(1)' in layout)
      for dtype, sizes, layout in _ARRAY.findall(text))


def _instruction(root: str | None, name: str, text: str) -> Instruction:
  end = _matching(text, 0) if text.startswith('(') else text.index(' ')
  kind, rest = text[:end], text[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  close = _matching(rest, len(opcode))
  arguments = rest[len(opcode) + 1:close - 1]
  return Instruction(
      name, opcode, arrays(kind), tuple(_NAME.findall(arguments)), arguments,
      rest[close:], bool(root))


def _matching(text: str, start: int) -> int:
  """The position behind the parenthesis that closes the one at `start`."""
  depth = 0
  for position in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[position], 0)
    if depth == 0:
      return position + 1
  raise ValueError(f'unbalanced parentheses: {text[start:start + 80]!r}')


def places(module: Module) -> Iterator[Place]:
  """Every computation that runs, once for each way it is reached.

  Args:
    module: the module.

  Yields:
    The places; reducers, comparators and conditions of loops are left out.
  """
  yield from _places_from(
      module, Place(module.entry_name, 1, (), is_fused=False))


def _places_from(module: Module, place: Place) -> Iterator[Place]:
  yield place
  for instruction in module.computations[place.computation].values():
    called = instruction.called
    if instruction.opcode == 'while':
      loop = Loop(called['body'][0], trip_count(module, instruction))
      inner = place._replace(
          computation=loop.body, times=place.times * (loop.trips or 1),
          loops=(*place.loops, loop))
      yield from _places_from(module, inner)
      continue
    for attribute, names in called.items():
      if attribute == 'to_apply' and instruction.opcode != 'call':
        continue
      for name in names:
        yield from _places_from(module, place._replace(
            computation=name,
            is_fused=place.is_fused or instruction.opcode in (
                'fusion', 'custom-call')))


def trip_count(module: Module, loop: Instruction) -> int | None:
  """The number of iterations of a `while`, or None if it is not a constant.

  It is in the instruction (GPU, CPU) or in the comparison of its condition,
  whose counter starts from 0 in the loops that JAX writes (TPU).
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if known:
    return int(known.group(1))
  condition = module.computations[loop.called['condition'][0]]
  root = next(part for part in condition.values() if part.is_root)
  if root.opcode != 'compare' or 'direction=LT' not in root.attributes:
    return None
  bounds = [condition[name].arguments for name in root.operands
            if condition[name].opcode == 'constant']
  return int(bounds[0]) if len(bounds) == 1 else None
