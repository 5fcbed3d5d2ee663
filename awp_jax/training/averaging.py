"""Moving averages of weights and batch statistics.

Averaged weights are often more robust than the final weights (Izmailov et al.,
UAI 2018; Gowal et al. 2020). With decay d,

  a <- d a + (1 - d) w        after every step, from a = w at the start.

With a large decay, early averages would stay close to the random start. The
decay therefore grows with the step count t: d_t = min(d, (1 + t) / (10 + t)).
Batch statistics are averaged too, since those of w do not match a.

  >>> import jax.numpy as jnp
  >>> average = Average({'w': jnp.zeros(2)}, {})
  >>> average = update_average(average, {'w': jnp.ones(2)}, {}, decay=0.75)
  >>> print(average.params['w'])
  [0.25 0.25]
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.core import checks
from awp_jax.types import Array, Params, Scalar


class Average(NamedTuple):
  """The averaged network.

  Attributes:
    params: a, a pytree like the parameters.
    batch_stats: the averaged running statistics; {} if there are none.
  """

  params: Params
  batch_stats: Any


def ema_decay(decay: float, step: Scalar) -> Array:
  """The decay of step t, min(decay, (1 + t) / (10 + t)).

  Args:
    decay: d in [0, 1), the limit for large t.
    step: t >= 0, the number of previously averaged steps.

  Returns:
    A float32 scalar.

  Raises:
    ValueError: if the decay is not in [0, 1).
  """
  checks.not_negative('decay', decay)
  if decay >= 1:
    raise ValueError(f'decay must be below 1, got {decay!r}.')
  steps = jnp.asarray(step, jnp.float32)
  return jnp.minimum(jnp.float32(decay), (1 + steps) / (10 + steps))


def update_average(
    average: Average, params: Params, batch_stats: Any, decay: Scalar
) -> Average:
  """a <- decay a + (1 - decay) w on every leaf.

  Statistics that are counters or flags are those of w.

  Args:
    average: a.
    params: w.
    batch_stats: the running statistics of w.
    decay: in [0, 1]; see `ema_decay`.

  Returns:
    The next average, of the same dtypes.
  """

  def mix(old: Array, new: Array) -> Array:
    if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
      return new
    # In this form a = w is an exact fixed point.
    wide = jnp.promote_types(old.dtype, jnp.float32)
    start, end = jnp.asarray(old, wide), jnp.asarray(new, wide)
    share = jnp.asarray(1 - decay, wide)
    return (start + share * (end - start)).astype(old.dtype)

  return Average(
      jax.tree.map(mix, average.params, params),
      jax.tree.map(mix, average.batch_stats, batch_stats))
