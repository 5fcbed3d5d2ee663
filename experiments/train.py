"""The training run: everything between a config and a finished workdir.

`prepare` checks and loads, and raises one clear error for what cannot work.
`train` then runs, from the last checkpoint if there is one, and writes
`metrics.jsonl`, TensorBoard events, `curves.png`, checkpoints and
`summary.json`. The host only dispatches compiled steps and looks at the numbers
once per `log_every_steps`.
"""

from collections.abc import Callable
import functools
import math
import pathlib
import signal
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import awp_jax
from experiments import checkpoints
from experiments import data
from experiments import pipeline
from experiments import progress as progress_lib
from experiments import results
from experiments import setup as setup_lib
from experiments import workdirs

AXIS = 'batch'


class Diverged(RuntimeError):
  """Training has produced numbers that are not finite."""


class Run(NamedTuple):
  """A run that is ready to start.

  Attributes:
    config: its plain values.
    workdir: its folder.
    setup: the objects that the config describes.
    dataset: images and labels, without the validation images.
    validation: images and labels held out from training; empty if none are.
    model: the network.
    num_devices: over which each batch is spread.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  setup: setup_lib.Setup
  dataset: data.Dataset
  validation: tuple[np.ndarray, np.ndarray]
  model: nn.Module
  num_devices: int

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch, the smaller last one included."""
    return len(self.batch_sizes)

  @property
  def batch_sizes(self) -> list[int]:
    """The size of each batch of an epoch.

    The last is what is left over, less what the devices do not divide: fewer
    than `num_devices` images, others in every epoch.
    """
    full, rest = divmod(len(self.dataset.x_train), self.config.batch_size)
    rest -= rest % self.num_devices
    return [self.config.batch_size] * full + ([rest] if rest else [])


class Sums(NamedTuple):
  """Sums of the step's metrics over the images of an epoch, on the device."""

  loss: Any
  robust_accuracy: Any
  gradient_norm: Any
  perturbation_ratio: Any
  images: Any


def zero_sums() -> Sums:
  """The sums at the start of an epoch."""
  return Sums(*(np.zeros((), np.float32) for _ in Sums._fields))


def prepare(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> Run:
  """Checks the config, the folder and the data.

  Args:
    config: with the fields of `experiments/configs/cifar10_awp.py`.
    workdir: the run's folder; made if it is not there.

  Returns:
    The run.

  Raises:
    ValueError: for what cannot work, with the value and what is allowed.
  """
  built = setup_lib.build(config)
  num_devices = jax.device_count()
  setup_lib.check_devices(config.batch_size, num_devices, 'batch_size')
  setup_lib.check_devices(
      config.eval.batch_size, num_devices, 'eval.batch_size')
  folder = workdirs.open_workdir(workdir, config)
  dataset = data.load(
      config.dataset, data_dir=config.data_dir or None,
      npz_path=config.npz_path or None, num_train=config.num_train or None,
      num_test=config.num_test or None, seed=config.seed)
  shape = dataset.x_train.shape[1:]
  validation = np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32)
  if config.num_validation:
    dataset, *held_out = data.split_validation(
        dataset, config.num_validation, config.seed)
    validation = held_out[0], held_out[1]
  if len(dataset.x_train) < num_devices:
    raise ValueError(
        f'{len(dataset.x_train)} training images cannot be spread over '
        f'{num_devices} devices.')
  model = setup_lib.build_model(config, dataset)
  return Run(
      config, folder, built, dataset, validation, model, num_devices)


def _keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
  names = ('init', 'order', 'augment', 'step', 'eval')
  return dict(zip(
      names, jax.random.split(jax.random.key(config.seed), len(names)),
      strict=True))


def initial_state(run: Run) -> awp_jax.TrainState:
  """Parameters, statistics and optimizer state before the first step."""
  images = jnp.zeros((1, *run.dataset.x_train.shape[1:]), jnp.float32)
  variables = jax.jit(functools.partial(run.model.init, train=False))(
      _keys(run.config)['init'], images)
  return awp_jax.TrainState.create(
      apply_fn=run.model.apply, params=variables['params'],
      tx=setup_lib.build_optimizer(run.config, run.steps_per_epoch),
      batch_stats=variables.get('batch_stats', {}))


