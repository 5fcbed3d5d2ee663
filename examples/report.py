"""Arguments, one-line errors and the table of the examples.

An example yields a `Row` per method. Rows on the same data are compared seed by
seed with the first one:

  >>> _ = show([Row('wine', 'plain', [0.90, 0.94], 2.0),
  ...           Row('wine', 'AWP', [0.92, 0.95], 3.0)])
  data      method         seeds   test accuracy   gain by seed   seconds
  wine      plain              2    92.00 ± 2.00                      2.0
  wine      AWP                2    93.50 ± 1.50   +1.50 ± 0.50       3.0
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import math
import statistics
import sys
import time
from typing import Any, NamedTuple, NoReturn, TypeVar

_WIDTHS = (10, 13, 7, 16, 15, 10)

M = TypeVar('M')


class Row(NamedTuple):
  """The result of one method on one data set.

  Attributes:
    data: the data set.
    method: name of the method.
    accuracies: on test examples, in [0, 1], one per seed.
    seconds: total over all seeds, including compilation.
  """

  data: str
  method: str
  accuracies: Sequence[float]
  seconds: float


class Parser(argparse.ArgumentParser):
  """Parser of an example; reports a wrong argument in one line."""

  def __init__(self, description: str | None, *, seeds: int, steps: int):
    first_line = (description or '').split('\n')[0]
    super().__init__(description=first_line, allow_abbrev=False)
    self.add_argument(
        '--seeds', type=count, default=seeds,
        help=f'number of seeds, from 0 (default: {seeds})')
    self.add_argument(
        '--steps', type=count, default=steps,
        help=f'training steps (default: {steps})')

  def error(self, message: str) -> NoReturn:
    """Prints one line to stderr and exits with status 2."""
    print('error:', ' '.join(message.split()), file=sys.stderr)
    sys.exit(2)


def count(text: str) -> int:
  """Parses a whole number >= 1, for argparse."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(
        f'must be a whole number >= 1, got {text!r}.')
  return int(text)


def size(text: str) -> float:
  """Parses a finite number >= 0, for argparse."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 <= value < math.inf:
    raise argparse.ArgumentTypeError(
        f'must be a finite number >= 0, got {text!r}.')
  return value


def rows(
    data: str, methods: Mapping[str, M], seeds: int,
    train: Callable[[M, int], float]) -> Iterator[Row]:
  """Trains every method on every seed.

  Args:
    data: name of the data set.
    methods: the methods by name.
    seeds: number of seeds.
    train: `train(method, seed)` -> accuracy on the test examples of that seed.

  Yields:
    A row per method.
  """
  for name, method in methods.items():
    start = time.perf_counter()
    accuracies = [float(train(method, seed)) for seed in range(seeds)]
    yield Row(data, name, accuracies, time.perf_counter() - start)


def show(table: Iterable[Row]) -> list[Row]:
  """Prints rows as they arrive and returns them.

  Accuracies are means over seeds in percent, with their standard error if there
  are several seeds. The gain is the mean difference, seed by seed, from the
  first row of the same data; both use the same examples.
  """
  firsts: dict[str, Row] = {}
  done: list[Row] = []
  for row in table:
    if not done:  # no header if an error precedes the first row
      _line('data', 'method', 'seeds', 'test accuracy', 'gain by seed',
            'seconds')
    first = firsts.setdefault(row.data, row)
    gains = [a - b for a, b in zip(
        row.accuracies, first.accuracies, strict=True)]
    _line(row.data, row.method, str(len(row.accuracies)),
          _spread(row.accuracies, ''), _spread(gains, '+') * (row is not first),
          f'{row.seconds:.1f}')
    done.append(row)
  return done


def _spread(values: Sequence[float], sign: str) -> str:
  """Formats mean and standard error in percent."""
  text = f'{100 * statistics.mean(values):{sign}.2f}'
  if len(values) > 1:
    error = statistics.stdev(values) / math.sqrt(len(values))
    text += f' ± {100 * error:.2f}'
  return text


def _line(*cells: str) -> None:
  padded = [
      cell.ljust(width) if column < 2 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))]
  print(''.join(padded).rstrip(), flush=True)


def run(
    parser: Parser, compare: Callable[[Any], Iterable[Row]],
    argv: Sequence[str] | None) -> list[Row]:
  """Parses the arguments, runs the comparison and prints its rows.

  Args:
    parser: parser of the example's arguments.
    compare: parsed arguments -> rows.
    argv: the arguments; None for `sys.argv`.

  Returns:
    The rows.
  """
  arguments = parser.parse_args(argv)
  try:
    return show(compare(arguments))
  except (ValueError, OSError) as error:
    parser.error(str(error))
