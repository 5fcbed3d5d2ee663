"""Maps a per-device function over the devices of a run.

The function sees its own rows of some arguments and the whole of the others,
and reduces its results over the axis `AXIS`:

  def step(state, images):        # images [B / D, ...] on each of D devices
    return jax.lax.pmean(..., AXIS)

  mapped = over_devices(step, rows=(1,))
  state = mapped(placement.replicate(state), placement.split(images))

One process uses `jax.pmap`. Its outputs are on the devices of one process only,
so several processes use `jax.jit(jax.shard_map(...))` over all devices, which
leaves replicated state in place. Both compile to the same program per device.
"""

from collections.abc import Callable, Sequence
import inspect
from typing import Any

import jax
import numpy as np

import awp_jax

#: Name of the mapped device axis.
AXIS = 'batch'


def mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """The mesh of the given devices, by default all, along `AXIS`."""
  return jax.sharding.Mesh(
      np.array(jax.devices() if devices is None else devices), (AXIS,))


def over_devices(
    fn: Callable[..., Any], *, rows: Sequence[int] = (),
    donate: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None) -> Any:
  """Maps a function over all devices of all processes, and compiles it.

  Args:
    fn: a function with positional arguments only, the same on every device. Its
      results must be equal on all devices, as after `jax.lax.pmean`.
    rows: the positions of arguments that are split over the devices, from
      `placement.split`, at least one. The others are replicated.
    donate: the positions of arguments whose buffers may be reused.
    devices: compile for these devices, which need not exist, over a mesh. By
      default all devices of all processes.

  Returns:
    A function of the arguments, with `lower` as in `jax.jit`. Its results are
    on all devices and not stacked.
  """
  count = len(inspect.signature(fn).parameters)
  fn = awp_jax.cpu_convolutions(fn)
  if devices is None and jax.process_count() == 1:
    return jax.pmap(
        fn, axis_name=AXIS, out_axes=None, donate_argnums=tuple(donate),
        in_axes=tuple(0 if i in rows else None for i in range(count)))
  split, whole = jax.sharding.PartitionSpec(AXIS), jax.sharding.PartitionSpec()
  over = mesh(devices)
  # As under pmap, the function reduces by itself: nothing is checked.
  mapped = jax.shard_map(
      fn, mesh=over, out_specs=whole, check_vma=False,
      in_specs=tuple(split if i in rows else whole for i in range(count)))
  return jax.jit(mapped, donate_argnums=tuple(donate))
