"""Weight perturbation methods by name, and options common to all of them."""

from collections.abc import Callable
import dataclasses
import inspect
from typing import Any

from awp_jax.core import checks
from awp_jax.perturbation.balls import Ball
from awp_jax.perturbation.base import Method, UpdateAt
from awp_jax.perturbation.leaves import Mask
from awp_jax.perturbation.methods.gradient_based import (
  asam,
  awp,
  boxed_awp,
  momentum_awp,
  rwp,
  sam,
  sign,
  wt_awp,
)
from awp_jax.perturbation.methods.noise_based import (
  arwp,
  frwp,
  m_arwp,
  m_rwp,
  random,
)
from awp_jax.types import Array, Scalar


def start_after(method: Method, num_steps: int) -> Method:
  """Starts a method after `num_steps` steps with plain gradients.

  The plain steps take the other branch of a `lax.cond`: they do not run the
  ascent, and nothing is recompiled when the method starts.

  Args:
    method: any method.
    num_steps: the number of plain steps, >= 0.

  Returns:
    The method with this start.
  """
  return dataclasses.replace(method, start=num_steps)


def every_k(method: Method, k: int) -> Method:
  """Applies a method in every k-th step from its start.

  The other steps are plain, as in `start_after`.

  Args:
    method: any method.
    k: the period, >= 1.

  Returns:
    The method with this period.
  """
  return dataclasses.replace(method, every=k)


@dataclasses.dataclass(frozen=True)
class _ScaledSize:
  """A step-dependent size, multiplied by a factor."""

  factor: float
  size: Callable[[Array], Scalar]

  def __call__(self, step: Array) -> Scalar:
    return self.factor * self.size(step)


def scaled(method: Method, factor: float) -> Method:
  """Scales the perturbations of a method by `factor`.

  Args:
    method: any method.
    factor: >= 0. With 0 the method is off: it costs a plain gradient and still
      updates its memory.

  Returns:
    The method with scaled sizes of ball and box.
  """
  checks.not_negative('factor', factor)

  def resize(ball: Ball | None) -> Ball | None:
    if ball is None:
      return None
    size = ball.size
    if factor == 0:
      return dataclasses.replace(ball, size=0.0)
    if callable(size):
      return dataclasses.replace(ball, size=_ScaledSize(factor, size))
    return dataclasses.replace(ball, size=factor * size)

  if factor == 1:
    return method
  ball = resize(method.ball)
  assert ball is not None
  return dataclasses.replace(method, ball=ball, box=resize(method.box))


def constant_awp(
    gamma: Scalar, num_steps: int, mask: Mask,
    update_at: UpdateAt = 'perturbed') -> Method:
  """`awp` of constant size, for functions without a step count.

  Raises:
    ValueError: if gamma is a function of the step, or as `awp`.
  """
  if callable(gamma):
    raise ValueError(
        'gamma must be a number, got a function: these functions have no step '
        'count, so a schedule would stay at its first value. Use '
        'perturbed_step(methods.awp(schedule), ...), whose state counts steps.')
  return awp(gamma, num_steps=num_steps, mask=mask, update_at=update_at)


#: The named methods, for `make`.
METHODS: dict[str, Callable[..., Method]] = {
    'arwp': arwp, 'asam': asam, 'awp': awp, 'boxed_awp': boxed_awp,
    'frwp': frwp, 'm_arwp': m_arwp, 'm_rwp': m_rwp,
    'momentum_awp': momentum_awp, 'random': random, 'rwp': rwp, 'sam': sam,
    'sign': sign, 'wt_awp': wt_awp}


def make(
    name: str, *, start: int = 0, every: int = 1, **options: Any) -> Method:
  """Creates a method by name.

  Args:
    name: a key of `METHODS`.
    start: as in `start_after`.
    every: as in `every_k`.
    **options: keywords of the method's function.

  Returns:
    The method.

  Raises:
    ValueError: if the name or an option is unknown (the error lists the valid
      ones), an option is missing, or a value is out of range.
  """
  checks.one_of('method', name, METHODS)
  parameters = inspect.signature(METHODS[name]).parameters
  for option in options:
    checks.one_of(f'option of method {name!r}', option,
                  [*parameters, 'start', 'every'])
  missing = [key for key, p in parameters.items()
             if p.default is p.empty and key not in options]
  if missing:
    raise ValueError(
        f'method {name!r} needs the option {", ".join(map(repr, missing))}.')
  return every_k(start_after(METHODS[name](**options), start), every)
