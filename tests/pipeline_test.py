"""Tests of the batches: order, crops and flips, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import pipeline

KEY = jax.random.key(3)


def epoch_indices(key, epoch, num=22, batch=8):
  """The batches of one epoch, the smaller last one included."""
  sizes = [batch] * (num // batch) + ([num % batch] if num % batch else [])
  return [
      np.asarray(pipeline.batch_indices(
          key, num, batch, epoch * len(sizes) + i, len(sizes), size))
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
  augmentation = pipeline.Augmentation(2, 'reflect', True)

  def batches(device, num_devices):
    indices = pipeline.batch_indices(KEY, 16, 8, 1, 2, 8)
    batch = pipeline.augment(KEY, images[indices], augmentation)
    return pipeline.device_part(batch, device, num_devices)

  whole = batches(0, 1)
  for n in (2, 8):
    parts = jax.pmap(lambda d, n=n: batches(d, n))(np.arange(n))
    np.testing.assert_array_equal(parts.reshape(whole.shape), whole)


def test_device_parts_make_up_the_batch():
  array = np.arange(24).reshape(12, 2)
  parts = [pipeline.device_part(array, i, 3) for i in range(3)]
  assert [len(p) for p in parts] == [4, 4, 4]
  np.testing.assert_array_equal(np.concatenate(parts), array)


def numpy_augment(key, images, pad, mode, flip):
  """Each image padded, cut and mirrored by itself, with np.pad and slices."""
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
  got = pipeline.augment(
      KEY, jnp.asarray(images), pipeline.Augmentation(pad, mode, flip))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, wanted)
  # Every offset is drawn, the two axes apart, and both sides.
  assert set(rows) == set(columns) == set(range(2 * pad + 1))
  assert 10 < flips.sum() < 54
  if pad:
    assert (rows != columns).any()
    # Black margins where they were asked for; images here hold no zero.
    assert (np.asarray(got) == 0).any() == (mode == 'constant')
  if not pad and not flip:
    np.testing.assert_array_equal(got, images)


def test_another_step_crops_otherwise():
  images = jnp.asarray(np.random.default_rng(0).random((8, 8, 8, 1)))
  augmentation = pipeline.Augmentation(2, 'reflect', False)
  one, other, again = (
      pipeline.augment(jax.random.fold_in(KEY, step), images, augmentation)
      for step in (1, 2, 1))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


def test_to_pixels():
  levels = np.arange(256, dtype=np.uint8)
  pixels = pipeline.to_pixels(jnp.asarray(levels), jnp.float32)
  assert pixels.dtype == jnp.float32
  np.testing.assert_allclose(
      pixels, np.arange(256) / 255, rtol=1.2e-7, atol=0)
  floats = jnp.asarray([0.0, 0.3, 1.0], jnp.float32)
  np.testing.assert_array_equal(
      pipeline.to_pixels(floats, jnp.float32), floats)


def test_to_pixels_in_float64(x64):
  levels = jnp.arange(256, dtype=jnp.uint8)
  pixels = pipeline.to_pixels(levels, jnp.dtype('float64'))
  assert pixels.dtype == jnp.float64
  np.testing.assert_allclose(pixels, np.arange(256) / 255, rtol=3e-16)
