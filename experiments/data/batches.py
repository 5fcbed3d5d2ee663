"""Batches made on the device: which images, from (seed, step) alone.

The images lie on the device as they were read (uint8 where they were). Step k
of a run takes, inside the compiled step, its slice of the epoch's permutation
and draws its own crops and flips (`augmentation`). Nothing but the key and k
enters, so a run that starts again in the middle sees what it would have seen;
and the draw is for the global batch, so it does not depend on the number of
devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.types import Array


def to_pixels(images: Array, dtype: jnp.dtype) -> Array:
  """[0, 1] from uint8 (divided by 255) or from floats (as they are)."""
  if images.dtype == jnp.uint8:
    return images.astype(dtype) / 255
  return images.astype(dtype)


def permutation(key: Array, number: Array, num_examples: int) -> Array:
  """The order [n] of the examples in an epoch, or in another pass over them.

  Sorting the 50,000 images of CIFAR takes longer than a short step: do it once
  an epoch.

  Args:
    key: the run's key for the order.
    number: of the epoch, from 0.
    num_examples: n.

  Returns:
    A permutation of 0..n - 1.
  """
  return jax.random.permutation(jax.random.fold_in(key, number), num_examples)


def batch_indices(
    order: Array, position: Array, batch_size: int, size: int) -> Array:
  """Which examples a batch takes: every epoch is a permutation, cut up.

  Args:
    order: the epoch's permutation [n].
    position: of the batch in the epoch, from 0.
    batch_size: of a full batch; the last may be smaller.
    size: of this batch.

  Returns:
    Indices [size].
  """
  return jax.lax.dynamic_slice(order, (position * batch_size,), (size,))


def extra_rows(size: int, fraction: float) -> np.ndarray:
  """Which rows of a batch hold extra images: bools [size], evenly spread.

  Evenly, so that every device has its share.

  Args:
    size: of the batch.
    fraction: of extra images, in [0, 1]; their number is rounded.

  Returns:
    Bools with round(fraction * size) times True.
  """
  count = round(fraction * size)
  steps = np.arange(size + 1) * count // size
  return np.diff(steps).astype(bool)


def batches_of_pass(num_examples: int, num_labelled: int) -> int:
  """How many mixed batches a pass over the labelled examples takes."""
  return -(-num_examples // num_labelled)


def mixed_batch_indices(
    key: Array, order: Array, num_extra: int, step: Array,
    num_labelled: int, num_drawn: int) -> tuple[Array, Array]:
  """Which labelled and which extra examples step `step` of the run takes.

  Labelled examples come in the order of one permutation after another; a batch
  that a permutation cannot fill goes on from its beginning. Extra examples are
  drawn with replacement, as in the code of robust self-training (Carmon et al.
  2019).

  Args:
    key: the run's key for the order.
    order: the permutation [n] of the labelled examples in the pass that the
      step belongs to, number `step // batches_of_pass(n, num_labelled)`.
    num_extra: m.
    step: counted from 0 over the whole run.
    num_labelled: of the batch, at least 1.
    num_drawn: the extra examples of the batch.

  Returns:
    Indices [num_labelled] below n and [num_drawn] below m.
  """
  num_examples = order.shape[0]
  per_pass = batches_of_pass(num_examples, num_labelled)
  taken = (step % per_pass * num_labelled + jnp.arange(num_labelled))
  drawn = jax.random.randint(
      jax.random.fold_in(jax.random.fold_in(key, step), 1), (num_drawn,), 0,
      num_extra)
  return order[taken % num_examples], drawn


def interleave(is_extra: np.ndarray, own: Array, extra: Array) -> Array:
  """Rows of `extra` where `is_extra`, rows of `own` elsewhere, in order."""
  places = np.argsort(np.concatenate(
      [np.flatnonzero(~is_extra), np.flatnonzero(is_extra)]))
  return jnp.concatenate([own, extra])[places]


def device_part(array: Array, device: Array, num_devices: int) -> Array:
  """The rows of a global batch that belong to one device."""
  size = array.shape[0] // num_devices
  return jax.lax.dynamic_slice_in_dim(array, device * size, size)
