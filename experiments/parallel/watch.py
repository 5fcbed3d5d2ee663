"""Ends all processes of a run when one of them fails.

A process that waits for a lost one in a collective operation would wait forever
or fail without naming the cause. Here every process reports each second that it
runs. A failing process leaves its error with the coordination service before it
ends. The others print that error, or that a process is silent, and end too.
"""

import os
import sys
import threading
import time
from typing import Any, NoReturn

#: Seconds between reports.
_EVERY = 1.0

#: Seconds without a report after which a process counts as lost. Compilation
#: and file operations do not stop the thread that reports.
PATIENCE = 30.0

#: Seconds that a failing process waits for the others to read its error.
_GRACE = 10.0

_FOLDER = 'awp_jax/watch'


class _Watch:
  """Reports this process to the others, and watches them."""

  def __init__(self, client: Any, index: int, count: int) -> None:
    """Watches nothing before `run`."""
    self._client, self._index, self._count = client, index, count
    self._done = threading.Event()
    self._seen: dict[str, tuple[str, float]] = {}
    self._failing = threading.Event()

  def run(self) -> None:
    """Reports and watches until `stop`; the body of the thread."""
    number, reached = 0, time.monotonic()
    while not self._done.wait(_EVERY):
      number += 1
      try:
        self._client.key_value_set(
            f'{_FOLDER}/alive/{self._index}', str(number), allow_overwrite=True)
        failed = self._client.key_value_dir_get(f'{_FOLDER}/failed/')
        alive = self._client.key_value_dir_get(f'{_FOLDER}/alive/')
        reached = time.monotonic()
      except RuntimeError:  # raised by the service's connection
        if time.monotonic() - reached > PATIENCE:
          self._leave('process 0 cannot be reached: it has ended, or its '
                      'machine is lost')
        continue
      self._act_on_failures(failed)
      self._act_on_silence(alive)

  def _act_on_failures(self, failed: list[tuple[str, str]]) -> None:
    """Ends this process if another has left an error."""
    for key, message in failed:
      number = key.rpartition('/')[2]
      if number != str(self._index) and not self._failing.is_set():
        self._client.key_value_set(
            f'{_FOLDER}/read/{self._index}', '', allow_overwrite=True)
        self._leave(f'process {number} failed: {message}')

  def _act_on_silence(self, alive: list[tuple[str, str]]) -> None:
    """Ends this process if another has not reported for too long."""
    now = time.monotonic()
    for number in map(str, range(self._count)):
      self._seen.setdefault(number, ('', now))
    for key, report in alive:
      number = key.rpartition('/')[2]
      if self._seen[number][0] != report:
        self._seen[number] = report, now
    for number, (_, since) in self._seen.items():
      if now - since > PATIENCE:
        self._leave(
            f'process {number} has been silent for {PATIENCE:.0f} s: it was '
            'killed, or its machine is lost')

  def _leave(self, message: str) -> NoReturn:
    """Ends this process, also out of an operation that cannot be stopped."""
    print(f'error: {message}. Process {self._index} ends too; the same command '
          'resumes from the last checkpoint.', file=sys.stderr, flush=True)
    os._exit(1)

  def fail(self, message: str, code: int) -> NoReturn:
    """Leaves an error for the others and ends this process."""
    self._failing.set()
    try:
      self._client.key_value_set(
          f'{_FOLDER}/failed/{self._index}', message, allow_overwrite=True)
      # The service ends with process 0, so wait until the others have read.
      until = time.monotonic() + _GRACE
      while time.monotonic() < until and len(
          self._client.key_value_dir_get(f'{_FOLDER}/read/')
          ) < self._count - 1:
        time.sleep(0.1)
    except RuntimeError:  # the service has ended before
      pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def stop(self) -> None:
    """Ends the thread."""
    self._done.set()


_CURRENT: list[_Watch] = []


def start(client: Any, index: int, count: int) -> None:
  """Starts a thread that watches the other processes.

  Args:
    client: of the coordination service.
    index: number of this process.
    count: number of processes.
  """
  watch = _Watch(client, index, count)
  _CURRENT.append(watch)
  threading.Thread(target=watch.run, daemon=True, name='watch').start()


def stop() -> None:
  """Ends the watch, before the processes disconnect."""
  _CURRENT.pop().stop()


def fail(message: str, code: int) -> NoReturn:
  """Leaves an error for the other processes and ends this one.

  Args:
    message: the error, on one line.
    code: exit status.
  """
  _CURRENT[-1].fail(message, code)
