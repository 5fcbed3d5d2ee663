"""The state of a training run on the host, between its compiled steps."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from experiments.config import optimizers
from experiments.runs import checkpoints, metrics, precision
from experiments.runs import run as run_lib
from experiments.training import collapse, progress
from experiments.training import step as step_lib
from experiments.training.collapse import Collapsed, Diverged


class Loop:
  """Takes steps, looks at their numbers, evaluates, and saves."""

  def __init__(self, run: run_lib.Run) -> None:
    self.run, self.order = run, run.order
    self.last = checkpoints.Checkpoints(run.workdir, 'last')
    self.best = checkpoints.Checkpoints(run.workdir, 'best')
    self.record = collapse.Record(run.workdir)
    self.total = run.config.epochs * run.steps_per_epoch
    self.data = self._replicated(step_lib.training_data(run))
    self.device_numbers = np.arange(run.num_devices)
    self.keys = self._replicated(run_lib.keys(run.config))
    self._order_fn = step_lib.make_order_fn(run)
    self._order: tuple[int, Any] | None = None
    self.eval_fn = step_lib.make_eval_fn(run)
    self._compiled: dict[tuple[int, float], Any] = {}
    self._open()
    self.progress = progress.Progress(
        self.total, self.step, run.config.batch_size)

  def _open(self) -> None:
    """The state of the last checkpoint, and what goes with it."""
    self.state, self.sums, notes = self._restore()
    self.step = int(self.state.step)
    self.seconds = float(notes.get('seconds_training', 0.0))
    self.log = metrics.MetricsLog(
        self.run.workdir, self.step // self.run.steps_per_epoch)
    self.watch = collapse.Watch(
        self.run.config.guard,
        collapse.chance(self.run.dataset.y_train, self.run.dataset.num_classes),
        max(self.run.config.guard.grace_steps, self.warmup_steps),
        min((line['train_loss'] for line in self.log.lines), default=math.inf))
    self._seen = np.zeros(4)
    if notes.get('suspicious'):
      self.watch.suspect(self.step)
    if self.step % self.run.steps_per_epoch == 0 and not self.is_pending:
      self.sums, self.seconds = self._replicated(step_lib.zero_sums()), 0.0

  @property
  def warmup_steps(self) -> int:
    """Steps before AWP begins."""
    awp = self.run.config.awp
    return awp.warmup_steps or awp.warmup_epochs * self.run.steps_per_epoch

  @property
  def is_pending(self) -> bool:
    """Whether an epoch is done that has no line yet."""
    epoch, position = divmod(self.step, self.run.steps_per_epoch)
    return epoch > 0 and position == 0 and (
        not self.log.lines or self.log.lines[-1]['epoch'] < epoch)

  @property
  def is_finished(self) -> bool:
    """Whether all steps are done, or training stops early."""
    return self._ends_with(self.log.lines)

  def _ends_with(self, lines: list[dict[str, Any]]) -> bool:
    config = self.run.config
    return self.step >= self.total or (
        self.step % self.run.steps_per_epoch == 0 and metrics.stops_early(
            lines, config.select_on, config.early_stopping_epochs))

  def _replicated(self, tree: Any) -> Any:
    return jax.device_put(tree, step_lib.on_all_devices())

  def _restore(self) -> tuple[awp_jax.TrainState, step_lib.Sums, dict[str, Any]]:
    notes: dict[str, Any] = {}
    if self.last.step() is not None:
      state, sums = run_lib.initial_state(self.run), step_lib.zero_sums()
      stored, notes = self.last.load(step_lib.to_tree(state, sums))
      state, sums = step_lib.from_tree(state, stored)
      self._check_order(notes)
    else:
      (state, said), sums = run_lib.first_state(self.run), step_lib.zero_sums()
      if said:
        print(said, flush=True)
    return self._replicated(state), self._replicated(sums), notes

  def _check_order(self, notes: dict[str, Any]) -> None:
    now = self.order
    then = {name: notes.get(name) for name in now}
    if then != now:
      raise checkpoints.CheckpointError(
          f'the checkpoint in {self.last.folder} was written with {then}, this '
          f'run has {now}: give it the same images and devices '
          f'({notes.get("num_devices")}, now {self.run.num_devices}), or '
          'another workdir.')
    if notes['num_devices'] != self.run.num_devices:
      print(
          f'going on with {self.run.num_devices} devices instead of '
          f'{notes["num_devices"]}: noise and batch statistics are per device, '
          'so the numbers will not be those of an uninterrupted run.',
          flush=True)

  def step_fn(self, position: int) -> Any:
    """The step for a position in the epoch, compiled when first met."""
    method = self.run.setup.perturbation
    size = self.run.batch_sizes[position]
    is_on = (
        not method.is_off and self.step >= self.warmup_steps
        and method.perturbs_at(self.step))
    key = size, self.record.factor if is_on else 0.0
    if key not in self._compiled:
      how = f'with {method.name}' if is_on else 'without weight perturbation'
      self.progress.say(f'compiling the step for {size} images, {how}')
      # Steps under way would else run, uncounted, while this one compiles.
      started = time.perf_counter()
      jax.block_until_ready(self.state)
      self.seconds += time.perf_counter() - started
      self._compiled[key] = step_lib.make_train_fn(
          self.run, *key).lower(*self._arguments()).compile()
    return self._compiled[key]

  def _arguments(self) -> tuple[Any, ...]:
    """What the next step takes."""
    number = step_lib.order_number(self.run, self.step)
    if self._order is None or self._order[0] != number:
      self._order = number, self._order_fn(self.keys['order'], number)
    return (
        self.state, self.sums, self.data, self._order[1], self.keys,
        self.device_numbers)

  def take_step(self, step_fn: Any) -> None:
    """Dispatches a step of `step_fn`."""
    self.state, self.sums = step_fn(*self._arguments())
    self.step += 1

  def save(self) -> None:
    """Writes the last checkpoint, unless the network is under suspicion.

    A run that is at its end is saved whatever it is like.
    """
    if not (self.watch.is_well or self.is_finished):
      return
    self.last.save(
        self.step, step_lib.to_tree(self.state, self.sums),
        {'seconds_training': self.seconds,
         'suspicious': not self.watch.is_well,
         'num_devices': self.run.num_devices, **self.order})

  def fetch_sums(self) -> tuple[step_lib.Sums, dict[str, float]]:
    """The epoch's sums so far, and their means over its images.

    Raises:
      Diverged: if one is not finite, or the state is not: the sums are of
        before the last update.
    """
    sums, is_finite = jax.device_get((self.sums, _all_finite(self.state)))
    images = float(sums.images)
    means = {
        name: float(value) / images
        for name, value in sums._asdict().items() if name != 'images'}
    self._check_finite(means | {'state': 0.0 if is_finite else math.nan})
    return sums, means | {'images': images}

  def look(self) -> dict[str, float]:
    """The means of the epoch so far, once they have passed the guard.

    Raises:
      Diverged: as `fetch_sums`.
      Collapsed: if the guard has seen enough.
    """
    sums, means = self.fetch_sums()
    now = np.asarray([
        sums.loss, sums.robust_accuracy, sums.gradient_norm, sums.images])
    # Sums begin anew with an epoch.
    *since, count = now - (self._seen if now[3] > self._seen[3] else 0)
    self._seen = now
    try:
      self.watch.see(self.step, collapse.Look._make(
          [*(float(value / count) for value in since), float(count)]))
    except Collapsed as error:
      raise Collapsed(f'{error} {self._kept()}') from None
    return means

  def _kept(self) -> str:
    step = self.last.step()
    return (
        'No state was saved before. ' if step is None else
        f'The state of step {step} is in {self.last.folder}. ') + (
            'A smaller optimizer.learning_rate or awp.gamma may help; '
            'guard.action=shrink does the latter by itself.')

  def _check_finite(self, values: dict[str, float]) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
      raise Diverged(
          f'training diverged by step {self.step} (epoch '
          f'{(self.step - 1) // self.run.steps_per_epoch + 1}): '
          f'{", ".join(wrong)} not finite. {self._kept()}')

  def go_back(self, error: Diverged) -> None:
    """Goes on from the last good state with a smaller gamma.

    Args:
      error: what went wrong; raised again where gamma cannot be the reason, or
        has been made smaller often enough.
    """
    settings = self.run.config.guard
    if (settings.action != 'shrink'
        or self.run.setup.perturbation.is_off
        or self.step <= self.warmup_steps
        or self.step == self.last.step()  # only its evaluation failed
        or len(self.record.shrinks) >= settings.most_shrinks):
      raise error
    failed_at = self.step
    self.log.close()
    self._open()
    self.record.shrink(settings.factor, failed_at, self.step, str(error))
    self.progress.say(
        f'{error}\nGoing back to step {self.step}, with weight perturbations '
        f'{self.record.factor:g} times as large as the config says.')

  def end_epoch(self) -> None:
    """Evaluates, keeps the best state, and writes the epoch's line."""
    config, epoch = self.run.config, self.step // self.run.steps_per_epoch
    _, means = self.fetch_sums()
    rate = optimizers.build_schedule(config, self.run.steps_per_epoch)(
        self.step - 1)
    line: dict[str, Any] = {
        'epoch': epoch, 'learning_rate': float(rate),
        'train_loss': means['loss'],
        'train_batch_robust_accuracy': means['robust_accuracy'],
        'gradient_norm': means['gradient_norm'],
        'perturbation_ratio': means['perturbation_ratio'],
        'images': int(means['images'])}
    started = time.perf_counter()
    if epoch % config.eval.every_epochs == 0 or epoch == config.epochs:
      line |= step_lib.evaluate(self.run, self.eval_fn, self.state)
      self._check_finite(line)
      if text := _doubt(line):
        self.progress.say(text)
      line['judged_by'] = precision.judged_by()
    line |= {
        'seconds_training': self.seconds,
        'seconds_evaluating': time.perf_counter() - started,
        'images_per_second': means['images'] / self.seconds}
    if not self.watch.is_well:
      line['suspicious'] = 1
    self.sums, self.seconds = self._replicated(step_lib.zero_sums()), 0.0
    lines = [*self.log.lines, line]
    # Not under suspicion: a later step could not be followed by an earlier one.
    # Before the line: an epoch that has one is not evaluated again.
    if metrics.best_line(lines, config.select_on) is line and (
        self.watch.is_well or self._ends_with(lines)):
      self.best.save(self.step, step_lib.to_tree(self.state, self.sums), line)
    self.log.append(line)
    self.progress.say(_epoch_text(line, config.epochs))
    self.save()  # unless it was before: a suspicious network that stops early

  def close(self) -> None:
    """Lets go of the terminal and the files."""
    self.progress.close()
    self.log.close()
    self.last.close()
    self.best.close()


