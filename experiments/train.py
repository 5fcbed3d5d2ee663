"""The training loop: from a prepared run to a finished workdir.

It starts from the last checkpoint if there is one, and writes `metrics.jsonl`,
TensorBoard events, `curves.png`, checkpoints and `summary.json`. The host only
dispatches compiled steps and looks at the numbers once per `log_every_steps`.
"""

import math
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import awp_jax
from experiments import checkpoints, data, report, results, runs, steps
from experiments import progress as progress_lib
from experiments import setup as setup_lib


class Diverged(RuntimeError):
  """Training has produced numbers that are not finite."""


class _StopRequest:
  """Remembers a first SIGTERM or SIGINT; a second takes its usual course."""

  def __init__(self) -> None:
    self.name: str | None = None
    self._old: dict[Any, Any] = {}

  def __enter__(self) -> '_StopRequest':
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


class _Loop:
  """The state of `train` on the host."""

  def __init__(self, run: runs.Run) -> None:
    self.run, self.order = run, run.order
    self.last = checkpoints.Checkpoints(run.workdir, 'last')
    self.best = checkpoints.Checkpoints(run.workdir, 'best')
    self.state, self.sums, notes = self._restore()
    self.step = int(self.state.step)
    self.seconds = float(notes.get('seconds_training', 0.0))
    self.log = results.MetricsLog(
        run.workdir, self.step // run.steps_per_epoch)
    self.total = run.config.epochs * run.steps_per_epoch
    self.progress = progress_lib.Progress(
        self.total, self.step, run.config.batch_size)
    self.images = self._replicated(run.dataset.x_train)
    self.labels = self._replicated(run.dataset.y_train)
    self.device_numbers = np.arange(run.num_devices)
    self.eval_fn = steps.make_eval_fn(run)
    self._compiled: dict[tuple[int, bool], Any] = {}

  def _replicated(self, tree: Any) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (steps.AXIS,))
    return jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

  def _restore(self) -> tuple[awp_jax.TrainState, steps.Sums, dict[str, Any]]:
    state, sums = runs.initial_state(self.run), steps.zero_sums()
    notes: dict[str, Any] = {}
    if self.last.step() is not None:
      stored, notes = self.last.load(steps.to_tree(state, sums))
      state, sums = steps.from_tree(state, stored)
      self._check_order(notes)
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
    epoch = self.step // self.run.steps_per_epoch
    size = self.run.batch_sizes[position]
    awp = self.run.config.awp
    with_awp = awp.gamma > 0 and epoch >= awp.warmup_epochs
    if (size, with_awp) not in self._compiled:
      method = 'with AWP' if with_awp else 'without AWP'
      self.progress.say(f'compiling the step for {size} images, {method}')
      # Steps under way would else run, uncounted, while this one compiles.
      started = time.perf_counter()
      jax.block_until_ready(self.state)
      self.seconds += time.perf_counter() - started
      self._compiled[size, with_awp] = steps.make_train_fn(
          self.run, size, with_awp).lower(
              self.state, self.sums, self.images, self.labels,
              self.device_numbers).compile()
    return self._compiled[size, with_awp]

  def save(self) -> None:
    """Writes the last checkpoint."""
    self.last.save(
        self.step, steps.to_tree(self.state, self.sums),
        {'seconds_training': self.seconds,
         'num_devices': self.run.num_devices, **self.order})

  def fetch_sums(self) -> dict[str, float]:
    """The means of the epoch so far.

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
    return means | {'images': images}

  def _check_finite(self, values: dict[str, float]) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
      step = self.last.step()
      kept = 'No state was saved before.' if step is None else (
          f'The state of step {step} is in {self.last.folder}.')
      raise Diverged(
          f'training diverged by step {self.step} (epoch '
          f'{(self.step - 1) // self.run.steps_per_epoch + 1}): '
          f'{", ".join(wrong)} not finite. {kept} A smaller '
          'optimizer.learning_rate or awp.gamma may help.')

  def end_epoch(self) -> None:
    """Evaluates, writes the epoch's line, and saves."""
    config, epoch = self.run.config, self.step // self.run.steps_per_epoch
    means = self.fetch_sums()
    rate = setup_lib.build_schedule(config, self.run.steps_per_epoch)(
        self.step - 1)
    line = {
        'epoch': epoch, 'learning_rate': float(rate),
        'train_loss': means['loss'],
        'train_batch_robust_accuracy': means['robust_accuracy'],
        'gradient_norm': means['gradient_norm'],
        'perturbation_ratio': means['perturbation_ratio'],
        'images': int(means['images'])}
    started = time.perf_counter()
    if epoch % config.eval.every_epochs == 0 or epoch == config.epochs:
      line |= steps.evaluate(self.run, self.eval_fn, self.state)
      self._check_finite(line)
    line |= {
        'seconds_training': self.seconds,
        'seconds_evaluating': time.perf_counter() - started,
        'images_per_second': means['images'] / self.seconds}
    self.log.append(line)
    self.progress.say(_epoch_text(line, config.epochs))
    self.sums, self.seconds = self._replicated(steps.zero_sums()), 0.0
    best = results.best_line(self.log.lines, config.select_on)
    if best is not None and best['epoch'] == epoch:
      self.best.save(self.step, steps.to_tree(self.state, self.sums), line)
    self.save()

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


