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


def repeat_pieces(
    num_steps: int, body: Callable[[Carry], Carry], init: Carry) -> Carry:
  """`repeat` for a body made of compiled pieces, called inside `chunked`.

  On the CPU the pieces run one by one, so nothing is compiled here.

  Args:
    num_steps: how often.
    body: as for `repeat`.
    init: the first carry.

  Returns:
    As `repeat`.
  """
  if not unrolls():
    return repeat(num_steps, body, init)
  carry = init
  for _ in range(num_steps):
    carry = body(carry)
  return carry


#: Iterations of an open-ended loop that one compiled call makes off the CPU.
CHUNK = 10


def chunked(body: Callable[[Carry], Carry]) -> Callable[[Carry], Carry]:
  """Some iterations of a loop that the host drives and looks into.

  On the CPU one: `body` itself, called from Python, so its compiled pieces run
  outside of any `while` and are shared by every loop that uses them. On every
  other platform `CHUNK` of them in one compiled loop, since there each look of
  the host at the device costs more than an iteration.

  Args:
    body: one iteration, made of compiled pieces.

  Returns:
    A function of the carry.
  """
  if unrolls():
    return body
  return jax.jit(
      lambda carry: jax.lax.fori_loop(0, CHUNK, lambda _, c: body(c), carry))


def chunk_size() -> int:
  """How many iterations one call of a `chunked` loop makes."""
  return 1 if unrolls() else CHUNK
