"""Random augmentation of training images on the device.

`draw` makes the random numbers of a batch, and `apply` uses those of any of its
rows: devices draw for the whole batch, but transform only their own images.

  >>> import jax, jax.numpy as jnp
  >>> images = jnp.ones((2, 8, 8, 3), jnp.uint8)
  >>> changed = augment(
  ...     jax.random.key(0), images, Augmentation(4, 'constant', flip=True))
  >>> changed.shape, str(changed.dtype)
  ((2, 8, 8, 3), 'uint8')
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.types import Array
from experiments.util import named
from experiments.util.errors import UserError


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
    function: 'package.module:name' of a function (PRNG key, image) -> image of
      the same shape and dtype, with options in parentheses, applied after the
      cutout; '': none.
  """

  pad: int
  pad_mode: str
  flip: bool
  rotation: float = 0.0
  cutout: int = 0
  mixup: float = 0.0
  function: str = ''


class Draws(NamedTuple):
  """The random numbers of a batch of B images; None where they are not needed.

  Attributes:
    rows: offsets of the crops from the top of the padded images, [B].
    columns: the same from the left.
    flips: whether to mirror each image, [B, 1, 1, 1].
    angles: degrees, [B].
    tops: first row of each black square, [B, 1]; may be negative.
    lefts: the same for columns.
    keys: a PRNG key per image for the function, [B].
  """

  rows: Any = None
  columns: Any = None
  flips: Any = None
  angles: Any = None
  tops: Any = None
  lefts: Any = None
  keys: Any = None


def draw(
    key: Array, size: int, image_shape: tuple[int, ...],
    augmentation: Augmentation) -> Draws:
  """Draws the random numbers of a batch.

  Args:
    key: a PRNG key.
    size: number of images B.
    image_shape: (H, W, C).
    augmentation: the transformations.

  Returns:
    The numbers that its transformations except mixup need.
  """
  draws: dict[str, Array] = {}
  row_key, column_key, flip_key = jax.random.split(key, 3)
  turn_key, cut_key = (jax.random.fold_in(key, number) for number in (3, 4))
  if augmentation.pad:
    offsets = 2 * augmentation.pad + 1
    draws['rows'] = jax.random.randint(row_key, (size,), 0, offsets)
    draws['columns'] = jax.random.randint(column_key, (size,), 0, offsets)
  if augmentation.flip:
    draws['flips'] = jax.random.bernoulli(flip_key, 0.5, (size, 1, 1, 1))
  if augmentation.rotation:
    draws['angles'] = augmentation.rotation * jax.random.uniform(
        turn_key, (size,), minval=-1.0, maxval=1.0)
  if augmentation.cutout:
    for name, cut, length in zip(
        ('tops', 'lefts'), jax.random.split(cut_key), image_shape,
        strict=False):
      draws[name] = jax.random.randint(
          cut, (size, 1), 0, length) - augmentation.cutout // 2
  if augmentation.function:
    draws['keys'] = jax.random.split(jax.random.fold_in(key, 5), size)
  return Draws(**draws)


def _crop(draws: Draws, images: Array, pad: int, mode: str) -> Array:
  _, height, width, channels = images.shape
  margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = jnp.pad(images, margins, mode=mode)
  return jax.vmap(
      lambda image, row, column: jax.lax.dynamic_slice(
          image, (row, column, 0), (height, width, channels))
  )(padded, draws.rows, draws.columns)


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


def _cut_out(draws: Draws, images: Array, side: int) -> Array:
  _, height, width, _ = images.shape
  rows, columns = jnp.arange(height), jnp.arange(width)
  in_rows = (rows >= draws.tops) & (rows < draws.tops + side)
  in_columns = (columns >= draws.lefts) & (columns < draws.lefts + side)
  is_cut = in_rows[:, :, None, None] & in_columns[:, None, :, None]
  return jnp.where(is_cut, jnp.zeros_like(images), images)


def check(function: str) -> Callable[..., Array] | None:
  """Imports the function of an augmentation; None for ''.

  Raises:
    UserError: if it cannot be imported, or is no function of (key, image).
  """
  if not function:
    return None
  name, options = named.parse_call(function, 'augmentation.function')
  return named.bound(
      'augmentation.function', name, options, lambda key, image: image)


def _transform(draws: Draws, images: Array, function: str) -> Array:
  transform = check(function)
  assert transform is not None

  def one(key: Array, image: Array) -> Array:
    changed = transform(key=key, image=image)
    if (jnp.shape(changed), jnp.result_type(changed)) != (
        image.shape, image.dtype):
      raise UserError(
          f'augmentation.function={function!r} must keep shape and dtype of '
          f'the image, {image.shape} {image.dtype}, got {jnp.shape(changed)} '
          f'{jnp.result_type(changed)}.')
    return changed

  return jax.vmap(one)(draws.keys, images)


def apply(draws: Draws, images: Array, augmentation: Augmentation) -> Array:
  """Applies all random transformations except mixup.

  Args:
    draws: those of these images, rows of the result of `draw`.
    images: [B, H, W, C] of any dtype.
    augmentation: the transformations.

  Returns:
    Images like `images`.
  """
  if augmentation.pad:
    images = _crop(draws, images, augmentation.pad, augmentation.pad_mode)
  if augmentation.flip:
    images = jnp.where(draws.flips, images[:, :, ::-1], images)
  if augmentation.rotation:
    images = rotate(images, draws.angles)
  if augmentation.cutout:
    images = _cut_out(draws, images, augmentation.cutout)
  if augmentation.function:
    images = _transform(draws, images, augmentation.function)
  return images


def augment(key: Array, images: Array, augmentation: Augmentation) -> Array:
  """Draws and applies all random transformations except mixup.

  Args:
    key: a PRNG key.
    images: [B, H, W, C] of any dtype.
    augmentation: the transformations.

  Returns:
    Images like `images`.
  """
  draws = draw(key, len(images), images.shape[1:], augmentation)
  return apply(draws, images, augmentation)


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
