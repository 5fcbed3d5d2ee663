"""A run: its config, folder, data and network, checked before training."""

import functools
import os
from typing import Any, NamedTuple
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import awp_jax
from awp_jax.core import checks
from experiments.config import build, networks, optimizers, schema
from experiments.data import arrays, batches, datasets, extra_images
from experiments.parallel import processes
from experiments.runs import reading, warm_start, workdirs, writers
from experiments.util import atomic, named, paths
from experiments.util.errors import UserError


class Run(NamedTuple):
  """A run that is ready to start.

  Attributes:
    config: its plain values.
    workdir: its folder.
    setup: the objects that the config describes.
    dataset: images and labels, without the validation images.
    validation: images and labels held out from training; empty if none are.
    model: the network.
    num_devices: number of devices that each batch is sharded over.
    extra: extra images and labels mixed into the batches, or None.
  """

  config: ml_collections.ConfigDict
  workdir: paths.Path
  setup: build.Setup
  dataset: datasets.Dataset
  validation: tuple[np.ndarray, np.ndarray]
  model: nn.Module
  num_devices: int
  extra: extra_images.ExtraData | None = None

  @property
  def num_shares(self) -> int:
    """Number of equal shares of a batch: the parts of all devices."""
    return self.num_devices * self.config.accumulate

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch, the smaller last one included."""
    return len(self.batch_sizes)

  @property
  def batch_sizes(self) -> list[int]:
    """The size of each batch of an epoch.

    The last batch has the remaining images, rounded down to a multiple of
    `num_shares`, or is left out if a share would be too small for the method;
    the images dropped differ in every epoch. With extra images all batches are
    full, and an epoch has as many batches as the data set alone would fill.
    """
    if self.extra is not None:
      return [self.config.batch_size] * -(
          -len(self.dataset.x_train) // self.config.batch_size)
    full, rest = divmod(len(self.dataset.x_train), self.config.batch_size)
    rest -= rest % self.num_shares
    if rest < self.num_shares * smallest_share(self.setup.perturbation):
      rest = 0
    return [self.config.batch_size] * full + ([rest] if rest else [])

  @property
  def warmup_steps(self) -> int:
    """Number of steps before the weight perturbation starts."""
    awp = self.config.awp
    return awp.warmup_steps or awp.warmup_epochs * self.steps_per_epoch

  @property
  def order(self) -> dict[str, int]:
    """What determines the order of images, besides the config."""
    facts = {
        'steps_per_epoch': self.steps_per_epoch,
        'last_batch': self.batch_sizes[-1],
        'training_data_crc32': _crc32(
            self.dataset.x_train, self.dataset.y_train)}
    if self.extra is not None:
      facts['extra_data_crc32'] = _crc32(self.extra.images, self.extra.labels)
    return facts


def smallest_share(perturbation: awp_jax.Method) -> int:
  """Images that every part on every device needs: 2 if they are halved."""
  return 2 if perturbation.natural_batch == 'other' else 1


def _crc32(images: np.ndarray, labels: np.ndarray) -> int:
  value = zlib.crc32(np.ascontiguousarray(labels).data)
  for chunk in arrays.chunks(images):
    value = zlib.crc32(np.ascontiguousarray(chunk).data, value)
  return value


def prepare(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> Run:
  """Checks the config, the folder and the data.

  Args:
    config: a config with the fields of `experiments/configs/base.py`.
    workdir: the run's folder; created if absent.

  Returns:
    The run.

  Raises:
    UserError: for an invalid value, with the allowed ones.
  """
  built = build.build(config)
  num_devices = jax.device_count()
  build.check_devices(
      config.batch_size, num_devices, 'batch_size', config.accumulate)
  build.check_devices(
      config.eval.batch_size, num_devices, 'eval.batch_size')
  writers.check(config.loggers)
  if config.init_from:
    warm_start.check(config.init_from)
  folder = paths.parse(workdir)
  processes.on_main(lambda: workdirs.open_workdir(folder, config))
  _check_processes(config)
  _check_shared(folder)
  dataset, validation = _load_data(config)
  least = smallest_share(built.perturbation)
  for images, what in (
      (len(dataset.x_train), f'{len(dataset.x_train)} training images'),
      (config.batch_size, f'batch_size={config.batch_size}')):
    if images < num_devices * config.accumulate * least:
      raise UserError(
          f'{what} cannot be spread over {num_devices} devices with '
          f'accumulate={config.accumulate}: {built.perturbation.name} needs '
          f'{least} images in every part.')
  extra = None
  if config.extra.path:
    extra = extra_images.load(
        config.extra.path, image_shape=dataset.x_train.shape[1:],
        num_classes=dataset.num_classes)
    _check_fraction(config)
  model = networks.build(config, dataset)
  run = Run(
      config, folder, built, dataset, validation, model, num_devices, extra)
  _check_data(run)
  if config.epochs * run.steps_per_epoch > checks.LARGEST_COUNT:
    raise UserError(
        f'epochs={config.epochs} of {run.steps_per_epoch} steps are more than '
        f'{checks.LARGEST_COUNT:,} steps.')
  if named.is_external(config.weight_perturbation) or (
      'mask' in config.weight_perturbation):
    _check_mask(run)
  processes.on_main(lambda: workdirs.claim(folder, config))
  return run


def _check_mask(run: Run) -> None:
  """Raises UserError if the weight perturbation does not fit the network."""
  images = jax.ShapeDtypeStruct(
      (1, *run.dataset.x_train.shape[1:]), jnp.float32)
  params = jax.eval_shape(
      functools.partial(run.model.init, train=False), jax.random.key(0),
      images)['params']
  try:
    run.setup.perturbation.chosen(params)
  except ValueError as error:
    raise UserError(
        f'weight_perturbation={run.config.weight_perturbation!r} does not fit '
        f'{run.config.model.name!r}: {error}') from error


def _check_processes(config: ml_collections.ConfigDict) -> None:
  """Raises UserError unless all processes do the same on as many devices."""
  processes.check_equal('the config', schema.flatten(config))
  processes.check_equal(
      'their devices', {'number': jax.local_device_count()})


def _check_shared(folder: paths.Path) -> None:
  """Raises UserError unless all processes see one folder.

  Each of them reads what the main process writes.
  """
  if processes.count() == 1:
    return
  file = folder / processes.from_main(lambda: atomic.leftover_name('shared'))
  processes.on_main(lambda: file.write_text(''))
  is_seen = file.exists()
  processes.barrier()
  processes.on_main(file.unlink)
  processes.check_equal(
      f'the workdir {str(folder)!r}, which they must share',
      {'whether a new file is there': is_seen})


def _check_data(run: Run) -> None:
  """Raises UserError unless all processes read the same images."""
  if processes.count() == 1:
    return
  processes.check_equal('the images', {
      'crc32 of training data': _crc32(
          run.dataset.x_train, run.dataset.y_train),
      'crc32 of test data': _crc32(run.dataset.x_test, run.dataset.y_test),
      'crc32 of validation data': _crc32(*run.validation),
      'crc32 of extra data': run.extra and _crc32(
          run.extra.images, run.extra.labels)})


def reopen(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> Run:
  """Opens a run for reading; it may still be training.

  Nothing in the folder is created, changed, removed or locked. Files that only
  training needs are not required.

  Args:
    config: from `workdirs.reader_config`.
    workdir: the run's folder.

  Returns:
    The run.

  Raises:
    UserError: for an invalid value, or if the training images differ from those
      that the run was trained on.
  """
  built = build.build(config)
  folder = paths.parse(workdir)
  _check_processes(config)
  dataset, validation = _load_data(config)
  now = _crc32(dataset.x_train, dataset.y_train)
  then = reading.Reader(folder, 'last').notes().get(
      'training_data_crc32', now)
  if now != then:
    raise UserError(
        f'the training images ({dataset.source}) are not those of the run in '
        f'{str(folder)!r}: their crc32 is {now}, it was {then}.')
  run = Run(
      config, folder, built, dataset, validation,
      networks.build(config, dataset), jax.device_count())
  _check_data(run)
  return run


def _load_data(
    config: ml_collections.ConfigDict
) -> tuple[datasets.Dataset, tuple[np.ndarray, np.ndarray]]:
  """The data set without the validation images, and the validation images."""
  dataset = datasets.load(
      config.dataset, data_dir=config.data_dir or None,
      npz_path=config.npz_path or None, num_train=config.num_train or None,
      num_test=config.num_test or None, seed=config.data_seed,
      image_size=config.image_size or None,
      progress=processes.shows_progress())
  if config.num_validation:
    dataset, *held_out = datasets.split_validation(
        dataset, config.num_validation, config.data_seed)
    return dataset, (held_out[0], held_out[1])
  shape = dataset.x_train.shape[1:]
  return dataset, (np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32))


def _check_fraction(config: ml_collections.ConfigDict) -> None:
  rows = batches.extra_rows(config.batch_size, config.extra.fraction)
  if rows.all() or not rows.any():
    raise UserError(
        f'extra.fraction={config.extra.fraction!r} of a batch of '
        f'{config.batch_size} leaves no images of the other kind.')


def keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The PRNG keys of a run by purpose, derived from its seed."""
  names = ('init', 'order', 'augment', 'step', 'eval')
  return dict(zip(
      names, jax.random.split(jax.random.key(config.seed), len(names)),
      strict=True))


