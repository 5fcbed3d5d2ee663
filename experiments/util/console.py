"""Argument parsing, one-line messages and text tables of the commands."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import io
import os
import signal
import sys
from typing import Any, NoReturn


def complain(error: object) -> None:
  """Prints an error to stderr, on one line."""
  print('error:', ' '.join(str(error).split()), file=sys.stderr)


@contextlib.contextmanager
def ended_by_signals(workdir: object) -> Iterator[None]:
  """Context in which SIGTERM or Ctrl-C ends the process with a line.

  It is for commands whose files are whole at any moment: nothing is cleaned up
  and no thread is waited for. The exit status is 128 plus the signal's number,
  as in a shell.

  Args:
    workdir: where the files are, for the line.

  Yields:
    Nothing.
  """

  def leave(number: int, frame: Any) -> None:
    del frame
    name = signal.Signals(number).name
    text = (f'\n{name}: stopped; run the same command to go on with what is in '
            f'{workdir}.\n')
    try:
      # Not `print`, which a signal may have interrupted; stdout may be closed.
      os.write(1, text.encode())
    except OSError:
      pass
    finally:
      os._exit(128 + number)

  if isinstance(sys.stdout, io.TextIOWrapper):
    # What was printed before is not lost in a buffer.
    sys.stdout.reconfigure(line_buffering=True)
  old: dict[signal.Signals, Any] = {}
  for number in (signal.SIGTERM, signal.SIGINT):
    # Shells let background jobs ignore Ctrl-C.
    if signal.getsignal(number) != signal.SIG_IGN:
      old[number] = signal.signal(number, leave)
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


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
