"""Random augmentation of training images on the device.

  >>> import jax, jax.numpy as jnp
  >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
  >>> changed = augment(
  ...     jax.random.key(0), images, Augmentation(4, 'constant', flip=True))
  >>> changed.shape, str(changed.dtype)
  ((2, 8, 8, 3), 'uint8')
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.types import Array


class Augmentation(NamedTuple):
  """Random transformations of training images, in this order.

  Attributes:
    pad: pixels added on every side before a crop of the old size; 0: no crop.
    pad_mode: 'reflect' or 'constant' (zeros).
    flip: whether to mirror half of the images left to right.
    rotation: maximum angle in degrees, in both directions; 0: none.
    cutout: side in pixels of a black square at a random center, clipped at the
      border (DeVries and Taylor 2017); 0: none.
    mixup: alpha of Beta(alpha, alpha), the distribution of each batch's mixing
      weight (Zhang et al. 2018); 0: none.
  """

  pad: int
  pad_mode: str
  flip: bool
  rotation: float = 0.0
  cutout: int = 0
  mixup: float = 0.0


def _crop(
    row_key: Array, column_key: Array, images: Array, pad: int, mode: str
) -> Array:
  size, height, width, channels = images.shape
  margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = jnp.pad(images, margins, mode=mode)
  rows = jax.random.randint(row_key, (size,), 0, 2 * pad + 1)
  columns = jax.random.randint(column_key, (size,), 0, 2 * pad + 1)
  return jax.vmap(
      lambda image, row, column: jax.lax.dynamic_slice(
          image, (row, column, 0), (height, width, channels))
  )(padded, rows, columns)


def rotate(images: Array, angles: Array) -> Array:
  """Rotates each image about its center; pixels from outside are black.

  Args:
    images: [B, H, W, C] of any dtype.
    angles: [B], degrees, counterclockwise.

  Returns:
    Images like `images`, with nearest-neighbor interpolation.
  """
  _, height, width, _ = images.shape
  rows, columns = jnp.meshgrid(
      jnp.arange(height) - (height - 1) / 2,
      jnp.arange(width) - (width - 1) / 2, indexing='ij')

  def turn(image: Array, angle: Array) -> Array:
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    row = jnp.round(
        cos * rows + sin * columns + (height - 1) / 2).astype(jnp.int32)
    column = jnp.round(
        cos * columns - sin * rows + (width - 1) / 2).astype(jnp.int32)
    is_inside = (
        (row >= 0) & (row < height) & (column >= 0) & (column < width))
    found = image[
        jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(is_inside[..., None], found, jnp.zeros_like(found))

  return jax.vmap(turn)(images, angles)


def _cut_out(key: Array, images: Array, side: int) -> Array:
  size, height, width, _ = images.shape
  row_key, column_key = jax.random.split(key)
  top = jax.random.randint(row_key, (size, 1), 0, height) - side // 2
  left = jax.random.randint(column_key, (size, 1), 0, width) - side // 2
  rows, columns = jnp.arange(height), jnp.arange(width)
  in_rows = (rows >= top) & (rows < top + side)
  in_columns = (columns >= left) & (columns < left + side)
  is_cut = in_rows[:, :, None, None] & in_columns[:, None, :, None]
  return jnp.where(is_cut, jnp.zeros_like(images), images)


def augment(key: Array, images: Array, augmentation: Augmentation) -> Array:
  """Applies all random transformations except mixup.

  Args:
    key: a PRNG key.
    images: [B, H, W, C] of any dtype.
    augmentation: the transformations.

  Returns:
    Images like `images`.
  """
  size = images.shape[0]
  row_key, column_key, flip_key = jax.random.split(key, 3)
  turn_key, cut_key = (jax.random.fold_in(key, number) for number in (3, 4))
  if augmentation.pad:
    images = _crop(
        row_key, column_key, images, augmentation.pad, augmentation.pad_mode)
  if augmentation.flip:
    flips = jax.random.bernoulli(flip_key, 0.5, (size, 1, 1, 1))
    images = jnp.where(flips, images[:, :, ::-1], images)
  if augmentation.rotation:
    angles = jax.random.uniform(turn_key, (size,), minval=-1.0, maxval=1.0)
    images = rotate(images, augmentation.rotation * angles)
  if augmentation.cutout:
    images = _cut_out(cut_key, images, augmentation.cutout)
  return images


def mix(
    key: Array, images: Array, labels: Array, num_classes: int, alpha: float
) -> tuple[Array, Array]:
  """Mixup: lambda x + (1 - lambda) x_pi for a random order pi; same for labels.

  Args:
    key: a PRNG key.
    images: [B, H, W, C] in [0, 1].
    labels: integers [B].
    num_classes: C.
    alpha: lambda ~ Beta(alpha, alpha), one per batch; > 0.

  Returns:
    Mixed images, and label probabilities [B, C].
  """
  share_key, order_key = jax.random.split(key)
  share = jax.random.beta(share_key, alpha, alpha).astype(images.dtype)
  order = jax.random.permutation(order_key, images.shape[0])
  targets = jax.nn.one_hot(labels, num_classes, dtype=images.dtype)
  return (
      share * images + (1 - share) * images[order],
      share * targets + (1 - share) * targets[order])
