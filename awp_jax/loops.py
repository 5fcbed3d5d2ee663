"""The one place that decides how a short fixed loop is compiled.

XLA for the CPU runs the gradient of a convolution several times slower inside
a `while` than outside of it (jax issue 12868), so there the loop is written
out. On every other platform it stays a loop, which compiles once per body.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

Carry = TypeVar('Carry')


def unrolls() -> bool:
  """Whether loops are written out: where the default backend is the CPU."""
  device = getattr(jax.config, 'jax_default_device', None)
  platform = getattr(device, 'platform', device) or jax.default_backend()
  return platform == 'cpu'


def repeat(
    num_steps: int, body: Callable[[Carry], Carry], init: Carry) -> Carry:
  """Applies `body` to `init` `num_steps` times.

  Args:
    num_steps: how often, at least 0; known when the loop is traced.
    body: maps the carry to a carry of the same shapes and dtypes.
    init: the first carry.

  Returns:
    `body(body(...body(init)))`.
  """
  if unrolls():
    # Traced once: XLA inlines the calls of one and the same function.
    step, carry = jax.jit(body), init
    for _ in range(num_steps):
      carry = step(carry)
    return carry
  return jax.lax.fori_loop(0, num_steps, lambda _, carry: body(carry), init)
