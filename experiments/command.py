"""What the scripts beside `main.py` share: arguments, and how they fail."""

import argparse
import sys
from typing import NoReturn


def complain(error: object) -> None:
  """Prints one line on stderr, whatever the error's text looks like."""
  print('error:', ' '.join(str(error).split()), file=sys.stderr)


class Parser(argparse.ArgumentParser):
  """Leaves with one line and exit code 2 for a wrong argument."""

  def __init__(self, description: str) -> None:
    """Takes the first line of a module's docstring."""
    super().__init__(
        description=description.split('\n')[0], allow_abbrev=False)

  def error(self, message: str) -> NoReturn:
    """Leaves."""
    complain(message)
    sys.exit(2)
