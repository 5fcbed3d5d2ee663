"""Replaces the convolutions in a function by faster forms for CPUs.

The function is traced, and the equations of its jaxpr are replaced one by one,
inside loops and branches too. It may contain the convolutions of any network
and their gradients:

  >>> import jax, jax.numpy as jnp
  >>> def loss(x, kernel):
  ...   return jnp.sum(jax.lax.conv_general_dilated(
  ...       x, kernel, (2, 2), ((1, 1), (1, 1)),
  ...       dimension_numbers=('NHWC', 'HWIO', 'NHWC')) ** 2)
  >>> x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
  >>> grad = jax.grad(loss)(x, kernel)
  >>> faster = jax.jit(cpu_convolutions(jax.grad(loss)))(x, kernel)
  >>> print(float(jnp.max(jnp.abs(faster - grad))))
  0.0
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar

import jax
from jax.extend import core

from awp_jax.core import convolution, equations, loops

Fn = TypeVar('Fn', bound=Callable[..., Any])

#: Primitives whose parameters hold jaxprs that run as they are. Others, such as
#: kernels of Pallas, are not entered.
_ENTERED = frozenset((
    'jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint',
    'while', 'scan', 'cond', 'custom_jvp_call', 'custom_vjp_call',
    'composite', 'shard_map'))


def cpu_convolutions(fn: Fn) -> Fn:
  """A function with the same results, whose convolutions are faster on CPUs.

  Convolutions in float32 and bfloat16 take the forms of
  `awp_jax.core.convolution_forms`. In functions with values in bfloat16 a
  barrier follows every maximum and minimum, near which XLA of jax 0.11 and 0.12
  miscompiles products (`awp_jax.core.equations`). Otherwise results change by
  rounding only. Apply it outside of differentiation, directly inside `jax.jit`,
  `jax.pmap` or `jax.shard_map`:

    step = jax.jit(awp_jax.cpu_convolutions(step))

  A `shard_map` with `check_vma=True`, its default, keeps its convolutions.

  On other platforms nothing changes: if the default device is an accelerator,
  `fn` is called as it is, and a program lowered for an accelerator contains the
  original convolutions. In bfloat16 the gain needs XLA's oneDNN
  convolutions as well (see the page on speed in the documentation).

  Args:
    fn: a function of pytrees of arrays that JAX can trace.

  Returns:
    The function. It traces `fn` at every call, so it belongs under `jit`.
  """

  @functools.wraps(fn)
  def call(*args: Any, **kwargs: Any) -> Any:
    if not loops.unrolls():
      return fn(*args, **kwargs)
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
    closed = with_cpu_convolutions(closed)
    leaves = jax.tree.leaves((args, kwargs))
    return jax.tree.unflatten(
        jax.tree.structure(out),
        jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *leaves))

  return call  # type: ignore[return-value]


def with_cpu_convolutions(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """The jaxpr with faster convolutions, as in `cpu_convolutions`.

  Args:
    closed: the jaxpr of a function, from `jax.make_jaxpr`.

  Returns:
    A jaxpr with the same inputs and outputs; the same one if the default device
    is an accelerator.
  """
  if not loops.unrolls():
    return closed
  jaxpr = closed.jaxpr
  new = _Rewriter(equations.is_at_risk(jaxpr)).jaxpr(jaxpr)
  return closed if new is jaxpr else closed.replace(jaxpr=new)


class _Rewriter:
  """Rewrites jaxprs. A jaxpr that is called twice is rewritten once."""

  def __init__(self, is_at_risk: bool) -> None:
    self._is_at_risk = is_at_risk
    # The originals are kept, so that no other object gets their id.
    self._known: dict[int, tuple[Any, Any]] = {}
    self._forms: dict[Any, Any] = {}

  def jaxpr(self, jaxpr: Any) -> Any:
    """A jaxpr with faster convolutions, or the same object."""
    if id(jaxpr) not in self._known:
      new: list[Any] = []
      for equation in jaxpr.eqns:
        new += (
            equations.separated(equation)
            if self._is_at_risk and equations.is_miscompiled(equation)
            else [self._equation(equation)])
      same = len(new) == len(jaxpr.eqns) and all(
          one is other for one, other in zip(new, jaxpr.eqns, strict=True))
      self._known[id(jaxpr)] = jaxpr, (
          jaxpr if same else jaxpr.replace(eqns=new))
    return self._known[id(jaxpr)][1]

  def _value(self, value: Any) -> Any:
    """A parameter of an equation, with its jaxprs rewritten."""
    if isinstance(value, core.ClosedJaxpr):
      new = self.jaxpr(value.jaxpr)
      if new is value.jaxpr:
        return value
      if id(value) not in self._known:
        self._known[id(value)] = value, value.replace(jaxpr=new)
      return self._known[id(value)][1]
    if isinstance(value, core.Jaxpr):
      return self.jaxpr(value)
    if isinstance(value, tuple) and any(
        isinstance(part, core.ClosedJaxpr) for part in value):
      return tuple([self._value(part) for part in value])
    return value

  def _equation(self, equation: Any) -> Any:
    name = equation.primitive.name
    if name == 'conv_general_dilated':
      return self._convolution(equation)
    if name not in _ENTERED:
      return equation
    params = {key: self._value(value)
              for key, value in equation.params.items()}
    if all(params[key] is equation.params[key] for key in params):
      return equation
    return equation.replace(params=params)

  def _convolution(self, equation: Any) -> Any:
    if equations.is_sharded(equation):
      return equation
    # Other platforms bind the parameters of the first equation of a key.
    key = tuple(sorted(equation.params.items())), equations.shapes(equation)
    if key not in self._forms:
      form = convolution.of_equation(equation)
      self._forms[key] = form and equations.on_cpus(equation, form)
    new = self._forms[key]
    if new is None:
      return equation
    return equation.replace(primitive=new.primitive, params=new.params)
