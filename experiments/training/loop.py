"""The state of a training run on the host, between its compiled steps."""

from collections.abc import Callable
import contextlib
import time
from typing import Any

import jax

from experiments.config import optimizers, schema
from experiments.parallel import placement, processes
from experiments.runs import metrics, precision, reading, workdirs
from experiments.runs import run as run_lib
from experiments.training import epochs, progress
from experiments.training import step as step_lib
from experiments.training.collapse import Diverged
from experiments.training.compiled import CompiledSteps
from experiments.training.guard import Guard
from experiments.training.saving import Saving
from experiments.util import atomic


class Loop:
  """Orchestrates steps, checks, evaluations and checkpoints.

  Attributes:
    run: the run.
    total: number of steps of the whole run.
    step: number of completed steps.
    state: the state after them.
    sums: metrics of the epoch so far, on the device.
    seconds: training time of the epoch so far.
    last: the checkpoint that training resumes from.
    log: the lines of `metrics.jsonl`.
    progress: console output.
  """

  def __init__(
      self, run: run_lib.Run,
      is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Restores the last checkpoint, or starts anew.

    Args:
      run: the run.
      is_stopping: whether the run is to stop; evaluations then end early.
    """
    self.run = run
    self._is_stopping = is_stopping
    self.total = run.config.epochs * run.steps_per_epoch
    self._saving = Saving(run)
    self.last = self._saving.last
    self._guard = Guard(run, self._saving)
    self._steps = CompiledSteps(run)
    self._eval_fn = step_lib.make_eval_fn(run)
    self._rate = jax.jit(
        optimizers.build_schedule(run.config, run.steps_per_epoch))
    self._open()
    self.progress = progress.Progress(
        self.total, self.step, run.config.batch_size)

  def _open(self) -> None:
    """Restores the state, the log and the guard."""
    self.state, self.sums, notes = self._saving.restore()
    self.step = int(self.state.step)
    self.seconds = float(notes.get('seconds_training', 0.0))
    self.log = metrics.MetricsLog(
        self.run.workdir, self.step // self.run.steps_per_epoch, self.step,
        self.run.config.loggers, schema.flatten(self.run.config),
        self._checksums(notes), self._saving.best_line)
    if self.log.lost:
      print(
          'metrics.jsonl was damaged: the lines of these epochs are lost, and '
          'the best epoch is chosen from the others: '
          f'{", ".join(map(str, self.log.lost))}', flush=True)
    if self.log.lost_steps:
      print('steps.jsonl was damaged: some of its lines are lost', flush=True)
    self._guard.start(
        self.step, self.log.lines, bool(notes.get('suspicious')), self.sums)
    if self.step % self.run.steps_per_epoch == 0 and not self.is_pending:
      self._reset_sums()
    elif not float(self.sums.images):
      # An early stop was saved after its line was written, which is gone.
      path = self.run.workdir / 'metrics.jsonl'
      raise reading.CheckpointError(
          f'the last line of {path} was lost, and the run has ended: it cannot '
          'be made again. The checkpoints can still be evaluated.')
    self._replace_lost_best()

  def _checksums(self, notes: dict[str, Any]) -> dict[str, Any] | None:
    """Checksums of lines: the checkpoint's and, of a run that had ended, all.

    Args:
      notes: of the checkpoint, which is older than the last line.

    Returns:
      As `metrics.MetricsLog.checksums`; None for a run of an older version.
    """
    known = notes.get('checksums')
    if not known:
      return None
    summary = processes.from_main(
        lambda: atomic.read_json(self.run.workdir / 'summary.json'))
    completed = self.step // self.run.steps_per_epoch
    ended = {epoch: value for epoch, value in summary.get(
        'checksums', {}).items() if int(epoch) <= completed}
    return {**known, 'epochs': {**ended, **known.get('epochs', {})}}

  def _replace_lost_best(self) -> None:
    """Chooses another best epoch if the state of the best one was lost."""
    select_on = self.run.config.select_on
    kept = int(self._saving.best_line.get('epoch', 0))
    epoch, position = divmod(self.step, self.run.steps_per_epoch)
    present = 0 if position or self.is_pending else epoch
    if not self.log.exclude_lost(kept, present, select_on):
      return
    best = metrics.best_line(self.log.lines, select_on)
    if best and best['epoch'] == present:
      self._saving.save_best(self.step, self.state, self.sums, best)
      kept = present
    print(
        'the best checkpoint of this run was lost: the best epoch is chosen '
        f'from those up to {kept} whose state is kept, and from later ones',
        flush=True)

  def _reset_sums(self) -> None:
    self.sums = placement.replicate(step_lib.zero_sums())
    self.seconds = 0.0

  @property
  def is_pending(self) -> bool:
    """Whether a completed epoch has no line yet."""
    epoch, position = divmod(self.step, self.run.steps_per_epoch)
    return epoch > 0 and position == 0 and (
        not self.log.lines or self.log.lines[-1]['epoch'] < epoch)

  @property
  def is_finished(self) -> bool:
    """Whether all steps are done, or training stops early."""
    return self._ends_with(self.log.lines)

  @property
  def is_done(self) -> bool:
    """Whether the run is finished and its last epoch has a line."""
    return self.is_finished and not self.is_pending

  def _ends_with(self, lines: list[dict[str, Any]]) -> bool:
    config = self.run.config
    return self.step >= self.total or (
        self.step % self.run.steps_per_epoch == 0 and metrics.stops_early(
            lines, config.select_on, config.early_stopping_epochs))

  def step_fn(self, position: int) -> Any:
    """The step for a position in the epoch, compiled on first use."""
    method = self.run.setup.perturbation
    size = self.run.batch_sizes[position]
    is_on = (
        not method.is_off and self.step >= self.run.warmup_steps
        and method.perturbs_at(self.step))
    factor = self._guard.factor if is_on else 0.0
    step_fn = self._steps.find(size, factor)
    if step_fn is None:
      how = f'with {method.name}' if is_on else 'without weight perturbation'
      self.progress.say(f'compiling the step for {size} images, {how}')
      # Time the pending steps: they would otherwise run during compilation.
      started = time.perf_counter()
      jax.block_until_ready(self.state)
      self.seconds += time.perf_counter() - started
      step_fn = self._steps.compile(size, factor, self._arguments())
    return step_fn

  def _arguments(self) -> tuple[Any, ...]:
    return self._steps.arguments(self.state, self.sums, self.step)

  def take_step(self, step_fn: Any) -> None:
    """Dispatches a step of `step_fn`."""
    self.state, self.sums = step_fn(*self._arguments())
    self.step += 1

  def look(self) -> dict[str, float]:
    """The means of the epoch so far, after the guard has checked them.

    Means over the steps since the last call go to `steps.jsonl`.

    Raises:
      Diverged: if a metric or the state is not finite.
      Collapsed: if the network has collapsed.
    """
    means, window = self._guard.check(self.step, self.state, self.sums)
    self._check_workdir()
    self.log.append_step({
        'step': self.step, 'learning_rate': float(self._rate(self.step - 1)),
        **window})
    return means

  def _check_workdir(self) -> None:
    """Raises UserError if the workdir was removed."""
    if processes.is_main():
      workdirs.check_present(self.run.workdir)

  def save(self) -> None:
    """Starts to write the last checkpoint, unless a collapse is suspected.

    The state at the end of a run is always saved.
    """
    if self._guard.is_suspicious and not self.is_finished:
      return
    self._saving.save_last(
        self.step, self.state, self.sums, seconds=self.seconds,
        is_suspicious=self._guard.is_suspicious,
        checksums=self.log.checksums())

  def go_back(self, error: Diverged) -> None:
    """Returns to the last good state with a smaller gamma.

    Args:
      error: the failure. Raised again if gamma cannot be the cause or has been
        reduced `guard.most_shrinks` times.
    """
    if not self._guard.can_shrink(self.step):
      raise error
    failed_at = self.step
    self.log.close()
    self._open()
    self._guard.shrink(failed_at, self.step, error)
    self.progress.say(
        f'{error}\nReturning to step {self.step}, with weight perturbations '
        f'{self._guard.factor:g} times the size in the config.')

  def end_epoch(self) -> None:
    """Evaluates, saves the best state and writes the epoch's line.

    Raises:
      step.Interrupted: if the run is to stop. The epoch is then still pending.
    """
    config = self.run.config
    line = self._epoch_line()
    self._check_workdir()
    self._reset_sums()
    lines = [*self.log.lines, line]
    # No best state under suspicion: checkpoints must have increasing steps.
    # Saved before its line: an epoch with a line is not evaluated again.
    if metrics.best_line(lines, config.select_on) is line and (
        not self._guard.is_suspicious or self._ends_with(lines)):
      self._saving.save_best(self.step, self.state, self.sums, line)
    self.log.append(line)
    self.progress.say(epochs.text(line, config.epochs))
    self.save()  # no-op unless a suspicious run stops early here

  def _epoch_line(self) -> dict[str, Any]:
    config = self.run.config
    _, means = self._guard.fetch(self.step, self.state, self.sums)
    line = epochs.training_line(self.run, self.step, means)
    started = time.perf_counter()
    if (line['epoch'] % config.eval.every_epochs == 0
        or line['epoch'] == config.epochs):
      line |= step_lib.evaluate(
          self.run, self._eval_fn, self.state, self._is_stopping)
      self._guard.check_finite(self.step, line)
      if warning := epochs.nonfinite_warning(line):
        self.progress.say(warning)
      line['judged_by'] = precision.judged_by()
    line |= {
        'seconds_training': self.seconds,
        'seconds_evaluating': time.perf_counter() - started,
        'images_per_second': means['images'] / self.seconds}
    if self._guard.is_suspicious:
      line['suspicious'] = 1
    return line

  def close(self) -> None:
    """Closes the terminal, the data and the files, all if one fails."""
    with contextlib.ExitStack() as stack:
      for part in (self._saving, self.log, self._steps, self.progress):
        stack.callback(part.close)
