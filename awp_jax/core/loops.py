"""The one place that decides how a short fixed loop is compiled.

XLA for the CPU runs the gradient of a convolution several times slower inside
a `while` than outside of it (jax issue 12868), so there the loop is written
out. On every other platform it stays a loop, which compiles once per body.

`repeat` and `mapped` are decided when a program is lowered, by the platform it
is lowered for (where the default device is an accelerator they are plain loops,
also in a program for its host's CPU):

  >>> import jax, jax.numpy as jnp
  >>> traced = jax.jit(lambda x: repeat(3, jnp.sin, x)).trace(jnp.ones(2))
  >>> for platform in 'cpu', 'tpu':
  ...   text = traced.lower(lowering_platforms=(platform,)).as_text()
  ...   print(platform, 'stablehlo.while' in text)
  cpu False
  tpu True

Loops that the host drives (`repeat_pieces`) follow the default device, or what
`platform` says.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from awp_jax.core import sharding

Carry = TypeVar('Carry')

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    'platform', default=None)


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
  """Within it, loops take the form for a platform.

  For programs that run on another platform than the default device's: on the
  CPU of a machine with an accelerator, say. Functions that were traced before
  keep the form they have. `repeat` and `mapped` become plain
  loops under any name but 'cpu'.

  Args:
    name: 'cpu', 'gpu', 'tpu', ...

  Yields:
    Nothing.
  """
  token = _PLATFORM.set(name)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


def unrolls() -> bool:
  """Whether the host drives loops: on the CPU, by context or default device."""
  device = getattr(jax.config, 'jax_default_device', None)
  default = getattr(device, 'platform', device) or jax.default_backend()
  return (_PLATFORM.get() or default) == 'cpu'


def _by_platform(
    unrolled: Callable[..., Any], looped: Callable[..., Any], *args: Any
) -> Any:
  """One of two forms of a loop, by the platform that it is lowered for."""
  if not unrolls():
    return looped(*args)
  return jax.lax.platform_dependent(*args, cpu=unrolled, default=looped)


def _types(carry: Any) -> list[Any]:
  """What a loop must keep: shapes, dtypes, axes that values vary over."""
  types = [leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
           for leaf in jax.tree.leaves(carry)]
  return [(t.shape, t.dtype, sharding.varying_axes(leaf))
          for t, leaf in zip(types, jax.tree.leaves(carry), strict=True)]


def repeat(
    num_steps: int, body: Callable[[Carry], Carry], init: Carry) -> Carry:
  """Applies `body` to `init` `num_steps` times.

  Args:
    num_steps: how often, at least 0; known when the loop is traced.
    body: maps the carry to a carry of the same shapes and dtypes, from its
      second application at the latest.
    init: the first carry.

  Returns:
    `body(body(...body(init)))`.
  """
  if num_steps < 2:
    return body(init) if num_steps else init
  # Traced once: XLA inlines the calls of one and the same function.
  step = jax.jit(body)
  if _types(jax.eval_shape(step, init)) != _types(init):
    # Say float32 statistics that float64 images widen: settled after one step.
    return repeat(num_steps - 1, step, step(init))

  def unrolled(carry: Carry) -> Carry:
    for _ in range(num_steps):
      carry = step(carry)
    return carry

  def looped(carry: Carry) -> Carry:
    return jax.lax.fori_loop(0, num_steps, lambda _, c: step(c), carry)

  return _by_platform(unrolled, looped, init)


def mapped(num_parts: int, fn: Callable[[Any], Any], parts: Any) -> Any:
  """Applies `fn` to one part after the other.

  Args:
    num_parts: how many parts.
    fn: maps a part to any pytree.
    parts: a pytree of arrays [num_parts, ...].

  Returns:
    What `fn` returns, each leaf with a leading axis [num_parts].
  """

  def unrolled(parts: Any) -> Any:
    outs = [fn(jax.tree.map(lambda leaf, i=i: leaf[i], parts))
            for i in range(num_parts)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

  return _by_platform(unrolled, lambda parts: jax.lax.map(fn, parts), parts)


def repeat_pieces(
    num_steps: int, body: Callable[[Carry], Carry], init: Carry) -> Carry:
  """`repeat` for a body made of compiled pieces, called by the host.

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
