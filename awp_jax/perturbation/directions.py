"""Directions of weight perturbations: gradient, momentum or noise.

A `Direction` is a tuple of pure functions, as in optax: `init` creates the
memory, `take` returns the direction d of the next move, and `observe` updates
the memory with the gradients of each step. They work on the perturbed leaves
only, a dict of arrays by path in float32 or wider, so nothing is stored for the
other leaves. The sign of the gradient is not a separate direction: it is
`balls.linear_maximizer` of a ball of single entries.

Equal arguments give equal directions, so a method can be a static argument of a
jitted function:

  >>> momentum(0.9) == momentum(0.9), momentum(0.9) == momentum(0.8)
  (True, False)
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.core import checks
from awp_jax.core.numerics import wide
from awp_jax.perturbation import balls, leaves
from awp_jax.perturbation.leaves import Chosen, StackAxes
from awp_jax.types import Array, Scalar

Source = Literal['gradient', 'memory', 'noise']


class Direction(NamedTuple):
  """The direction that a perturbation follows.

  Attributes:
    name: a display name.
    source: the input of `take`. 'gradient': each move costs a pass, and v is
      the linear maximizer along d. 'memory': no pass, with the same maximizer.
      'noise': no pass but a key, and v = size s_i d, of random length.
    init: w -> memory, a pytree of arrays; () for none.
    take: (memory, gradients or None, w, key or None) -> d, a dict like w.
    observe: (memory, gradients at w + v, descended gradients) -> next memory;
      called once per step.
  """

  name: str
  source: Source
  init: Callable[[Chosen], Any]
  take: Callable[[Any, Chosen | None, Chosen, Array | None], Chosen]
  observe: Callable[[Any, Chosen, Chosen], Any]


def _no_memory(weights: Chosen) -> tuple[()]:
  del weights
  return ()


def _same_memory(memory: Any, perturbed: Chosen, descended: Chosen) -> Any:
  del perturbed, descended
  return memory


def _take_gradient(
    memory: Any, gradients: Chosen | None, weights: Chosen, key: Array | None
) -> Chosen:
  del memory, weights, key
  assert gradients is not None  # the engine runs a pass for this source
  return gradients


def gradient() -> Direction:
  """The gradient of the loss at w + v."""
  return Direction(
      'gradient', 'gradient', _no_memory, _take_gradient, _same_memory)


def _zeros(weights: Chosen) -> Chosen:
  return {path: jnp.zeros_like(wide(w)) for path, w in weights.items()}


def _take_memory(
    memory: Chosen, gradients: Chosen | None, weights: Chosen,
    key: Array | None) -> Chosen:
  del gradients, weights, key
  return memory


@dataclasses.dataclass(frozen=True)
class _MovingMean:
  """m <- decay m + (1 - decay) g."""

  decay: Scalar

  def __call__(
      self, memory: Chosen, perturbed: Chosen, descended: Chosen) -> Chosen:
    del perturbed
    return {path: self.decay * m + (1 - self.decay) * descended[path]
            for path, m in memory.items()}


def momentum(decay: Scalar = 0.9) -> Direction:
  """m <- decay m + (1 - decay) g, with g the descended gradient.

  This is Adam's first moment, and SGD's momentum up to a factor that the ball
  normalizes away. The memory is one copy of the perturbed leaves, in float32 or
  wider.

  Args:
    decay: the decay rate, in [0, 1).

  Returns:
    The direction; zero in the first step.
  """
  checks.not_negative('decay', decay)
  return Direction(
      'momentum', 'memory', _zeros, _take_memory, _MovingMean(decay))


def _take_noise(
    memory: Any, gradients: Chosen | None, weights: Chosen, key: Array | None
) -> Chosen:
  """Draws N(0, 1) in the shapes of the weights, with one key per leaf."""
  del memory, gradients
  assert key is not None  # checked by `engine.begin`
  keys = jax.random.split(key, max(len(weights), 1))
  return {path: jax.random.normal(k, w.shape, w.dtype)
          for k, (path, w) in zip(keys, weights.items(), strict=False)}


def noise() -> Direction:
  """Independent N(0, 1) at every entry."""
  return Direction('noise', 'noise', _no_memory, _take_noise, _same_memory)


@dataclasses.dataclass(frozen=True)
class _SquareSums:
  """Sums of squares over each filter."""

  filter_axis: int
  stack_axes: StackAxes

  def __call__(self, values: Chosen) -> Chosen:
    return {
        path: balls.filter_sums(
            jnp.square(wide(x)), self.filter_axis,
            leaves.num_stack_axes(self.stack_axes, path, x))
        for path, x in values.items()}


@dataclasses.dataclass(frozen=True)
class _FisherInit:
  """F_j = 0."""

  sums: _SquareSums

  def __call__(self, weights: Chosen) -> Chosen:
    return _zeros(self.sums(weights))


@dataclasses.dataclass(frozen=True)
class _FisherUpdate:
  """F_j <- beta F_j + sum over filter j of g^2."""

  beta: Scalar
  sums: _SquareSums

  def __call__(
      self, memory: Chosen, perturbed: Chosen, descended: Chosen) -> Chosen:
    del descended
    sums = self.sums(perturbed)
    return {path: self.beta * f + sums[path] for path, f in memory.items()}


@dataclasses.dataclass(frozen=True)
class _ShrunkNoise:
  """N(0, 1) / sqrt(1 + eta F)."""

  eta: Scalar

  def __call__(
      self, memory: Chosen, gradients: Chosen | None, weights: Chosen,
      key: Array | None) -> Chosen:
    drawn = _take_noise(memory, gradients, weights, key)
    return {path: z / jnp.sqrt(1 + self.eta * memory[path])
            for path, z in drawn.items()}


def adaptive_noise(
    eta: Scalar, beta: Scalar, filter_axis: int = -1,
    stack_axes: StackAxes = 0) -> Direction:
  """N(0, 1) / sqrt(1 + eta F_j), smaller where past gradients are large.

  F_j <- beta F_j + sum over filter j of g^2, with g the gradient at w + v and
  without a factor 1 - beta. F starts at zero. In leaves with one axis every
  entry is a filter.

  Args:
    eta: the strength of the scaling, >= 0.
    beta: the decay rate of F, in [0, 1).
    filter_axis: as in `balls.Ball`.
    stack_axes: as in `balls.Ball`.

  Returns:
    The direction; its memory is F, one number per filter.
  """
  checks.not_negative('eta', eta)
  checks.not_negative('beta', beta)
  sums = _SquareSums(filter_axis, leaves.as_stack_axes(stack_axes))
  return Direction(
      'adaptive noise', 'noise', _FisherInit(sums), _ShrunkNoise(eta),
      _FisherUpdate(beta, sums))
