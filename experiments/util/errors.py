"""Errors that the user can mend; the commands show them in one line.

Any other exception is a bug, of this code or of a user's network, and keeps its
traceback.

  >>> with user_errors():
  ...   raise ValueError('epochs must be a whole number >= 1, got 0.')
  Traceback (most recent call last):
    ...
  experiments.util.errors.UserError: epochs must be a whole number >= 1, got 0.
"""

from collections.abc import Iterator
import contextlib


class UserError(ValueError):
  """A flag, config value, file or folder that cannot be used."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
  """Raises a `UserError` in place of any ValueError; also a decorator.

  For code that only checks what the user gave. Code that runs a network does
  not belong within: its ValueErrors are bugs.
  """
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error
