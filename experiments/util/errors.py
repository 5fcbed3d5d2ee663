"""Errors that the user can fix; the commands print them on one line.

Any other exception is a bug, in this code or in a user's network, and keeps its
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
  """Converts any ValueError to a `UserError`; also a decorator.

  For code that only checks user input. Do not use it around code that runs a
  network, where a ValueError is a bug.
  """
  try:
    yield
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error