def _epoch_text(line: dict[str, Any], epochs: int) -> str:
  text = f'epoch {line["epoch"]}/{epochs}  loss {line["train_loss"]:.4f}'
  if 'test_robust_accuracy' in line:
    text += ''.join(
        f'  {split}: natural {100 * line[f"{split}_natural_accuracy"]:.2f} %, '
        f'robust {100 * line[f"{split}_robust_accuracy"]:.2f} %'
        for split in ('train', 'test'))
  return f'{text}  {line["images_per_second"]:.0f} images/s'


def train(run: runs.Run) -> dict[str, Any] | None:
  """Trains to the end, from the last checkpoint if there is one.

  Args:
    run: of `runs.prepare`.

  Returns:
    The contents of `summary.json`, or None if a signal stopped the run, in
    which case the same call goes on where it stopped.

  Raises:
    Diverged: when numbers are no longer finite; the last checkpoint is good.
    checkpoints.CheckpointError: for a checkpoint that is not of this run.
  """
  with _StopRequest() as stop:
    loop = _Loop(run)
    try:
      if loop.step:
        loop.progress.say(f'going on from step {loop.step} of {loop.total}')
      finished = _run_steps(loop, stop)
    finally:
      loop.close()
  if not finished:
    print(
        f'{stop.name}: saved step {loop.step} of {loop.total} in '
        f'{run.workdir}; the same command goes on from there.', flush=True)
    return None
  summary = results.summarise(
      loop.log.lines, run.config.select_on, data.describe(run.dataset))
  results.plot_curves(
      loop.log.lines, run.workdir / 'curves.png', run.workdir.name)
  results.write_json(run.workdir / 'summary.json', summary)
  report.write_or_say_why(run, 'train')
  return summary


def _run_steps(loop: _Loop, stop: _StopRequest) -> bool:
  """Runs the steps that are left; False if a signal came first."""
  config, per_epoch = loop.run.config, loop.run.steps_per_epoch
  every = config.checkpoint_every_steps
  while loop.step < loop.total:
    position = loop.step % per_epoch
    step_fn = loop.step_fn(position)
    started = time.perf_counter()
    loop.state, loop.sums = step_fn(
        loop.state, loop.sums, loop.images, loop.labels, loop.device_numbers)
    loop.step += 1
    is_last = position + 1 == per_epoch
    is_shown = is_last or (position + 1) % config.log_every_steps == 0
    is_stopping = stop.name is not None
    is_saved = is_stopping or bool(every and loop.step % every == 0)
    # Nothing is saved unseen: waiting for the step belongs to its time, and
    # numbers that are not finite must not replace a good checkpoint.
    means = loop.fetch_sums() if is_shown or is_saved else {}
    loop.seconds += time.perf_counter() - started
    if is_shown:
      loop.progress.report(
          loop.step, means['images'] / loop.seconds,
          f'loss {means["loss"]:.4f}')
    if is_last:
      loop.end_epoch()
    elif is_saved:
      loop.save()
    if is_stopping:
      return loop.step == loop.total
  return True