def make_train_fn(run: Run, size: int, with_awp: bool) -> Callable[..., Any]:
  """The pmapped step: (state, sums, images, labels, device numbers).

  Args:
    run: the run.
    size: the images of the batch over all devices.
    with_awp: whether weights are perturbed (not before the end of warm-up).

  Returns:
    A function that returns the next state and sums, both un-stacked; it
    consumes those that it is given.
  """
  config, keys = run.config, _keys(run.config)
  augmentation = pipeline.Augmentation(**config.augmentation)
  perturbation = run.setup.perturbation
  if not with_awp:
    perturbation = perturbation._replace(gamma=0.0)
  pixels = jnp.dtype(config.model.param_dtype)
  if pixels == jnp.bfloat16:
    pixels = jnp.dtype(jnp.float32)  # steps of 2 / 255 need more than 8 bits

  def step(
      state: awp_jax.TrainState, sums: Sums, images: Any, labels: Any,
      device: Any) -> tuple[awp_jax.TrainState, Sums]:
    indices = pipeline.batch_indices(
        keys['order'], labels.shape[0], config.batch_size, state.step,
        run.steps_per_epoch, size)
    batch = pipeline.augment(
        jax.random.fold_in(keys['augment'], state.step), images[indices],
        augmentation)
    batch, targets = (
        pipeline.device_part(array, device, run.num_devices)
        for array in (batch, labels[indices]))
    state, metrics = awp_jax.train_step(
        state, (pipeline.to_pixels(batch, pixels), targets), keys['step'],
        objective=run.setup.objective, threat=run.setup.threat,
        attack=run.setup.attack, perturbation=perturbation,
        statistics=config.statistics, axis_name=AXIS)
    weighted = (*(size * metric for metric in metrics), size)
    return state, Sums(*(
        (total + value).astype(jnp.float32)
        for total, value in zip(sums, weighted, strict=True)))

  return jax.pmap(
      step, axis_name=AXIS, in_axes=(None, None, None, None, 0), out_axes=None,
      donate_argnums=(0, 1))


def make_eval_fn(run: Run) -> Callable[..., Any]:
  """The pmapped evaluation: (state, images, labels, valid, key) -> sums."""

  def step(
      state: awp_jax.TrainState, images: Any, labels: Any, valid: Any, key: Any
  ) -> awp_jax.EvalMetrics:
    pixels = pipeline.to_pixels(images, jnp.dtype(jnp.float32))
    return awp_jax.eval_step(
        state, (pixels, labels, valid), key, threat=run.setup.threat,
        attack=run.setup.eval_attack, axis_name=AXIS)

  return jax.pmap(
      step, axis_name=AXIS, in_axes=(None, 0, 0, 0, None), out_axes=None)


