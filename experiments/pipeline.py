"""Batches made on the device: order, crop and flip from (seed, step) alone.

The images lie on the device as they were read (uint8 where they were). Step k
of a run takes, inside the compiled step, its slice of the epoch's permutation
and draws its own crops and flips. Nothing but the key and k enters, so a run
that starts again in the middle sees what it would have seen; and the draw is
for the global batch, so it does not depend on the number of devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.types import Array


class Augmentation(NamedTuple):
  """Random crops and flips.

  Attributes:
    pad: pixels added on every side before a crop of the old size; 0: no crop.
    pad_mode: 'reflect' or 'constant' (zeros).
    flip: whether half of the images are mirrored left to right.
  """

  pad: int
  pad_mode: str
  flip: bool


def to_pixels(images: Array, dtype: jnp.dtype) -> Array:
  """[0, 1] from uint8 (divided by 255) or from floats (as they are)."""
  if images.dtype == jnp.uint8:
    return images.astype(dtype) / 255
  return images.astype(dtype)


def batch_indices(
    key: Array, num_examples: int, batch_size: int, step: Array,
    steps_per_epoch: int, size: int) -> Array:
  """Which examples step `step` of the run takes.

  Every epoch is a permutation of all examples, cut into batches.

  Args:
    key: the run's key for the order.
    num_examples: n.
    batch_size: of a full batch; the last may be smaller.
    step: counted from 0 over the whole run.
    steps_per_epoch: batches in an epoch.
    size: of this batch.

  Returns:
    Indices [size].
  """
  epoch, position = step // steps_per_epoch, step % steps_per_epoch
  order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
  return jax.lax.dynamic_slice(order, (position * batch_size,), (size,))


def augment(key: Array, images: Array, augmentation: Augmentation) -> Array:
  """Pads, crops at a random place of its own, and flips each image.

  Args:
    key: a PRNG key.
    images: [B, H, W, C] of any dtype.
    augmentation: what to do.

  Returns:
    Images like `images`.
  """
  size, height, width, channels = images.shape
  row_key, column_key, flip_key = jax.random.split(key, 3)
  if augmentation.pad:
    pad = augmentation.pad
    margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(images, margins, mode=augmentation.pad_mode)
    rows = jax.random.randint(row_key, (size,), 0, 2 * pad + 1)
    columns = jax.random.randint(column_key, (size,), 0, 2 * pad + 1)
    images = jax.vmap(
        lambda image, row, column: jax.lax.dynamic_slice(
            image, (row, column, 0), (height, width, channels))
    )(padded, rows, columns)
  if augmentation.flip:
    flips = jax.random.bernoulli(flip_key, 0.5, (size, 1, 1, 1))
    images = jnp.where(flips, images[:, :, ::-1], images)
  return images


def device_part(array: Array, device: Array, num_devices: int) -> Array:
  """The rows of a global batch that belong to one device."""
  size = array.shape[0] // num_devices
  return jax.lax.dynamic_slice_in_dim(array, device * size, size)
