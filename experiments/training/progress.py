"""Shows the progress of a run: a bar in a terminal, plain lines elsewhere."""

import sys
import time

import tqdm

from experiments.parallel import processes


class Progress:
  """Shows completed steps, images per second and the time left.

  A terminal gets a progress bar. Other outputs get one line per report, so that
  logs stay readable.
  """

  def __init__(
      self, total_steps: int, first_step: int, batch_size: int) -> None:
    """Starts the clock.

    Args:
      total_steps: number of steps of the whole run.
      first_step: the step that this process starts at.
      batch_size: images per step.
    """
    self._total, self._first, self._batch = total_steps, first_step, batch_size
    self._started = time.perf_counter()
    self._bar = None
    if processes.shows_progress():
      self._bar = tqdm.tqdm(
          total=total_steps, initial=first_step, unit='step',
          dynamic_ncols=True, smoothing=0.1)

  def report(self, step: int, images_per_second: float, text: str) -> None:
    """Reports that `step` steps are done.

    Args:
      step: number of completed steps since the start of the run.
      images_per_second: the current training speed.
      text: further metrics, short.
    """
    if self._bar is not None:
      self._bar.set_postfix_str(f'{images_per_second:.0f} images/s, {text}')
      self._bar.update(step - self._bar.n)
      return
    self.say(
        f'step {step}/{self._total}  {images_per_second:.0f} images/s  '
        f'{self._left(step)} left  {text}')

  def say(self, line: str) -> None:
    """Prints a line without disturbing the bar."""
    if self._bar is not None:
      self._bar.write(line, file=sys.stderr)
    else:
      print(line, flush=True)

  def close(self) -> None:
    """Closes the bar and keeps its last state on the screen."""
    if self._bar is not None:
      self._bar.close()

  def _left(self, step: int) -> str:
    done = max(step - self._first, 1)
    elapsed = time.perf_counter() - self._started
    seconds = int(elapsed / done * (self._total - step))
    hours, rest = divmod(seconds, 3600)
    return f'{hours}:{rest // 60:02d}:{rest % 60:02d}'
