"""Mutation testing: finds small faults in a module that its tests miss.

  python benchmarks/mutation.py awp_jax/threat.py tests/awp_jax/threat_test.py

With `--output FILE` the survivors are stored; `--survivors_of FILE` runs them
again, after tests were added.

A mutant is the module with one change: another operator, comparison or
constant, swapped branches of a `where`, a dropped keyword, a removed check or
error. The tests run against each mutant in its own process, forked from one
that has imported jax and started no backend, so a mutant costs no imports. A
mutant survives if all tests pass. Tests that start other processes see the
unchanged module there and detect nothing.
"""

import argparse
import ast
from collections.abc import Callable, Iterator
import copy
import importlib.machinery
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from typing import Any, NamedTuple

_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)}
_NAMES = {
    'minimum': 'maximum', 'maximum': 'minimum', 'min': 'max', 'max': 'min',
    'argmax': 'argmin', 'argmin': 'argmax', 'sum': 'mean', 'mean': 'sum',
    'any': 'all', 'all': 'any', 'zeros_like': 'ones_like',
    'ones_like': 'zeros_like', 'zeros': 'ones', 'ones': 'zeros',
    'sqrt': 'square', 'square': 'sqrt', 'exp': 'log', 'log': 'exp',
    'floor': 'ceil', 'ceil': 'floor', 'sin': 'cos', 'cos': 'sin'}


class Mutant(NamedTuple):
  """A module with one change.

  Attributes:
    line: line of the change.
    change: the code before and after.
    source: the whole mutated module.
  """

  line: int
  change: str
  source: str


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
  """Yields the replacements of a node."""
  if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
    yield ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
  elif isinstance(node, ast.Compare):
    for i, operator in enumerate(node.ops):
      for other in _COMPARISONS[type(operator)]:
        operators = [*node.ops]
        operators[i] = other()
        yield ast.Compare(node.left, operators, node.comparators)
  elif isinstance(node, ast.BoolOp):
    other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield ast.BoolOp(other_op, node.values)
  elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
    yield node.operand
  elif isinstance(node, ast.If | ast.IfExp | ast.While) and isinstance(
      node.test, ast.Name | ast.Attribute | ast.Call):
    changed = copy.copy(node)
    changed.test = ast.UnaryOp(ast.Not(), node.test)
    yield changed
  elif isinstance(node, ast.Constant):
    yield from _constants(node)
  elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
    yield ast.Attribute(node.value, _NAMES[node.attr], node.ctx)
  elif isinstance(node, ast.Call):
    yield from _calls(node)
  elif isinstance(node, ast.Raise) or (
      isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
    yield ast.Pass()


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
  value = node.value
  if isinstance(value, bool):
    yield ast.Constant(not value)
  elif isinstance(value, int):
    yield ast.Constant(value + 1)
  elif isinstance(value, float):
    yield ast.Constant(value * 2 if value else 1.0)
  elif isinstance(value, str) and value.isidentifier():
    yield ast.Constant(f'X{value}')


def _calls(node: ast.Call) -> Iterator[ast.AST]:
  name = node.func.attr if isinstance(node.func, ast.Attribute) else ''
  if isinstance(node.func, ast.Name) and node.func.id in _NAMES:
    yield ast.Call(
        ast.Name(_NAMES[node.func.id], ast.Load()), node.args, node.keywords)
  if name == 'where' and len(node.args) == 3:
    condition, first, second = node.args
    yield ast.Call(node.func, [condition, second, first], node.keywords)
  for i in range(len(node.keywords)):
    yield ast.Call(
        node.func, node.args, node.keywords[:i] + node.keywords[i + 1:])


def _is_skipped(node: ast.AST, field: str) -> bool:
  """Whether a node is an annotation, decorator, docstring or message."""
  return (
      field in ('annotation', 'returns', 'decorator_list', 'bases')
      or isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom)
      or (isinstance(node, ast.Expr)
          and isinstance(node.value, ast.Constant)))


def _places(
    node: ast.AST, in_raise: bool = False
) -> Iterator[tuple[ast.AST, Callable[[ast.AST], None]]]:
  """Yields each node to mutate, with a function that replaces it."""
  in_raise = in_raise or isinstance(node, ast.Raise)
  for field, value in ast.iter_fields(node):
    several = isinstance(value, list)
    for i, child in enumerate(value if several else [value]):
      if not isinstance(child, ast.AST) or _is_skipped(child, field):
        continue

      def put(new: ast.AST, field: str = field, i: int = i,
              several: bool = several) -> None:
        if several:
          getattr(node, field)[i] = new
        else:
          setattr(node, field, new)

      if not in_raise:
        yield child, put
      yield from _places(child, in_raise)


def make_mutants(source: str) -> list[Mutant]:
  """Returns all mutants of a module, ordered by line."""
  tree = ast.parse(source)
  mutants = []
  for node, put in _places(tree):
    for new in _replacements(node):
      put(new)
      text = ast.unparse(ast.fix_missing_locations(tree))
      put(node)
      before, after = (
          ast.unparse(ast.fix_missing_locations(n)).split('\n')[0][:70]
          for n in (node, new))
      mutants.append(
          Mutant(getattr(node, 'lineno', 0), f'{before}  ->  {after}', text))
  return sorted(mutants, key=lambda mutant: mutant.line)


