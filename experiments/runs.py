"""A run: its config, folder, data and network, checked before it starts."""

import functools
import pathlib
import sys
from typing import Any, NamedTuple
import zlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import awp_jax
from experiments import data, workdirs
from experiments import setup as setup_lib


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

  @property
  def order(self) -> dict[str, int]:
    """What the run's order of images depends on beside the config."""
    return {
        'steps_per_epoch': self.steps_per_epoch,
        'last_batch': self.batch_sizes[-1],
        'training_data_crc32': zlib.crc32(
            np.ascontiguousarray(self.dataset.x_train).data,
            zlib.crc32(np.ascontiguousarray(self.dataset.y_train).data))}


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
      num_test=config.num_test or None, seed=config.seed,
      progress=sys.stderr.isatty())
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
  workdirs.claim(folder, config)
  return Run(
      config, folder, built, dataset, validation, model, num_devices)


def keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The PRNG keys of a run by their purpose, from its seed alone."""
  names = ('init', 'order', 'augment', 'step', 'eval')
  return dict(zip(
      names, jax.random.split(jax.random.key(config.seed), len(names)),
      strict=True))


def initial_state(run: Run) -> awp_jax.TrainState:
  """Parameters, statistics and optimizer state before the first step."""
  images = jnp.zeros((1, *run.dataset.x_train.shape[1:]), jnp.float32)
  variables = jax.jit(functools.partial(run.model.init, train=False))(
      keys(run.config)['init'], images)
  return awp_jax.TrainState.create(
      apply_fn=run.model.apply, params=variables['params'],
      tx=setup_lib.build_optimizer(run.config, run.steps_per_epoch),
      batch_stats=variables.get('batch_stats', {}))
