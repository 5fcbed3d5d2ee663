"""Stopping a run by SIGTERM or Ctrl-C."""

import os
import signal
from typing import Any

from jax.experimental import multihost_utils

from experiments.parallel import processes


class StopRequest:
  """Context that records the first SIGTERM or SIGINT.

  A second signal has the effect it had outside of the context.

  One of several processes may get the signal, but all must stop at the same
  step. JAX catches SIGTERM in every process and lets them agree on a step.
  SIGINT is passed on to it.

  Attributes:
    name: name of the recorded signal, or None.
  """

  def __init__(self) -> None:
    """Installs no handler; entering the context does."""
    self.name: str | None = None
    self._old: dict[Any, Any] = {}
    self._asked = 0

  def __enter__(self) -> 'StopRequest':
    is_alone = processes.count() == 1
    for number in (signal.SIGTERM, signal.SIGINT) if is_alone else (
        signal.SIGINT,):
      self._old[number] = signal.signal(
          number, self._handle if is_alone else self._pass_on)
    return self

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    self.name = signal.Signals(number).name
    signal.signal(number, self._old[number])

  def _pass_on(self, number: int, frame: Any) -> None:
    del frame
    signal.signal(number, self._old[number])
    os.kill(os.getpid(), signal.SIGTERM)

  def agree(self) -> None:
    """Sets `name` at the step at which all processes stop.

    Every process calls it after each step.
    """
    if processes.count() == 1:
      return
    self._asked += 1
    if multihost_utils.reached_preemption_sync_point(self._asked):
      self.name = signal.SIGTERM.name

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)
