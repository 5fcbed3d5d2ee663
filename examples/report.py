"""What the examples share: their arguments, one-line errors, and the table.

An example yields a `Row` for each method; rows of the same data are compared
seed by seed with the first of them:

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
    method: what was trained.
    accuracies: on test examples, in [0, 1], one for each seed.
    seconds: of all seeds together, compiling included.
  """

  data: str
  method: str
  accuracies: Sequence[float]
  seconds: float


class Parser(argparse.ArgumentParser):
  """Arguments of an example; a wrong one ends it with one line."""

  def __init__(self, description: str | None, *, seeds: int, steps: int):
    first_line = (description or '').split('\n')[0]
    super().__init__(description=first_line, allow_abbrev=False)
    self.add_argument(
        '--seeds', type=count, default=seeds,
        help=f'how many seeds, from 0 (default: {seeds})')
    self.add_argument(
        '--steps', type=count, default=steps,
        help=f'steps of training (default: {steps})')

  def error(self, message: str) -> NoReturn:
    """Leaves with one line on stderr."""
    print('error:', ' '.join(message.split()), file=sys.stderr)
    sys.exit(2)


def count(text: str) -> int:
  """A whole number >= 1, for argparse."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(
        f'must be a whole number >= 1, got {text!r}.')
  return int(text)


def size(text: str) -> float:
  """A finite number >= 0, for argparse."""
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
    data: the name of the data.
    methods: by name.
    seeds: how many seeds.
    train: `train(method, seed)` -> accuracy on the test examples of that seed.

  Yields:
    A row for each method.
  """
  for name, method in methods.items():
    start = time.perf_counter()
    accuracies = [float(train(method, seed)) for seed in range(seeds)]
    yield Row(data, name, accuracies, time.perf_counter() - start)


def show(table: Iterable[Row]) -> list[Row]:
  """Prints rows as they come and returns them.

  Accuracies are means over seeds in per cent, with their standard error where
  the seeds are several. The gain is the mean of the differences to the first
  row of the same data, seed by seed: both saw the same examples.
  """
  firsts: dict[str, Row] = {}
  done: list[Row] = []
  for row in table:
    if not done:  # an error before the first row leaves no head behind
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
  """Mean and standard error in per cent."""
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
  """Parses the arguments, compares, prints.

  Args:
    parser: of the example's arguments.
    compare: the parsed arguments -> rows.
    argv: the arguments; None for those of the command.

  Returns:
    The rows.
  """
  arguments = parser.parse_args(argv)
  try:
    return show(compare(arguments))
  except (ValueError, OSError) as error:
    parser.error(str(error))
