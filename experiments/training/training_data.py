"""The training images of a run, on the devices, and the batch of each step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import augmentation, batches
from experiments.parallel import placement
from experiments.runs import run as run_lib


class TrainingData(NamedTuple):
  """The training images of a run; each device holds a copy.

  Attributes:
    images: [N, H, W, C], uint8 in 0..255 or floats in [0, 1].
    labels: integers [N].
    extra_images: [M, H, W, C] in the same ranges, or None.
    extra_labels: integers [M], or None.
  """

  images: Any
  labels: Any
  extra_images: Any = None
  extra_labels: Any = None


def of_run(run: run_lib.Run) -> TrainingData:
  """The run's training images on the host."""
  dataset, extra = run.dataset, run.extra
  if extra is None:
    return TrainingData(dataset.x_train, dataset.y_train)
  return TrainingData(
      dataset.x_train, dataset.y_train, extra.images, extra.labels)


def order_number(run: run_lib.Run, step: int) -> int:
  """The number of the permutation that a step takes its batch from."""
  if run.extra is None:
    return step // run.steps_per_epoch
  config = run.config
  is_extra = batches.extra_rows(config.batch_size, config.extra.fraction)
  return step // batches.batches_of_pass(
      len(run.dataset.y_train), int(np.sum(~is_extra)))


def make_order_fn(run: run_lib.Run) -> Callable[..., Any]:
  """The compiled (key, number) -> permutation [N], on all devices."""
  return jax.jit(
      lambda key, number: batches.permutation(
          key, number, len(run.dataset.y_train)),
      out_shardings=placement.replicated())


def global_batch(
    run: run_lib.Run, data: TrainingData, order: Any, keys: dict[str, Any],
    step: Any, size: int) -> tuple[Any, Any]:
  """The global batch of a step: images in [0, 1], and labels.

  Args:
    run: the run.
    data: from `of_run`.
    order: the permutation [N] with the number `order_number(run, step)`.
    keys: PRNG keys by purpose, from `experiments.runs.run.keys`.
    step: number of completed steps; may be traced.
    size: number of images in this batch; the last of an epoch may be smaller.

  Returns:
    Images [size, H, W, C] and labels: integers [size], or probabilities
    [size, C] with mixup.
  """
  config = run.config
  policy = augmentation.Augmentation(**config.augmentation)
  pixels = jnp.dtype(config.model.param_dtype)
  if pixels == jnp.bfloat16:
    pixels = jnp.dtype(jnp.float32)  # steps of 2 / 255 need more than 8 bits
  if run.extra is None:
    indices = batches.batch_indices(
        order, step % run.steps_per_epoch, config.batch_size, size)
    images, labels = data.images[indices], data.labels[indices]
  else:
    is_extra = batches.extra_rows(size, config.extra.fraction)
    own, extra = batches.mixed_batch_indices(
        keys['order'], order, data.extra_labels.shape[0], step,
        int(np.sum(~is_extra)), int(np.sum(is_extra)))
    images, labels = (
        batches.interleave(is_extra, first, second) for first, second in (
            (batches.to_pixels(data.images[own], pixels),
             batches.to_pixels(data.extra_images[extra], pixels)),
            (data.labels[own], data.extra_labels[extra])))
  key = jax.random.fold_in(keys['augment'], step)
  images = batches.to_pixels(
      augmentation.augment(key, images, policy), pixels)
  if policy.mixup:
    return augmentation.mix(
        jax.random.fold_in(key, 5), images, labels, run.dataset.num_classes,
        policy.mixup)
  return images, labels
