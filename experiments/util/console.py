"""Argument parsing, one-line errors and text tables of the commands."""

import argparse
from collections.abc import Sequence
import sys
from typing import NoReturn


def complain(error: object) -> None:
  """Prints an error to stderr, on one line."""
  print('error:', ' '.join(str(error).split()), file=sys.stderr)


class Parser(argparse.ArgumentParser):
  """Exits with a one-line error and code 2 for an invalid argument."""

  def __init__(self, description: str) -> None:
    """Sets the description to the first line of a module's docstring."""
    super().__init__(
        description=description.split('\n')[0], allow_abbrev=False)

  def error(self, message: str) -> NoReturn:
    """Prints the message and exits with code 2."""
    complain(message)
    sys.exit(2)


def table(rows: Sequence[Sequence[str]]) -> str:
  """Formats text columns: a header row, the first column left-aligned."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for number, row in enumerate(rows):
    cells = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
    lines.append('  '.join(cells).rstrip())
    if number == 0:
      lines.append('  '.join('-' * width for width in widths))
  return '\n'.join(lines)
