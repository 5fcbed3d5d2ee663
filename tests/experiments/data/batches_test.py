"""Tests of the batches: order, crops and flips, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import augmentation
from experiments.data import batches as batches_lib
from experiments.parallel import mapping, placement

KEY = jax.random.key(3)


def epoch_indices(key, epoch, num=22, batch=8):
  """The batches of one epoch, including the smaller last one."""
  sizes = [batch] * (num // batch) + ([num % batch] if num % batch else [])
  order = batches_lib.permutation(key, epoch, num)
  return [
      np.asarray(batches_lib.batch_indices(order, i, batch, size))
      for i, size in enumerate(sizes)]


@pytest.mark.parametrize('num, batch', [(22, 8), (24, 8), (5, 8), (9, 8)])
def test_every_epoch_visits_each_example_once(num, batch):
  for epoch in range(3):
    batches = epoch_indices(KEY, epoch, num, batch)
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    assert sorted(np.concatenate(batches)) == list(range(num))


def test_order_is_that_of_seed_and_epoch():
  first, again = (np.concatenate(epoch_indices(KEY, 0)) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  other_epoch = np.concatenate(epoch_indices(KEY, 1))
  other_seed = np.concatenate(epoch_indices(jax.random.key(4), 0))
  assert (first != other_epoch).any() and (first != other_seed).any()


def test_order_and_crops_do_not_depend_on_devices():
  images = jnp.arange(16 * 4 * 4 * 1, dtype=jnp.float32).reshape(16, 4, 4, 1)
  policy = augmentation.Augmentation(2, 'reflect', True)

  def batch():
    indices = batches_lib.batch_indices(
        batches_lib.permutation(KEY, 0, 16), 1, 8, 8)
    return augmentation.augment(KEY, images[indices], policy)

  whole = batch()
  for n in (2, 8):
    parts = jax.pmap(
        lambda d: placement.own_rows(batch(), d), axis_name=mapping.AXIS,
        devices=jax.devices()[:n])(np.arange(n)[:, None])
    np.testing.assert_array_equal(parts.reshape(whole.shape), whole)


def numpy_augment(key, images, pad, mode, flip):
  """Pads, crops and mirrors each image with np.pad and slices."""
  rows, columns, flips = jax.random.split(key, 3)
  n, height, width, _ = images.shape
  rows = np.asarray(jax.random.randint(rows, (n,), 0, 2 * pad + 1))
  columns = np.asarray(jax.random.randint(columns, (n,), 0, 2 * pad + 1))
  flips = np.asarray(jax.random.bernoulli(flips, 0.5, (n, 1, 1, 1))).ravel()
  result = []
  for image, row, column, mirrored in zip(
      images, rows, columns, flips, strict=True):
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode=mode)
    cut = padded[row:row + height, column:column + width]
    result.append(cut[:, ::-1] if flip and mirrored else cut)
  return np.stack(result), (rows, columns, flips)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
@pytest.mark.parametrize('pad, mode, flip', [
    (4, 'reflect', True), (2, 'constant', True), (2, 'reflect', False),
    (0, 'reflect', True), (0, 'reflect', False)])
def test_augment_against_numpy(pad, mode, flip, dtype):
  images = np.random.default_rng(0).integers(
      1, 256, (64, 8, 6, 3)).astype(dtype)
  wanted, (rows, columns, flips) = numpy_augment(KEY, images, pad, mode, flip)
  got = augmentation.augment(
      KEY, jnp.asarray(images), augmentation.Augmentation(pad, mode, flip))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, wanted)
  # Every offset occurs, independently on both axes, and both flips.
  assert set(rows) == set(columns) == set(range(2 * pad + 1))
  assert 10 < flips.sum() < 54
  if pad:
    assert (rows != columns).any()
    # Black margins only with constant padding; the images contain no zero.
    assert (np.asarray(got) == 0).any() == (mode == 'constant')
  if not pad and not flip:
    np.testing.assert_array_equal(got, images)


def test_another_step_crops_otherwise():
  images = jnp.asarray(np.random.default_rng(0).random((8, 8, 8, 1)))
  policy = augmentation.Augmentation(2, 'reflect', False)
  one, other, again = (
      augmentation.augment(jax.random.fold_in(KEY, step), images, policy)
      for step in (1, 2, 1))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


def test_to_pixels():
  levels = np.arange(256, dtype=np.uint8)
  pixels = batches_lib.to_pixels(jnp.asarray(levels), jnp.float32)
  assert pixels.dtype == jnp.float32
  np.testing.assert_allclose(
      pixels, np.arange(256) / 255, rtol=1.2e-7, atol=0)
  floats = jnp.asarray([0.0, 0.3, 1.0], jnp.float32)
  np.testing.assert_array_equal(
      batches_lib.to_pixels(floats, jnp.float32), floats)


def test_to_pixels_in_float64(x64):
  levels = jnp.arange(256, dtype=jnp.uint8)
  pixels = batches_lib.to_pixels(levels, jnp.dtype('float64'))
  assert pixels.dtype == jnp.float64
  np.testing.assert_allclose(pixels, np.arange(256) / 255, rtol=3e-16)


def numpy_rotated(image, angle):
  """Nearest-neighbor rotation, black outside."""
  height, width, _ = image.shape
  turn = np.deg2rad(angle)
  center = np.array([(height - 1) / 2, (width - 1) / 2])
  result = np.zeros_like(image)
  for i in range(height):
    for j in range(width):
      y, x = np.array([i, j]) - center
      row, column = np.array([
          np.cos(turn) * y + np.sin(turn) * x,
          np.cos(turn) * x - np.sin(turn) * y]) + center
      row, column = int(np.round(row)), int(np.round(column))
      if 0 <= row < height and 0 <= column < width:
        result[i, j] = image[row, column]
  return result


def test_rotation_against_numpy_and_quarter_turns():
  images = np.random.default_rng(0).integers(1, 256, (5, 8, 8, 2), np.uint8)
  angles = np.array([0.0, 90.0, -90.0, 14.3, -7.9], np.float32)
  got = np.asarray(augmentation.rotate(jnp.asarray(images), angles))
  assert got.dtype == np.uint8
  for image, angle, turned in zip(images, angles, got, strict=True):
    np.testing.assert_array_equal(turned, numpy_rotated(image, angle))
  np.testing.assert_array_equal(got[0], images[0])
  # Counterclockwise, like np.rot90.
  np.testing.assert_array_equal(got[1], np.rot90(images[1]))
  np.testing.assert_array_equal(got[2], np.rot90(images[2], -1))
  assert (got[3] == 0).any()


def test_rotations_fill_their_range():
  policy = augmentation.Augmentation(0, 'constant', False, rotation=45.0)
  bar = np.zeros((400, 15, 15, 1), np.uint8)
  bar[:, :, 7] = 255
  turned = np.asarray(augmentation.augment(KEY, jnp.asarray(bar), policy))
  # The bar crosses the line three above the center at tan(angle) * 3.
  places = turned[:, 4, :, 0].argmax(axis=1) - 7
  assert set(places) == {-3, -2, -1, 0, 1, 2, 3}


def test_cutout_is_one_black_square_cut_off_at_the_border():
  policy = augmentation.Augmentation(0, 'constant', False, cutout=4)
  images = jnp.full((300, 9, 7, 3), 5, jnp.uint8)
  black = np.asarray(augmentation.augment(KEY, images, policy)) == 0
  assert (black == black[..., :1]).all()
  rows, columns = black[..., 0].any(axis=2), black[..., 0].any(axis=1)
  # The square is the outer product of its rows and columns.
  np.testing.assert_array_equal(
      black[..., 0], rows[:, :, None] & columns[:, None, :])
  assert set(rows.sum(axis=1)) == set(columns.sum(axis=1)) == {2, 3, 4}
  assert rows.any(axis=0).all() and columns.any(axis=0).all()


def test_mixup_is_one_share_of_images_and_labels_alike():
  images = jnp.eye(8, dtype=jnp.float32).reshape(8, 2, 4, 1)
  labels = jnp.arange(8)
  mixed, targets = augmentation.mix(KEY, images, labels, 8, 0.7)
  # Image i is the one-hot vector of label i, so both must be equal.
  np.testing.assert_allclose(mixed.reshape(8, 8), targets, rtol=1e-6)
  np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
  share = np.asarray(targets)[np.arange(8), np.arange(8)]
  others = share[share < 1]
  assert len(set(np.round(others, 6))) == 1 and 0 < others[0] < 1
  shares = [
      float(augmentation.mix(
          jax.random.fold_in(KEY, i), images, labels, 8, 0.2)[1].max())
      for i in range(40)]
  # For Beta(0.2, 0.2) most shares are near 0 or 1.
  assert np.mean(np.asarray(shares) > 0.9) > 0.5


@pytest.mark.parametrize('size, fraction, count', [
    (8, 0.5, 4), (256, 0.7, 179), (10, 0.0, 0), (6, 0.99, 6)])
def test_extra_rows_are_spread_over_devices(size, fraction, count):
  rows = batches_lib.extra_rows(size, fraction)
  assert rows.shape == (size,) and rows.sum() == count
  parts = rows[:size // 2].sum(), rows[size // 2:].sum()
  assert abs(parts[0] - parts[1]) <= 1


def test_mixed_batches_visit_each_labeled_example_once_a_pass():
  is_extra = batches_lib.extra_rows(8, 0.5)
  seen, drawn = [], []
  for step in range(6):  # three batches of four are a pass over eleven
    order = batches_lib.permutation(
        KEY, step // batches_lib.batches_of_pass(11, 4), 11)
    own, extra = batches_lib.mixed_batch_indices(KEY, order, 1000, step, 4, 4)
    seen.append(np.asarray(own))
    drawn.append(np.asarray(extra))
  first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
  for taken in (first, second):
    assert sorted(taken[:11]) == list(range(11)) and taken[11] == taken[0]
  assert (first != second).any()
  assert len(set(np.concatenate(drawn))) > 20  # of 24 out of 1,000
  rows = batches_lib.interleave(
      is_extra, jnp.asarray([1, 2, 3, 4]), jnp.asarray([-1, -2, -3, -4]))
  np.testing.assert_array_equal(rows < 0, is_extra)
  np.testing.assert_array_equal(rows[~is_extra], [1, 2, 3, 4])
  np.testing.assert_array_equal(rows[is_extra], [-1, -2, -3, -4])
