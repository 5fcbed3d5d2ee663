"""The training images of a run and the batch of each step.

The images are either on every device (`TrainingData`), and the compiled step
gathers its batch from them, or on the host, from where the rows of each step
(`Rows`) are passed to it (`streaming`). Both give the same batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import augmentation, batches
from experiments.parallel import placement
from experiments.runs import run as run_lib


class TrainingData(NamedTuple):
  """All training images of a run; each device holds a copy.

  The pixels of an image are on one axis. TPUs pad the last axes of an array, so
  a program that gathers from [N, H, W, C] would first copy all images to
  another layout, in every step.

  Attributes:
    images: [N, H W C], uint8 in 0..255 or floats in [0, 1].
    labels: integers [N].
    extra_images: [M, H W C] in the same ranges, or None.
    extra_labels: integers [M], or None.
  """

  images: Any
  labels: Any
  extra_images: Any = None
  extra_labels: Any = None


class Rows(NamedTuple):
  """The training images of one step, before augmentation.

  Attributes:
    images: [B, H W C] with the dtype of the images and the extra images. If
      only one of them is uint8, it is here in 0..255 as floats.
    labels: integers [B].
  """

  images: Any
  labels: Any


class Selection(NamedTuple):
  """The positions of a batch's images in the training data.

  Attributes:
    index: integers [B], positions in the extra images where `is_extra`.
    is_extra: bools [B].
  """

  index: Any
  is_extra: Any


def of_run(run: run_lib.Run) -> TrainingData:
  """The run's training images on the host."""
  dataset, extra = run.dataset, run.extra
  images = dataset.x_train.reshape(len(dataset.x_train), -1)
  if extra is None:
    return TrainingData(images, dataset.y_train)
  return TrainingData(
      images, dataset.y_train, extra.images.reshape(len(extra.images), -1),
      extra.labels)


def is_streamed(run: run_lib.Run) -> bool:
  """Whether the images stay on the host, being more than the limit."""
  size = run.dataset.x_train.nbytes
  if run.extra is not None:
    size += run.extra.images.nbytes
  return size > run.config.data_on_device_gib * 2**30


def needs_all_rows(run: run_lib.Run) -> bool:
  """Whether a device needs the whole batch: mixup mixes any two images."""
  return bool(run.config.augmentation.mixup)


def extra_mask(run: run_lib.Run, size: int) -> np.ndarray:
  """Which rows of a batch are extra images, bools [size]."""
  fraction = 0.0 if run.extra is None else run.config.extra.fraction
  return batches.extra_rows(size, fraction)


def order_number(run: run_lib.Run, step: int) -> int:
  """The number of the permutation that a step takes its batch from."""
  if run.extra is None:
    return step // run.steps_per_epoch
  is_extra = extra_mask(run, run.config.batch_size)
  return step // batches.batches_of_pass(
      len(run.dataset.y_train), int(np.sum(~is_extra)))


def make_order_fn(
    run: run_lib.Run, sharding: jax.sharding.Sharding | None = None
) -> Callable[..., Any]:
  """The compiled (key, number) -> permutation [N].

  Args:
    run: the run.
    sharding: of the permutation; by default on the device of the key.

  Returns:
    A function of the run's key for the order and the permutation's number.
  """
  return jax.jit(
      lambda key, number: batches.permutation(
          key, number, len(run.dataset.y_train)),
      out_shardings=sharding)


def select(
    run: run_lib.Run, key: Any, order: Any, step: Any, size: int) -> Selection:
  """The positions of the images of a step.

  Args:
    run: the run.
    key: the run's key for the order.
    order: the permutation [N] with the number `order_number(run, step)`.
    step: number of completed steps; may be traced.
    size: number of images in this batch; the last of an epoch may be smaller.

  Returns:
    The selection [size].
  """
  config, is_extra = run.config, extra_mask(run, size)
  if run.extra is None:
    return Selection(
        batches.batch_indices(
            order, step % run.steps_per_epoch, config.batch_size, size),
        is_extra)
  own, extra = batches.mixed_batch_indices(
      key, order, len(run.extra.labels), step, int(np.sum(~is_extra)),
      int(np.sum(is_extra)))
  return Selection(batches.interleave(is_extra, own, extra), is_extra)


