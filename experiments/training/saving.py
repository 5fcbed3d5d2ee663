"""Saves and restores the state of a training run."""

from typing import Any

import jax

import awp_jax
from experiments.parallel import placement, processes
from experiments.runs import checkpoints, metrics, reading
from experiments.runs import run as run_lib
from experiments.training import step as step_lib
from experiments.util import digests, paths


class Saving:
  """The last and the best checkpoint of a run.

  Attributes:
    last: the checkpoint that training resumes from.
    best: the checkpoint with the highest robust accuracy.
    best_line: the epoch's line that the best checkpoint held when `restore` was
      called; empty without one.
  """

  def __init__(self, run: run_lib.Run) -> None:
    """Opens both checkpoints, which need not exist.

    Args:
      run: the run.
    """
    self._run, self._order = run, run.order
    self.last = checkpoints.Checkpoints(run.workdir, 'last')
    self.best = checkpoints.Checkpoints(run.workdir, 'best')
    self.best_line: dict[str, Any] = {}

  def restore(self) -> tuple[awp_jax.TrainState, step_lib.Sums, dict[str, Any]]:
    """The state to continue from, on all devices.

    Returns:
      State, sums and notes of the newest checkpoint that is whole. Without a
      checkpoint, the initial state, zero sums and no notes.

    Raises:
      CheckpointError: if the checkpoint belongs to other images or another
        network, or if all checkpoints of a run were lost.
    """
    state, sums, notes = self._stored() or self._first()
    best = self.best.drop_unusable(int(state.step))
    self.best_line = best.notes if best else {}
    if processes.count() > 1:
      processes.check_equal('the state that they start from', {
          'step': int(state.step),
          'digest of the weights': digests.of_arrays(
              (state.params, state.batch_stats))})
    return placement.replicate(state), placement.replicate(sums), notes

  def _stored(
      self
  ) -> tuple[awp_jax.TrainState, step_lib.Sums, dict[str, Any]] | None:
    """State, sums and notes of the newest checkpoint that is whole, or None."""
    if self.last.step() is None:
      return None
    state, sums = run_lib.initial_state(self._run), step_lib.zero_sums()
    try:
      stored, notes = self.last.load(
          jax.device_get(step_lib.to_tree(state, sums)))
    except reading.NoCheckpoint:  # all were damaged
      return None
    state, sums = step_lib.from_tree(state, stored)
    self._check_order(notes)
    return state, sums, notes

  def _first(
      self) -> tuple[awp_jax.TrainState, step_lib.Sums, dict[str, Any]]:
    """State, sums and notes before the first step of a run that is new."""
    self._check_new()
    state, message = run_lib.first_state(self._run)
    if message:
      print(message, flush=True)
    return state, step_lib.zero_sums(), {}

  def _check_new(self) -> None:
    """Raises CheckpointError if the run had a state, and it was lost.

    The best checkpoint, and the line of an epoch that may become the best, are
    written when the last checkpoint is complete.
    """
    workdir = self._run.workdir

    def is_lost() -> bool:
      aside = workdir / 'checkpoints' / 'set_aside'
      best = metrics.best_line(
          metrics.read_metrics(workdir), self._run.config.select_on)
      return bool(best and not best.get('suspicious')) or any(
          path.name.startswith('last-') for path in paths.children(aside))

    if self.best.step() is not None or processes.from_main(is_lost):
      raise reading.CheckpointError(
          f'the last checkpoints of the run in {workdir} were lost: none is '
          'left to go on from. Remove the folder to start again, or choose '
          'another --workdir.')

  def _check_order(self, notes: dict[str, Any]) -> None:
    """Raises CheckpointError if the order of images changed."""
    now = self._order
    then = {name: notes.get(name) for name in now}
    if then != now:
      raise reading.CheckpointError(
          f'the checkpoint in {self.last.folder} was written with {then}, this '
          f'run has {now}: use the same images and devices '
          f'({notes.get("num_devices")}, now {self._run.num_devices}), or '
          'another workdir.')
    if notes['num_devices'] != self._run.num_devices:
      print(
          f'resuming with {self._run.num_devices} devices instead of '
          f'{notes["num_devices"]}: noise and batch statistics are per device, '
          'so results will differ from those of an uninterrupted run.',
          flush=True)
    elif notes.get('num_processes', 1) != processes.count():
      print(
          f'resuming with {processes.count()} processes instead of '
          f'{notes.get("num_processes", 1)}, on as many devices: results will '
          'differ from those of an uninterrupted run by rounding.', flush=True)

  def save_last(
      self, step: int, state: awp_jax.TrainState, sums: step_lib.Sums, *,
      seconds: float, is_suspicious: bool,
      checksums: dict[str, Any]) -> None:
    """Starts to write the last checkpoint.

    Args:
      step: number of completed steps.
      state: the state after them.
      sums: metrics of the epoch so far.
      seconds: training time of the epoch so far.
      is_suspicious: whether a collapse is suspected.
      checksums: of `metrics.jsonl` and `steps.jsonl`.
    """
    self.last.save(
        step, step_lib.to_tree(state, sums),
        {'seconds_training': seconds, 'suspicious': is_suspicious,
         'checksums': checksums,
         'num_devices': self._run.num_devices,
         'num_processes': processes.count(), **self._order})

  def save_best(
      self, step: int, state: awp_jax.TrainState, sums: step_lib.Sums,
      line: dict[str, Any]) -> None:
    """Writes the best checkpoint, and waits until it is complete.

    Args:
      step: number of completed steps.
      state: the state after them.
      sums: metrics of the epoch.
      line: the epoch's line of `metrics.jsonl`.
    """
    # First, so that a resumed run does not repeat the steps before this one.
    self.last.finish()
    self.best.save(step, step_lib.to_tree(state, sums), line)
    # An epoch whose line is written is not evaluated again.
    self.best.finish()

  def describe_last(self) -> str:
    """A sentence on the last checkpoint, for an error."""
    try:
      step = self.last.step()
    except reading.CheckpointError as error:
      return str(error)
    return ('No state was saved before.' if step is None else
            f'The state of step {step} is in {self.last.folder}.')

  def close(self) -> None:
    """Waits for both checkpoints and closes them.

    Raises:
      CheckpointError: if one could not be written.
    """
    try:
      self.last.close()
    finally:
      self.best.close()
