"""Equations of a jaxpr that need another form on CPUs."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from awp_jax.types import Array

#: A function of the equation's inputs.
Form = Callable[..., Array]

#: Whether XLA has the fault that `is_miscompiled` describes. Later releases
#: count as faulty until they are tested (docs/results/bfloat16_on_cpus.md).
_FUSES_PRODUCTS = jax.__version_info__ >= (0, 11)


def shapes(equation: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes and dtypes of the inputs and outputs."""
  return tuple([
      jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
      for var in (*equation.invars, *equation.outvars)])


def walk(jaxpr: Any) -> Iterator[Any]:
  """The equations of a jaxpr, nested ones included, outer ones first."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda value: hasattr(value, 'eqns')):
      if hasattr(inner, 'eqns'):
        yield from walk(inner)


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
  """Whether XLA may compile what surrounds it to wrong results on CPUs.

  XLA of jaxlib 0.11 and 0.12 fuses matrix products and convolutions that a
  reduction follows. With a `max` or `min` in bfloat16 between two of them the
  result is arbitrary, often NaN:

    sum(relu(relu(x @ a) @ b), dtype=float32)

  A `max` in float32 between two casts is no better. It is right if the result
  of the `max` or `min` passes a barrier.

  Args:
    equation: of a program that `is_at_risk`.
  """
  return (
      equation.primitive.name in ('max', 'min')
      and equation.outvars[0].aval.dtype in (jnp.bfloat16, jnp.float32))


def is_at_risk(jaxpr: Any) -> bool:
  """Whether XLA has the fault and a value of the program is in bfloat16."""
  return _FUSES_PRODUCTS and any(
      getattr(var.aval, 'dtype', None) == jnp.bfloat16
      for equation in walk(jaxpr)
      for var in (*equation.invars, *equation.outvars))


@functools.cache
def _barrier() -> Any:
  """The equation of a barrier; its primitive and parameters fit any values."""
  return jax.make_jaxpr(lax.optimization_barrier)(0.0).eqns[0]


def separated(equation: Any) -> list[Any]:
  """An equation of one output, and a barrier that XLA fuses nothing across."""
  output, = equation.outvars
  inner = core.Var(output.aval)
  return [
      equation.replace(outvars=[inner]),
      # Replacing keeps the mesh that the equation was traced under.
      equation.replace(
          primitive=_barrier().primitive, params=_barrier().params,
          invars=[inner], outvars=[output])]


def on_cpus(equation: Any, form: Form) -> Any:
  """The equation of a function that takes another form on CPUs.

  Programs for other platforms keep the original.

  Args:
    equation: the original, of one output.
    form: a function with the same results up to rounding.

  Returns:
    An equation, whose inputs and outputs are not those of the original.
  """
  *inputs, _ = shapes(equation)
  original = functools.partial(equation.primitive.bind, **equation.params)

  def call(*arguments: Array) -> Array:
    return lax.platform_dependent(*arguments, cpu=form, default=original)

  return jax.make_jaxpr(jax.jit(call))(*inputs).eqns[0]
