"""Short loops of fixed length, unrolled on the CPU.

On the CPU, XLA runs the gradient of a convolution several times slower inside a
`while` loop than outside (jax issue 12868), so these loops are unrolled. On
other platforms they stay loops, which compile their body once.

`repeat`, `summed` and `mapped` choose the form at lowering, by the target
platform. If the default device is an accelerator, they are always plain loops,
even in a program for the host's CPU:

  >>> import jax, jax.numpy as jnp
  >>> traced = jax.jit(lambda x: repeat(3, jnp.sin, x)).trace(jnp.ones(2))
  >>> for platform in 'cpu', 'tpu':
  ...   text = traced.lower(lowering_platforms=(platform,)).as_text()
  ...   print(platform, 'stablehlo.while' in text)
  cpu False
  tpu True

Host-driven loops (`repeat_pieces`) follow the default device, or the `platform`
context.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from awp_jax.core import sharding

Carry = TypeVar('Carry')

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    'platform', default=None)


_ROLLED: contextvars.ContextVar[bool] = contextvars.ContextVar(
    'rolled', default=False)


@contextlib.contextmanager
def rolled() -> Iterator[None]:
  """Context in which the loops of this module stay loops on the CPU too.

  It is for tracing programs all of whose convolutions suit loops
  (`convolution.suits_loops`). Functions that are already traced keep their
  form.

  Yields:
    Nothing.
  """
  token = _ROLLED.set(True)
  try:
    yield
  finally:
    _ROLLED.reset(token)


@contextlib.contextmanager
def platform(name: str) -> Iterator[None]:
  """Context that sets the platform loops are compiled for.

  Use it for programs on a platform other than the default device's, such as the
  CPU of a machine with an accelerator. Functions that are already traced keep
  their form. `repeat`, `summed` and `mapped` become plain loops under any name
  but 'cpu'.

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
  """Whether loops are unrolled: on the CPU, by context or default device."""
  device = getattr(jax.config, 'jax_default_device', None)
  default = getattr(device, 'platform', device) or jax.default_backend()
  return (_PLATFORM.get() or default) == 'cpu'


def _by_platform(
    unrolled: Callable[..., Any], looped: Callable[..., Any], *args: Any
) -> Any:
  """Selects the form of a loop by the platform it is lowered for."""
  if _ROLLED.get() or not unrolls():
    return looped(*args)
  return jax.lax.platform_dependent(*args, cpu=unrolled, default=looped)


def _types(carry: Any) -> list[Any]:
  """The loop-invariant types of a carry: shapes, dtypes, varying axes."""
  types = [leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
           for leaf in jax.tree.leaves(carry)]
  return [(t.shape, t.dtype, sharding.varying_axes(leaf))
          for t, leaf in zip(types, jax.tree.leaves(carry), strict=True)]


def changes_types(step: Callable[[Carry], Carry], carry: Carry) -> bool:
  """Whether a step changes shapes or dtypes, which no loop can."""
  return _types(jax.eval_shape(step, carry)) != _types(carry)


def repeat(
    num_steps: int, body: Callable[[Carry], Carry], init: Carry) -> Carry:
  """Applies `body` to `init` `num_steps` times.

  Args:
    num_steps: the number of iterations, a Python int >= 0.
    body: maps a carry to the next carry. Shapes and dtypes may change in the
      first iteration only.
    init: the initial carry.

  Returns:
    `body(body(...body(init)))`.
  """
  if num_steps < 2:
    return body(init) if num_steps else init
  # `jit` traces the body once; XLA inlines its calls.
  step = jax.jit(body)
  if changes_types(step, init):
    # E.g. float64 images widen float32 statistics in the first step.
    return repeat(num_steps - 1, step, step(init))

  def unrolled(carry: Carry) -> Carry:
    for _ in range(num_steps):
      carry = step(carry)
    return carry

  def looped(carry: Carry) -> Carry:
    return jax.lax.fori_loop(0, num_steps, lambda _, c: step(c), carry)

  return _by_platform(unrolled, looped, init)


def summed(
    num_parts: int, fn: Callable[[Any], tuple[Any, Any]], parts: Any
) -> tuple[Any, Any]:
  """Applies `fn` to the parts sequentially, adds some outputs, stacks others.

  Args:
    num_parts: the number of parts.
    fn: maps a part to a pair of pytrees, the one to add and the one to stack.
    parts: a pytree of arrays [num_parts, ...].

  Returns:
    The sum of the first outputs, and the stacked second ones, each leaf with a
    leading axis [num_parts].
  """

  def unrolled(parts: Any) -> tuple[Any, Any]:
    terms, outs = zip(*(
        fn(jax.tree.map(lambda leaf, i=i: leaf[i], parts))
        for i in range(num_parts)), strict=True)
    return (
        jax.tree.map(lambda *leaves: functools.reduce(jnp.add, leaves), *terms),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs))

  def looped(parts: Any) -> tuple[Any, Any]:
    first = jax.tree.map(lambda leaf: leaf[0], parts)

    def body(total: Any, part: Any) -> tuple[Any, Any]:
      terms, out = fn(part)
      return jax.tree.map(jnp.add, total, terms), out

    return jax.lax.scan(
        body, sharding.zeros(jax.eval_shape(fn, first)[0]), parts)

  return _by_platform(unrolled, looped, parts)


def mapped(num_parts: int, fn: Callable[[Any], Any], parts: Any) -> Any:
  """Applies `fn` to the parts sequentially, as `jax.lax.map` does.

  Args:
    num_parts: the number of parts.
    fn: maps a part to any pytree.
    parts: a pytree of arrays [num_parts, ...].

  Returns:
    The stacked outputs of `fn`, each leaf with a leading axis [num_parts].
  """
  return summed(num_parts, lambda part: ((), fn(part)), parts)[1]


def repeat_pieces(
    num_steps: int, body: Callable[[Carry], Carry], init: Carry) -> Carry:
  """`repeat` for a body that calls separately compiled functions.

  On the CPU, and not under `rolled`, the host runs the loop and nothing is
  compiled here.

  Args:
    num_steps: the number of iterations.
    body: as in `repeat`.
    init: the initial carry.

  Returns:
    As `repeat`.
  """
  if _ROLLED.get() or not unrolls():
    return repeat(num_steps, body, init)
  carry = init
  for _ in range(num_steps):
    carry = body(carry)
  return carry
