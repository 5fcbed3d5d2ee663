"""Selects the images of a batch on the device, from (seed, step) alone.

The images are on the device with the dtype they were read in. Inside the
compiled step, step k takes its slice of the epoch's permutation and draws its
crops and flips (`augmentation`). Both depend only on the key and k, so a
resumed run continues with the same batches. They are drawn for the global
batch, so they do not depend on the number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.types import Array


def to_pixels(images: Array, dtype: jnp.dtype) -> Array:
  """Pixels in [0, 1]: uint8 is divided by 255, floats are unchanged."""
  if images.dtype == jnp.uint8:
    return images.astype(dtype) / 255
  return images.astype(dtype)


def permutation(key: Array, number: Array, num_examples: int) -> Array:
  """The order [n] of the examples in an epoch, or in another pass over them.

  Call it once per epoch: permuting the 50,000 images of CIFAR takes longer than
  a short step.

  Args:
    key: the run's key for the order.
    number: number of the epoch, from 0.
    num_examples: n.

  Returns:
    A permutation of 0..n - 1.
  """
  return jax.random.permutation(jax.random.fold_in(key, number), num_examples)


def batch_indices(
    order: Array, position: Array, batch_size: int, size: int) -> Array:
  """Indices of a batch, a slice of the epoch's permutation.

  Args:
    order: the epoch's permutation [n].
    position: position of the batch in the epoch, from 0.
    batch_size: size of a full batch; the last may be smaller.
    size: size of this batch.

  Returns:
    Indices [size].
  """
  return jax.lax.dynamic_slice(order, (position * batch_size,), (size,))


def extra_rows(size: int, fraction: float) -> np.ndarray:
  """Mask of the rows of a batch with extra images.

  The rows are evenly spaced, so every device has the same share.

  Args:
    size: size of the batch.
    fraction: share of extra images, in [0, 1]; their number is rounded.

  Returns:
    Bools [size], round(fraction * size) of them True.
  """
  count = round(fraction * size)
  steps = np.arange(size + 1) * count // size
  return np.diff(steps).astype(bool)


def batches_of_pass(num_examples: int, num_labeled: int) -> int:
  """Number of mixed batches in a pass over the labeled examples."""
  return -(-num_examples // num_labeled)


def mixed_batch_indices(
    key: Array, order: Array, num_extra: int, step: Array,
    num_labeled: int, num_drawn: int) -> tuple[Array, Array]:
  """Indices of the labeled and the extra examples of a step.

  Labeled examples follow one permutation per pass; the last batch of a pass is
  filled from the start of its permutation. Extra examples are drawn with
  replacement, as in the code of robust self-training (Carmon et al. 2019).

  Args:
    key: the run's key for the order.
    order: the permutation [n] of the labeled examples in the pass of the step,
      number `step // batches_of_pass(n, num_labeled)`.
    num_extra: m.
    step: counted from 0 over the whole run.
    num_labeled: labeled examples per batch, at least 1.
    num_drawn: extra examples per batch.

  Returns:
    Indices [num_labeled] below n and [num_drawn] below m.
  """
  num_examples = order.shape[0]
  per_pass = batches_of_pass(num_examples, num_labeled)
  taken = (step % per_pass * num_labeled + jnp.arange(num_labeled))
  drawn = jax.random.randint(
      jax.random.fold_in(jax.random.fold_in(key, step), 1), (num_drawn,), 0,
      num_extra)
  return order[taken % num_examples], drawn


def interleave(is_extra: np.ndarray, own: Array, extra: Array) -> Array:
  """Takes rows of `extra` where `is_extra`, else rows of `own`, in order."""
  places = np.argsort(np.concatenate(
      [np.flatnonzero(~is_extra), np.flatnonzero(is_extra)]))
  return jnp.concatenate([own, extra])[places]
