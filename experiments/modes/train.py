"""Trains a prepared run to the end.

Training starts from the last checkpoint if there is one. It writes
`metrics.jsonl`, TensorBoard events, `curves.png`, checkpoints, `summary.json`
and the report. The host only dispatches compiled steps and fetches metrics once
per `log_every_steps`. The state at the end of an epoch is written while it is
evaluated, so a run stopped in the evaluation, which then ends early, repeats
only that.

A run that collapses, or whose numbers become non-finite, is stopped, or returns
to the last good state with a smaller gamma (`config.guard`). No checkpoint is
written while a collapse is suspected, so the last checkpoint is always good.
"""

import contextlib
import time
from typing import Any

from experiments.data import datasets
from experiments.parallel import processes
from experiments.reports import curves, page
from experiments.runs import metrics, workdirs
from experiments.runs import run as run_lib
from experiments.training import signals, step, training_data
from experiments.training.collapse import Collapsed, Diverged
from experiments.training.loop import Loop
from experiments.util import atomic

__all__ = ['Collapsed', 'Diverged', 'train']

#: Fewer images per part than this print a notice on batch statistics.
_FEW_IMAGES = 32


def few_images(run: run_lib.Run) -> str:
  """A notice if batch statistics are over few images per part, else ''."""
  config, devices = run.config, run.num_devices
  if config.model.sync_batch_norm:
    devices = 1
  shares = devices * config.accumulate
  part, last = (size // shares for size in (
      config.batch_size, min(run.batch_sizes)))
  if shares == 1 or last >= _FEW_IMAGES:
    return ''
  notice = f'batch statistics are over {part} images'
  if part >= _FEW_IMAGES:
    part = last
    notice = (
        'batch statistics of the last batch of an epoch are over '
        f'{part} images')
  if config.accumulate > 1:
    notice += f' in each of {config.accumulate} parts'
  if devices > 1:
    notice += f' on each of {devices} devices'
  notice += ', also in the attack'
  if devices > 1:
    notice += (
        '; model.sync_batch_norm=True uses those of all devices, '
        f'{devices * part} images')
  return notice


def streamed(run: run_lib.Run) -> str:
  """A notice if the training images stay on the host, else ''."""
  if not training_data.is_streamed(run):
    return ''
  return (
      'training images stay on the host, because they take more than '
      f'data_on_device_gib={run.config.data_on_device_gib:g}')


def train(run: run_lib.Run) -> dict[str, Any] | None:
  """Trains to the end, from the last checkpoint if there is one.

  Args:
    run: from `run.prepare`.

  Returns:
    The contents of `summary.json`, or None if a signal stopped the run. The
    same call then resumes it.

  Raises:
    Diverged: if numbers become non-finite; the last checkpoint is good.
    reading.CheckpointError: for a checkpoint of another run.
    workdirs.WorkdirBusy: if another process trains in the folder.
  """
  with _locked(run), signals.StopRequest() as stop:
    loop = Loop(run, lambda: stop.name is not None)
    try:
      if not loop.is_done:
        # Of a run that had ended before some of it was lost.
        processes.on_main(
            lambda: (run.workdir / 'summary.json').unlink(missing_ok=True))
      if loop.step:
        loop.progress.say(f'resuming from step {loop.step} of {loop.total}')
      for notice in filter(None, (few_images(run), streamed(run))):
        loop.progress.say(notice)
      finished = _run_steps(loop, stop)
    finally:
      loop.close()
  if not finished:
    print(
        f'{stop.name}: saved step {loop.last.step()} of {loop.total} in '
        f'{run.workdir}; run the same command to resume.', flush=True)
    return None
  summary = metrics.summarize(
      loop.log.lines, run.config.select_on, datasets.describe(run.dataset))
  processes.on_main(lambda: _write_results(run, loop.log.lines, summary))
  return summary


def _locked(run: run_lib.Run) -> contextlib.AbstractContextManager[None]:
  """The lock on the workdir, which the main process holds for all."""
  if processes.is_main():
    return workdirs.locked(run.workdir)
  return contextlib.nullcontext()


def _write_results(
    run: run_lib.Run, lines: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
  """Writes curves, summary and report."""
  curves.plot_curves(lines, run.workdir / 'curves.png', run.workdir.name)
  atomic.write_json(run.workdir / 'summary.json', summary)
  page.write_or_warn(run, 'train')


def _run_steps(loop: Loop, stop: signals.StopRequest) -> bool:
  """Runs the remaining steps; returns False if a signal came first."""
  while not loop.is_done:
    try:
      if loop.is_pending:
        loop.end_epoch()
      else:
        _run_step(loop, stop)
    except step.Interrupted:
      pass
    except Diverged as error:
      loop.go_back(error)
    if stop.name is not None:
      return loop.is_done
  return True


def _run_step(loop: Loop, stop: signals.StopRequest) -> None:
  """Runs one step, then reports and saves if they are due."""
  config, per_epoch = loop.run.config, loop.run.steps_per_epoch
  position = loop.step % per_epoch
  step_fn = loop.step_fn(position)
  started = time.perf_counter()
  loop.take_step(step_fn)
  stop.agree()
  is_last = position + 1 == per_epoch
  is_shown = is_last or (position + 1) % config.log_every_steps == 0
  every = config.checkpoint_every_steps
  is_saved = is_last or stop.name is not None or bool(
      every and loop.step % every == 0)
  # Fetch the metrics before saving: the wait belongs to the step's time, and
  # non-finite numbers must not replace a good checkpoint.
  means = loop.look() if is_shown or is_saved else {}
  loop.seconds += time.perf_counter() - started
  if is_shown:
    loop.progress.report(
        loop.step, means['images'] / loop.seconds, f'loss {means["loss"]:.4f}')
  if is_saved:
    loop.save()
