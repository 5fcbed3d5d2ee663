"""Stops a run that diverged or collapsed, or shrinks its perturbation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from experiments.runs import run as run_lib
from experiments.training import collapse
from experiments.training import step as step_lib
from experiments.training.collapse import Collapsed, Diverged
from experiments.training.saving import Saving


class Guard:
  """Checks the metrics of a run against `config.guard`."""

  def __init__(self, run: run_lib.Run, saving: Saving) -> None:
    """Reads the shrinks of earlier processes; `start` must follow.

    Args:
      run: the run.
      saving: its checkpoints, named in errors.
    """
    self._run, self._saving = run, saving
    self._settings = run.config.guard
    self._record = collapse.Record(run.workdir)
    self._chance = collapse.chance(
        run.dataset.y_train, run.dataset.num_classes)

  def start(
      self, step: int, lines: list[dict[str, Any]], is_suspicious: bool,
      sums: step_lib.Sums) -> None:
    """Starts at a restored state.

    Args:
      step: number of completed steps.
      lines: of `metrics.jsonl`.
      is_suspicious: whether a collapse was suspected when it was saved.
      sums: of the epoch so far, which the last check has seen.
    """
    self._detector = collapse.Detector(
        self._settings, self._chance,
        max(self._settings.grace_steps, self._run.warmup_steps),
        min((line['train_loss'] for line in lines), default=math.inf))
    self._seen = np.asarray(jax.device_get(sums), np.float64)
    if is_suspicious:
      self._detector.suspect(step)

  @property
  def factor(self) -> float:
    """The current factor of the config's weight perturbation."""
    return self._record.factor

  @property
  def is_suspicious(self) -> bool:
    """Whether a collapse is suspected."""
    return self._detector.is_suspicious

  def fetch(
      self, step: int, state: awp_jax.TrainState, sums: step_lib.Sums
  ) -> tuple[step_lib.Sums, dict[str, float]]:
    """Fetches the metrics of the epoch so far.

    Args:
      step: number of completed steps.
      state: the current state.
      sums: the current sums, on the device.

    Returns:
      The sums on the host; their means over images, and the number of images.

    Raises:
      Diverged: if a sum or the state is not finite. The sums do not depend on
        the last update.
    """
    sums, is_finite = jax.device_get((sums, _all_finite(state)))
    images = float(sums.images)
    means = {
        name: float(value) / images
        for name, value in sums._asdict().items() if name != 'images'}
    self.check_finite(step, means | {'state': 0.0 if is_finite else math.nan})
    return sums, means | {'images': images}

  def check(
      self, step: int, state: awp_jax.TrainState, sums: step_lib.Sums
  ) -> tuple[dict[str, float], dict[str, float]]:
    """Fetches the metrics and tests them for a collapse.

    Args:
      step: number of completed steps.
      state: the current state.
      sums: the current sums, on the device.

    Returns:
      The means of the epoch so far, and those since the last check.

    Raises:
      Diverged: as `fetch`.
      Collapsed: if the network has collapsed.
    """
    sums, means = self.fetch(step, state, sums)
    now = np.asarray(sums, np.float64)
    # Sums are reset at the start of an epoch; images are the last of them.
    since = now - (self._seen if now[-1] > self._seen[-1] else 0)
    self._seen = now
    window = {
        name: float(value / since[-1])
        for name, value in zip(step_lib.Sums._fields, since, strict=True)
    } | {'images': float(since[-1])}
    try:
      self._detector.update(step, collapse.Window(
          window['loss'], window['robust_accuracy'], window['gradient_norm'],
          window['images']))
    except Collapsed as error:
      raise Collapsed(f'{error} {self._advice()}') from None
    return means, window

  def check_finite(self, step: int, values: dict[str, float]) -> None:
    """Raises Diverged if a value is not finite."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
      raise Diverged(
          f'training diverged by step {step} (epoch '
          f'{(step - 1) // self._run.steps_per_epoch + 1}): '
          f'{", ".join(wrong)} not finite. {self._advice()}')

  def _advice(self) -> str:
    return (
        f'{self._saving.describe_last()} A smaller optimizer.learning_rate or '
        'awp.gamma may help; guard.action=shrink reduces gamma automatically.')

  def can_shrink(self, step: int) -> bool:
    """Whether a smaller gamma may help after a failure at `step`."""
    return not (
        self._settings.action != 'shrink'
        or self._run.setup.perturbation.is_off
        or step <= self._run.warmup_steps
        or step == self._saving.last.step()  # only its evaluation failed
        or len(self._record.shrinks) >= self._settings.most_shrinks)

  def shrink(self, failed_at: int, back_to: int, error: Diverged) -> None:
    """Shrinks the perturbation and records it in `guard.json`.

    Args:
      failed_at: the step of the failure.
      back_to: the step of the restored state.
      error: the failure.
    """
    self._record.shrink(
        self._settings.factor, failed_at, back_to, str(error))


@jax.jit
def _all_finite(tree: Any) -> Any:
  """Whether all floating-point numbers in a pytree are finite."""
  return jnp.all(jnp.asarray([
      jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)
      if jnp.issubdtype(leaf.dtype, jnp.floating)]))