def evaluate_split(
    run: Run, eval_fn: Callable[..., Any], state: awp_jax.TrainState,
    images: np.ndarray, labels: np.ndarray, key: Any) -> dict[str, float]:
  """Natural and robust accuracy and loss on one split.

  Args:
    run: the run.
    eval_fn: of `make_eval_fn`.
    state: the model.
    images: [N, H, W, C].
    labels: [N].
    key: a PRNG key; each batch folds in its number.

  Returns:
    Means by name; accuracies in [0, 1].
  """
  size = run.config.eval.batch_size
  spread = (run.num_devices, size // run.num_devices)
  pending = []
  for number in range(math.ceil(len(images) / size)):
    part = slice(number * size, (number + 1) * size)
    x, y = images[part], labels[part]
    valid = np.arange(size) < len(x)
    x = np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
    y = np.pad(y, (0, size - len(y)))
    pending.append(eval_fn(
        state, x.reshape(*spread, *x.shape[1:]), y.reshape(spread),
        valid.reshape(spread), jax.random.fold_in(key, number)))
  sums = jax.tree.map(lambda *values: float(np.sum(values)),
                      *jax.device_get(pending))
  return {
      'natural_accuracy': sums.natural_correct / sums.examples,
      'robust_accuracy': sums.robust_correct / sums.examples,
      'natural_loss': sums.natural_loss / sums.examples,
      'robust_loss': sums.robust_loss / sums.examples}


def evaluate(
    run: Run, eval_fn: Callable[..., Any], state: awp_jax.TrainState
) -> dict[str, float]:
  """`evaluate_split` on training, test and validation images, names prefixed."""
  wanted = min(run.config.eval.num_train, len(run.dataset.x_train))
  shown = np.linspace(0, len(run.dataset.x_train) - 1, wanted).astype(int)
  splits = {
      'train': (run.dataset.x_train[shown], run.dataset.y_train[shown]),
      'test': (run.dataset.x_test, run.dataset.y_test)}
  if len(run.validation[0]):
    splits['validation'] = run.validation
  key = jax.random.fold_in(_keys(run.config)['eval'], int(state.step))
  metrics = {}
  for number, (split, (images, labels)) in enumerate(splits.items()):
    values = evaluate_split(
        run, eval_fn, state, images, labels, jax.random.fold_in(key, number))
    metrics |= {f'{split}_{name}': value for name, value in values.items()}
  return metrics


class _StopRequest:
  """Remembers the first SIGTERM or SIGINT; a second one takes its usual course."""

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

  def __init__(self, run: Run) -> None:
    self.run = run
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
    self.eval_fn = make_eval_fn(run)
    self._compiled: dict[tuple[int, bool], Any] = {}

  def _replicated(self, tree: Any) -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    return jax.device_put(
        tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

  def _restore(self) -> tuple[awp_jax.TrainState, Sums, dict[str, Any]]:
    state, sums, notes = initial_state(self.run), zero_sums(), {}
    if self.last.step() is not None:
      stored, notes = self.last.load(_to_tree(state, sums))
      state, sums = _from_tree(state, stored)
    return self._replicated(state), self._replicated(sums), notes

  def step_fn(self, position: int) -> Any:
    """The compiled step for a position in the epoch, compiled when first met."""
    epoch = self.step // self.run.steps_per_epoch
    size = self.run.batch_sizes[position]
    awp = self.run.config.awp
    with_awp = awp.gamma > 0 and epoch >= awp.warmup_epochs
    if (size, with_awp) not in self._compiled:
      method = 'with AWP' if with_awp else 'without AWP'
      self.progress.say(f'compiling the step for {size} images, {method}')
      self._compiled[size, with_awp] = make_train_fn(
          self.run, size, with_awp).lower(
              self.state, self.sums, self.images, self.labels,
              self.device_numbers).compile()
    return self._compiled[size, with_awp]

  def save(self) -> None:
    """Writes the last checkpoint."""
    self.last.save(
        self.step, _to_tree(self.state, self.sums),
        {'seconds_training': self.seconds})

  def fetch_sums(self) -> dict[str, float]:
    """The means of the epoch so far.

    Raises:
      Diverged: if one is not finite.
    """
    sums = jax.device_get(self.sums)
    images = float(sums.images)
    means = {
        name: float(value) / images
        for name, value in sums._asdict().items() if name != 'images'}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    if wrong:
      raise Diverged(
          f'training diverged before step {self.step}: {", ".join(wrong)} of '
          f'epoch {self.step // self.run.steps_per_epoch + 1} are not finite. '
          f'The last good state is in {self.last.folder}. A smaller '
          'optimizer.learning_rate or awp.gamma may help.')
    return means | {'images': images}

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
      line |= evaluate(self.run, self.eval_fn, self.state)
    line |= {
        'seconds_training': self.seconds,
        'seconds_evaluating': time.perf_counter() - started,
        'images_per_second': means['images'] / self.seconds}
    self.log.append(line)
    self.progress.say(_epoch_text(line, config.epochs))
    self.sums, self.seconds = self._replicated(zero_sums()), 0.0
    best = results.best_line(self.log.lines, config.select_on)
    if best is not None and best['epoch'] == epoch:
      self.best.save(self.step, _to_tree(self.state, self.sums), line)
    self.save()


def _to_tree(state: awp_jax.TrainState, sums: Sums) -> dict[str, Any]:
  return {
      'step': jnp.asarray(state.step, jnp.int32), 'params': state.params,
      'batch_stats': state.batch_stats, 'opt_state': state.opt_state,
      'sums': sums}


def _from_tree(
    state: awp_jax.TrainState, tree: dict[str, Any]
) -> tuple[awp_jax.TrainState, Sums]:
  return state.replace(
      step=tree['step'], params=tree['params'],
      batch_stats=tree['batch_stats'], opt_state=tree['opt_state']
  ), Sums(*tree['sums'])


def _epoch_text(line: dict[str, Any], epochs: int) -> str:
  text = f'epoch {line["epoch"]}/{epochs}  loss {line["train_loss"]:.4f}'
  if 'test_robust_accuracy' in line:
    text += '  '.join(
        f'  {split} natural {100 * line[f"{split}_natural_accuracy"]:.2f} % '
        f'robust {100 * line[f"{split}_robust_accuracy"]:.2f} %'
        for split in ('train', 'test'))
  return f'{text}  {line["images_per_second"]:.0f} images/s'


def train(run: Run) -> dict[str, Any] | None:
  """Trains to the end, from the last checkpoint if there is one.

  Args:
    run: of `prepare`.

  Returns:
    The contents of `summary.json`, or None if a signal stopped the run, in
    which case the same call goes on where it stopped.

  Raises:
    Diverged: when numbers are no longer finite; the last checkpoint is good.
  """
  loop = _Loop(run)
  if loop.step:
    loop.progress.say(f'going on from step {loop.step} of {loop.total}')
  with _StopRequest() as stop:
    finished = _run_steps(loop, stop)
  loop.progress.close()
  loop.log.close()
  loop.last.close()
  loop.best.close()
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
  return summary


def _run_steps(loop: _Loop, stop: _StopRequest) -> bool:
  """Runs the steps that are left; False if a signal came first."""
  config, per_epoch = loop.run.config, loop.run.steps_per_epoch
  while loop.step < loop.total:
    position = loop.step % per_epoch
    step_fn = loop.step_fn(position)
    started = time.perf_counter()
    loop.state, loop.sums = step_fn(
        loop.state, loop.sums, loop.images, loop.labels, loop.device_numbers)
    loop.step += 1
    is_last = position + 1 == per_epoch
    if is_last or (position + 1) % config.log_every_steps == 0:
      means = loop.fetch_sums()
      loop.seconds += time.perf_counter() - started
      loop.progress.report(
          loop.step, means['images'] / loop.seconds,
          f'loss {means["loss"]:.4f}')
    else:
      loop.seconds += time.perf_counter() - started
    every = config.checkpoint_every_steps
    if is_last:
      loop.end_epoch()
    elif stop.name or (every and loop.step % every == 0):
      loop.save()
    if stop.name:
      return loop.step == loop.total
  return True