def _gather(data: TrainingData, selection: Selection) -> Rows:
  """The selected rows on the device."""
  index, is_extra = selection
  if data.extra_images is None:
    return Rows(data.images[index], data.labels[index])

  def either(own: Any, extra: Any) -> Any:
    # Gathers twice, because devices differ in their number of extra images.
    mask = is_extra.reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(
        mask, extra[jnp.where(is_extra, index, 0)],
        own[jnp.where(is_extra, 0, index)])

  return Rows(
      either(data.images, data.extra_images),
      either(data.labels, data.extra_labels))


def _to_pixels(run: run_lib.Run, images: Any, is_extra: Any) -> Any:
  """Rows of images with pixels in [0, 1]."""
  dtype = jnp.dtype(run.config.model.param_dtype)
  if dtype == jnp.bfloat16:
    dtype = jnp.dtype(jnp.float32)  # steps of 2 / 255 need more than 8 bits
  if run.extra is not None:
    own, extra = run.dataset.x_train.dtype, run.extra.images.dtype
    if (own == np.uint8) != (extra == np.uint8):
      is_level = is_extra if extra == np.uint8 else ~is_extra
      images = images.astype(dtype)
      return jnp.where(
          is_level[:, None, None, None], images / 255, images)
  return batches.to_pixels(images, dtype)


def _batch(
    run: run_lib.Run, source: TrainingData | Rows, order: Any,
    keys: dict[str, Any], step: Any, size: int, own: Callable[[Any], Any]
) -> tuple[Any, Any]:
  """Selected and augmented images; `own` takes a device's rows of a pytree."""
  policy = augmentation.Augmentation(**run.config.augmentation)
  draws = augmentation.draw(
      jax.random.fold_in(keys['augment'], step), size,
      run.dataset.x_train.shape[1:], policy)
  if isinstance(source, TrainingData):
    source = _gather(
        source, own(select(run, keys['order'], order, step, size)))
  images = augmentation.apply(
      own(draws), source.images.reshape(-1, *run.dataset.x_train.shape[1:]),
      policy)
  return (
      _to_pixels(run, images, own(extra_mask(run, size))), source.labels)


def global_batch(
    run: run_lib.Run, source: TrainingData | Rows, order: Any,
    keys: dict[str, Any], step: Any, size: int) -> tuple[Any, Any]:
  """The global batch of a step: images in [0, 1], and labels.

  Args:
    run: the run.
    source: all training images, or all rows of the step.
    order: the permutation [N] with the number `order_number(run, step)`. Not
      used with `Rows`.
    keys: PRNG keys by purpose, from `experiments.runs.run.keys`.
    step: number of completed steps; may be traced.
    size: number of images in this batch; the last of an epoch may be smaller.

  Returns:
    Images [size, H, W, C] and labels: integers [size], or probabilities
    [size, C] with mixup.
  """
  images, labels = _batch(
      run, source, order, keys, step, size,
      lambda tree: jax.tree.map(jnp.asarray, tree))
  mixup = run.config.augmentation.mixup
  if not mixup:
    return images, labels
  key = jax.random.fold_in(jax.random.fold_in(keys['augment'], step), 5)
  return augmentation.mix(
      key, images, labels, run.dataset.num_classes, mixup)


def device_batch(
    run: run_lib.Run, source: TrainingData | Rows, order: Any,
    keys: dict[str, Any], step: Any, size: int, device: Any
) -> tuple[Any, Any]:
  """The rows of the global batch for one device, inside a mapped function.

  Args:
    run: the run.
    source: all training images; or the rows of the step for this device, or all
      of them if `needs_all_rows(run)`.
    order: as in `global_batch`.
    keys: the same.
    step: the same.
    size: number of images in the global batch.
    device: number of the device, [1].

  Returns:
    Images and labels like those of `global_batch`.
  """

  def own(tree: Any) -> Any:
    return jax.tree.map(
        lambda array: placement.own_rows(jnp.asarray(array), device), tree)

  if needs_all_rows(run):
    return own(global_batch(run, source, order, keys, step, size))
  return _batch(run, source, order, keys, step, size, own)
