"""Stopping a run by SIGTERM or Ctrl-C."""

import signal
from typing import Any


class StopRequest:
  """Context that records the first SIGTERM or SIGINT.

  A second signal has its usual effect.

  Attributes:
    name: name of the recorded signal, or None.
  """

  def __init__(self) -> None:
    """Installs no handler; entering the context does."""
    self.name: str | None = None
    self._old: dict[Any, Any] = {}

  def __enter__(self) -> 'StopRequest':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._handle)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self.name = signal.Signals(number).name
    signal.signal(number, self._old[number])

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
