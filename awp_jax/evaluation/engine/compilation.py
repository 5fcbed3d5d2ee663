"""Compiled programs that take closed-over arrays as arguments.

`jax.jit` embeds every array that a function closes over as a constant. The
weights of a network then add megabytes to the program, and each checkpoint is a
different program, which a persistent compilation cache never hits. Here the
arrays become arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from awp_jax.core import rewriting, sharding


def unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function inside `jax.jit`, which hides its constants."""
  if isinstance(function, jax.stages.Wrapped):
    return getattr(function, '__wrapped__', function)
  return function


def constants_as_arguments(
    function: Callable[..., Any], devices: Sequence[jax.Device] | None = None
) -> Callable[..., Any]:
  """`jax.jit(function)` with closed-over arrays as arguments.

  On CPUs convolutions take the forms of `awp_jax.core.convolution_forms`.

  Args:
    function: takes positional pytrees of arrays. It is traced once per
      signature and must not close over tracers.
    devices: closed-over arrays are replicated over these; None does not move
      them.

  Returns:
    The compiled function.
  """
  programs: dict[Any, tuple[Callable[..., Any], Any, Any]] = {}

  def call(*arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    signature = structure, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
    if signature not in programs:
      closed, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
      closed = rewriting.with_cpu_convolutions(closed)
      run: Callable[..., Any] = jax.jit(
          lambda consts, flat: jax.core.eval_jaxpr(
              closed.jaxpr, consts, *flat))
      consts = closed.consts
      if devices:
        # The call may be inside a trace, whose tracers must not be kept.
        with jax.ensure_compile_time_eval():
          consts = sharding.replicate(consts, devices)
      programs[signature] = run, consts, jax.tree.structure(out)
    run, consts, out_structure = programs[signature]
    return jax.tree.unflatten(out_structure, run(consts, leaves))

  return call
