"""The processes of a run: how they start, agree, and end.

Every process runs the same program on its own devices. Process 0, the main
process, writes the files of the run and prints. The processes exchange small
values through the coordination service of `jax.distributed`, which unlike a
collective operation does not occupy devices.

With one process, everything here returns at once.
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import jax
from jax._src import distributed

from experiments.parallel import watch
from experiments.util.errors import UserError

#: Milliseconds of one wait for another process.
_POLL = 1000

#: Numbers the agreements, equally in every process.
_NUMBERS = itertools.count()


def _client() -> Any:
  # JAX has no public interface to its key-value store; orbax uses the same.
  return distributed.global_state.client


def start(
    coordinator: str | None, num_processes: int | None,
    process_id: int | None, *, automatic: bool = False,
    catches_sigterm: bool = True) -> None:
  """Connects the processes of a run; must precede any computation.

  The main process alone prints to stdout from here on.

  Args:
    coordinator: 'host:port' of process 0.
    num_processes: number of processes.
    process_id: number of this process, from 0.
    automatic: take the three from the cluster (Cloud TPU, Slurm, ...).
    catches_sigterm: whether SIGTERM is left to
      `multihost_utils.reached_preemption_sync_point`; otherwise it ends this
      process, and with it the others.

  Raises:
    UserError: if some are missing or out of range, or if process 0 cannot be
      reached.
  """
  given = (coordinator, num_processes, process_id)
  if automatic and given != (None, None, None):
    raise UserError(
        '--distributed finds the processes of the cluster by itself; omit '
        '--coordinator, --num_processes and --process_id.')
  if not automatic:
    if given == (None, None, None):
      return
    _check(*given)
  # The default on some versions is to refuse several processes on CPUs.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    if automatic and 'coordinator_address' in reason:
      reason = (
          'no cluster was found; set --coordinator, --num_processes and '
          '--process_id instead of --distributed')
    raise UserError(
        f'the processes could not be connected: {reason}.') from error
  if count() == 1:
    return
  watch.start(_client(), index(), count())
  if not catches_sigterm:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
  if not is_main():
    sys.stdout = open(os.devnull, 'w')


def _check(
    coordinator: str | None, num_processes: int | None,
    process_id: int | None) -> None:
  """Raises UserError unless the three flags describe a process."""
  if coordinator is None or num_processes is None or process_id is None:
    raise UserError(
        '--coordinator, --num_processes and --process_id must be set '
        f'together, got {coordinator!r}, {num_processes!r} and {process_id!r}.')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError(
        "--coordinator must be 'host:port' of process 0, such as "
        f"'10.0.0.2:8476', got {coordinator!r}.")
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise UserError(
        '--process_id must be in [0, num_processes), got '
        f'{process_id} of {num_processes}.')


def count() -> int:
  """Number of processes."""
  return distributed.global_state.num_processes


def index() -> int:
  """Number of this process, from 0."""
  return distributed.global_state.process_id


def is_main() -> bool:
  """Whether this process writes the files of the run."""
  return index() == 0


def shows_progress() -> bool:
  """Whether this process draws progress bars: the main one, in a terminal."""
  return is_main() and sys.stderr.isatty()


def gather(value: Any) -> list[Any]:
  """The values of all processes, in their order; waits for all of them.

  Args:
    value: of this process, as JSON.

  Returns:
    One value per process.
  """
  if count() == 1:
    return [json.loads(json.dumps(value))]
  name = f'awp_jax/values/{next(_NUMBERS)}'
  _client().key_value_set(f'{name}/{index()}', json.dumps(value))
  return [_wait_for(f'{name}/{number}') for number in range(count())]


def _wait_for(key: str) -> Any:
  """The value of a key, once another process sets it."""
  while True:
    # Short calls: Python handles Ctrl-C only between them.
    try:
      return json.loads(_client().blocking_key_value_get(key, _POLL))
    except jax.errors.JaxRuntimeError as error:
      # A lost process is noticed by `watch`, which ends this one.
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def from_main(fn: Callable[[], Any]) -> Any:
  """Calls a function in the main process and gives its result to all.

  Args:
    fn: a function whose result is JSON.

  Returns:
    The result, in every process.
  """
  if count() == 1:
    return json.loads(json.dumps(fn()))
  name = f'awp_jax/from_main/{next(_NUMBERS)}'
  if is_main():
    _client().key_value_set(name, json.dumps(fn()))
  return _wait_for(name)


def on_main(fn: Callable[[], object]) -> None:
  """Calls a function in the main process; the others wait for its end."""

  def call() -> None:
    fn()

  from_main(call)


def check_equal(what: str, facts: dict[str, Any]) -> None:
  """Raises UserError unless all processes have the same facts.

  Args:
    what: what the facts describe, for the message.
    facts: JSON values by name.
  """
  first, *others = gather(facts)
  for number, other in enumerate(others, 1):
    for name in sorted(first.keys() | other.keys()):
      if first.get(name) != other.get(name):
        raise UserError(
            f'the processes differ in {what}: {name} is {first.get(name)!r} in '
            f'process 0 and {other.get(name)!r} in process {number}. Start all '
            'with the same command, data and folders.')


def barrier() -> None:
  """Waits until all processes are here."""
  gather(None)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Context of a run: all processes end together, also after an error.

  An exception in one process ends the others with its message. They would
  otherwise wait for it in their next collective operation.

  Yields:
    Nothing.
  """
  if count() == 1:
    yield
    return
  try:
    yield
    barrier()
  except SystemExit:
    raise
  except BaseException as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      # Often the consequence of a lost process. The watch then names it.
      time.sleep(watch.PATIENCE + 5)
    traceback.print_exc()
    fail(f'{type(error).__name__}: {error}', 1)
  watch.stop()
  jax.distributed.shutdown()


def fail(message: str, code: int) -> None:
  """Ends all processes with this one's error; returns if there is only one.

  Args:
    message: the error, which the others print.
    code: exit status.
  """
  if count() > 1:
    watch.fail(message, code)
