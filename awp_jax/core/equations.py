"""Equations of a jaxpr that run in another form on CPUs.

Programs for other platforms keep the original equation.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from awp_jax.types import Array

#: A function of the equation's inputs.
Form = Callable[..., Array]

#: Whether XLA may fuse several products in bfloat16, see `is_miscompiled`.
_FUSES_PRODUCTS = jax.__version_info__ >= (0, 11)


def shapes(equation: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes and dtypes of the inputs and outputs."""
  return tuple([
      jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
      for var in (*equation.invars, *equation.outvars)])


def is_sharded(equation: Any) -> bool:
  """Whether the types name axes of a mesh, which a rewritten equation drops.

  That is the case with an explicit mesh, and in a `shard_map` that checks over
  which axes values vary (`check_vma`). Under `pmap` on jax 0.12 types have a
  sharding over no axis.
  """
  variables = (*equation.invars, *equation.outvars)
  if any(getattr(getattr(var.aval, 'manual_axis_type', None), 'varying', None)
         for var in variables):
    return True
  return any(
      any(sharding.spec) or getattr(sharding.spec, 'unreduced', None)
      for sharding in (
          getattr(var.aval, 'sharding', None) for var in variables)
      if sharding is not None)


def is_miscompiled(equation: Any) -> bool:
  """Whether XLA may compile this product to wrong results on CPUs.

  XLA of jaxlib 0.11 and 0.12 fuses products in bfloat16 that a sum follows.
  With a maximum between two of them the sum has arbitrary values, often NaN:

    sum(relu(relu(x @ a) @ b), dtype=float32)

  Products in float32 are right, and so are those in bfloat16 whose results pass
  an `optimization_barrier` (`separated`).

  Args:
    equation: of a matrix product or a convolution.
  """
  return _FUSES_PRODUCTS and equation.outvars[0].aval.dtype == jnp.bfloat16


def original(equation: Any) -> Form:
  """The function that an equation of one output computes."""
  return functools.partial(equation.primitive.bind, **equation.params)


def separated(form: Form) -> Form:
  """The same function; XLA fuses nothing that follows into it."""
  return lambda *inputs: lax.optimization_barrier(form(*inputs))


def on_cpus(equation: Any, form: Form) -> Any:
  """The equation of a function that takes another form on CPUs.

  Args:
    equation: the original, of one output.
    form: a function with the same results up to rounding.

  Returns:
    An equation, whose inputs and outputs are not those of the original.
  """
  *inputs, _ = shapes(equation)

  def call(*arguments: Array) -> Array:
    return lax.platform_dependent(
        *arguments, cpu=form, default=original(equation))

  return jax.make_jaxpr(jax.jit(call))(*inputs).eqns[0]