def initial_state(run: Run) -> awp_jax.TrainState:
  """Parameters, statistics and optimizer state before the first step."""
  images = jnp.zeros((1, *run.dataset.x_train.shape[1:]), jnp.float32)
  variables = jax.jit(functools.partial(run.model.init, train=False))(
      keys(run.config)['init'], images)
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  average = None
  if run.config.ema_decay:
    # Copies, because a step donates the buffers of its state.
    average = awp_jax.Average(
        *jax.tree.map(jnp.copy, (params, batch_stats)))
  return awp_jax.TrainState.create(
      apply_fn=run.model.apply, params=params,
      tx=optimizers.build_optimizer(run.config, run.steps_per_epoch),
      batch_stats=batch_stats, average=average,
      method=run.setup.perturbation)


def first_state(run: Run) -> tuple[awp_jax.TrainState, str]:
  """The state before the first step, with the weights of `init_from`, if any.

  Args:
    run: the run.

  Returns:
    The state, and a message on the source of the weights; '' if random.

  Raises:
    UserError: if `init_from` holds another network.
  """
  source = run.config.init_from
  if not source:
    return initial_state(run), ''
  state = initial_state(run)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  found, kept = warm_start.graft(variables, warm_start.read(source), source)
  average = state.average
  if average is not None:
    average = awp_jax.Average(*jax.tree.map(
        jnp.copy, (found['params'], found['batch_stats'])))
  message = f'weights are initialized from {source}'
  if kept:
    message += f'; the classifier ({", ".join(kept)}) is initialized randomly'
  return state.replace(
      params=found['params'], batch_stats=found['batch_stats'],
      average=average), message