def _load_instead(path: pathlib.Path, source: str) -> None:
  """Makes imports of `path` compile `source`."""
  get_code = importlib.machinery.SourceFileLoader.get_code

  def changed(self: Any, name: str) -> Any:
    if pathlib.Path(self.get_filename(name)) == path:
      return compile(source, str(path), 'exec', dont_inherit=True)
    return get_code(self, name)

  importlib.machinery.SourceFileLoader.get_code = changed  # type: ignore


def _run_tests(path: pathlib.Path, source: str, options: list[str]) -> int:
  """Runs the tests silently in this process; returns the exit code."""
  import pytest

  _load_instead(path, source)
  silence = os.open(os.devnull, os.O_WRONLY)
  os.dup2(silence, 1)
  os.dup2(silence, 2)
  return int(pytest.main(
      ['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', *options]))


def _start(path: pathlib.Path, source: str, options: list[str]) -> int:
  child = os.fork()
  if child:
    return child
  os.setpgid(0, 0)
  try:
    code = _run_tests(path, source, options)
  except BaseException:
    code = 99
  os._exit(code)


def run_mutants(
    path: pathlib.Path, mutants: list[Mutant], options: list[str], jobs: int,
    limit: float) -> list[str]:
  """Returns 'killed', 'survived' or 'timeout' per mutant, in order."""
  verdicts, waiting = [''] * len(mutants), list(range(len(mutants)))[::-1]
  running: dict[int, tuple[int, float]] = {}
  while waiting or running:
    while waiting and len(running) < jobs:
      number = waiting.pop()
      child = _start(path, mutants[number].source, options)
      running[child] = number, time.monotonic()
    for child, (number, started) in list(running.items()):
      done, status = os.waitpid(child, os.WNOHANG)
      if done:
        code = os.waitstatus_to_exitcode(status)
        verdicts[number] = 'survived' if code == 0 else 'killed'
      elif time.monotonic() - started > limit:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        verdicts[number] = 'timeout'
      else:
        continue
      del running[child]
      if verdicts[number] == 'survived':
        mutant = mutants[number]
        print(f'survived: {path.name}:{mutant.line}: {mutant.change}',
              flush=True)
    time.sleep(0.02)
  return verdicts


def _select(
    mutants: list[Mutant], options: argparse.Namespace) -> list[Mutant]:
  """Returns the mutants that the command line asks for."""
  if options.lines:
    first, last = map(int, options.lines.split('-'))
    mutants = [m for m in mutants if first <= m.line <= last]
  if options.survivors_of:
    survivors = json.loads(options.survivors_of.read_text())['survivors']
    mutants = [m for m in mutants
               if {'line': m.line, 'change': m.change} in survivors]
    if len(mutants) < len(survivors):
      sys.exit(f'error: only {len(mutants)} of {len(survivors)} survivors of '
               f'{options.survivors_of} are in the module: it has changed.')
  if options.sample is not None and options.sample < len(mutants):
    drawn = random.Random(0).sample(range(len(mutants)), options.sample)
    mutants = [mutants[number] for number in sorted(drawn)]
  return mutants


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('module', type=pathlib.Path)
  parser.add_argument('tests', nargs='+', help='test files or pytest options')
  parser.add_argument('--jobs', type=int, default=2)
  parser.add_argument(
      '--lines', default='', help='range of lines to mutate, FIRST-LAST')
  parser.add_argument(
      '--sample', type=int, help='number of mutants to draw')
  parser.add_argument(
      '--survivors_of', type=pathlib.Path, metavar='JSON',
      help='run only the survivors of an earlier output; the module must be '
      'unchanged')
  parser.add_argument('--output', type=pathlib.Path, help='JSON file')
  return parser.parse_args()


def main() -> None:
  """Runs the mutants of one module; prints and stores the survivors."""
  options = _parse()
  path = options.module.resolve()
  for file in (path, options.survivors_of):
    if file is not None and not file.is_file():
      sys.exit(f'error: there is no file {file}.')
  sys.path.insert(0, os.getcwd())
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # Programs that a mutation does not affect are compiled once for all.
  cache = tempfile.TemporaryDirectory()
  os.environ.update({
      'JAX_COMPILATION_CACHE_DIR': cache.name,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'})
  import flax  # noqa: F401 (imported once for all forks)
  import jax  # noqa: F401
  import ml_collections  # noqa: F401
  import optax  # noqa: F401
  import pytest  # noqa: F401

  source = path.read_text()
  possible = make_mutants(source)
  mutants = _select(possible, options)
  unchanged = Mutant(0, 'nothing', source)
  started = time.monotonic()
  if run_mutants(path, [unchanged], options.tests, 1, 1e4) != ['survived']:
    sys.exit('error: the tests fail on the unchanged module.')
  limit = 30 + 5 * (time.monotonic() - started)
  started = time.monotonic()
  verdicts = run_mutants(path, mutants, options.tests, options.jobs, limit)
  seconds = time.monotonic() - started
  counts = {v: verdicts.count(v) for v in ('killed', 'timeout', 'survived')}
  print(f'{options.module}: {len(mutants)} of {len(possible)} mutants, '
        f'{counts}, {seconds:.0f} s')
  if options.output:
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({
        'module': str(options.module), 'tests': options.tests,
        'possible': len(possible), 'mutants': len(mutants), **counts,
        'seconds': round(seconds),
        'survivors': [
            {'line': m.line, 'change': m.change}
            for m, verdict in zip(mutants, verdicts, strict=True)
            if verdict == 'survived']}, indent=1) + '\n')


if __name__ == '__main__':
  main()