@jax.jit
def _all_finite(tree: Any) -> Any:
  """Whether all floating-point numbers in a pytree are finite."""
  return jnp.all(jnp.asarray([
      jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)
      if jnp.issubdtype(leaf.dtype, jnp.floating)]))


def _doubt(line: dict[str, Any]) -> str:
  """A warning where the robust accuracies of an epoch are too high; or ''."""
  shares = {
      name.removesuffix('_nonfinite'): value for name, value in line.items()
      if name.endswith('_nonfinite') and value}
  if not shares:
    return ''
  return 'warning: logits or gradients are not finite on ' + ', '.join(
      f'{100 * value:.2f} % of the {split} images'
      for split, value in shares.items()) + (
          '. The attack is weaker there, so robust accuracy is too high.')


def _epoch_text(line: dict[str, Any], epochs: int) -> str:
  text = f'epoch {line["epoch"]}/{epochs}  loss {line["train_loss"]:.4f}'
  if 'test_robust_accuracy' in line:
    text += ''.join(
        f'  {split}: natural {100 * line[f"{split}_natural_accuracy"]:.2f} %, '
        f'robust {100 * line[f"{split}_robust_accuracy"]:.2f} %'
        for split in ('train', 'test'))
  return f'{text}  {line["images_per_second"]:.0f} images/s'
