"""Parts of a batch, processed in turn: gradient accumulation.

M parts on one device compute what M devices compute. Part m of device d of D
has the m-th of M equal blocks of the device's rows, draws its noise with index
d M + m, attacks its own inputs, and has its own batch and running statistics. A
model that averages its batch statistics over the devices averages them over the
m-th parts of all devices, never over parts. Gradients, metrics and the final
running statistics are averaged over parts and devices.

With M = 1 arrays are those of the device. With M > 1 each has a leading axis
[M]:

  >>> import jax.numpy as jnp
  >>> print(split(2, jnp.arange(6)))
  [[0 1 2]
   [3 4 5]]
  >>> print(each(2, lambda x, y: x - y, jnp.arange(2), jnp.ones(2)))
  [-1.  0.]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awp_jax.core import loops
from awp_jax.types import Array


def split(num_parts: int, tree: Any) -> Any:
  """[B, ...] -> [M, B / M, ...] on every leaf; names and M = 1: unchanged."""
  if num_parts == 1 or isinstance(tree, str):
    return tree
  return jax.tree.map(
      lambda leaf: jnp.reshape(leaf, (num_parts, -1, *leaf.shape[1:])), tree)


def copies(num_parts: int, tree: Any) -> Any:
  """[...] -> M copies [M, ...] of every leaf; unchanged if M = 1."""
  if num_parts == 1:
    return tree
  return jax.tree.map(
      lambda leaf: jnp.broadcast_to(leaf, (num_parts, *jnp.shape(leaf))), tree)


def mean(num_parts: int, tree: Any) -> Any:
  """The mean over the parts on every leaf [M, ...], in its dtype.

  Of counters and flags it is the last one.
  """
  if num_parts == 1:
    return tree
  return jax.tree.map(
      lambda leaf: jnp.mean(leaf, axis=0).astype(leaf.dtype)
      if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[-1], tree)


def device_mean(tree: Any, axis_name: str | None) -> Any:
  """The mean over the devices on every leaf; unchanged without an axis.

  Counters and flags, which are equal on all devices, keep their dtypes.
  """
  if axis_name is None:
    return tree

  def mean(leaf: Array) -> Array:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
      return jax.lax.pmean(leaf, axis_name)
    return jax.lax.pmax(jnp.asarray(leaf, int), axis_name).astype(leaf.dtype)

  return jax.tree.map(mean, tree)


def each(num_parts: int, fn: Callable[..., Any], *args: Any) -> Any:
  """`fn` of each part, one after the other.

  Args:
    num_parts: M.
    fn: maps the arguments of a part to any pytree of arrays.
    *args: pytrees of arrays; with a leading axis [M] if M > 1.

  Returns:
    The outputs of `fn`, with a leading axis [M] if M > 1.
  """
  if num_parts == 1:
    return fn(*args)
  part_fn = jax.jit(fn)  # traced once; XLA inlines its calls
  return loops.mapped(num_parts, lambda part: part_fn(*part), args)


def step_keys(
    num_parts: int, key: Array, step: int | Array, axis_name: str | None
) -> tuple[Array, Array]:
  """The keys of a step for attacks and for dropout.

  Args:
    num_parts: M.
    key: the run's PRNG key.
    step: the step count.
    axis_name: the axis of the devices, or None for one device.

  Returns:
    Two keys, or two arrays of keys [M] if M > 1.
  """
  key = jax.random.fold_in(key, step)
  device = None if axis_name is None else jax.lax.axis_index(axis_name)
  if num_parts == 1:
    key = key if device is None else jax.random.fold_in(key, device)
    attack_key, dropout_key = jax.random.split(key)
    return attack_key, dropout_key
  first = 0 if device is None else device * num_parts
  pairs = [jax.random.split(jax.random.fold_in(key, first + part))
           for part in range(num_parts)]
  return (jnp.stack([pair[0] for pair in pairs]),
          jnp.stack([pair[1] for pair in pairs]))


def round_keys(num_parts: int, key: Array, rounds: int) -> Array:
  """Keys [rounds], or [rounds, M] if M > 1, of the key or keys of a step."""
  if num_parts == 1:
    return jax.random.split(key, rounds)
  return jnp.stack(
      [jax.random.split(part_key, rounds) for part_key in key], axis=1)
