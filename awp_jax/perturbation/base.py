"""`Method`: the settings of a weight perturbation.

AWP and related methods train on a loss at weights perturbed within a set,

  v = a point of  { v : |v_i| <= size s_i, all groups i },
  G = a grad L(w; B') + b grad L(w + v; B),        w <- optimizer(w, G),

where a group i is a leaf, a filter, an entry or all leaves, and s_i its scale
(|w_i| by default; see `Ball`). They differ in a few settings, the fields of a
`Method`: the direction of v (gradient, momentum, noise), the norm and scale of
the set, the perturbed leaves, the number of moves, the examples in the ascent,
the weights (a, b), the batch B', where weight decay acts, and which steps
perturb. `methods` has the methods of the literature. A custom method:

  >>> method = Method('per filter', Ball(0.1, 'filter'), mask='*/kernel')
  >>> method.num_steps, method.mix, method.update_at
  (1, (0, 1), 'natural')
"""

import dataclasses
from typing import Any, Literal, NamedTuple
import warnings

import jax
import jax.numpy as jnp

from awp_jax.core import checks, numerics
from awp_jax.perturbation import directions, leaves
from awp_jax.perturbation.balls import Ball, Size
from awp_jax.perturbation.directions import Direction
from awp_jax.perturbation.leaves import Mask
from awp_jax.types import Array, Params, Scalar

UpdateAt = Literal['perturbed', 'natural']
UPDATE_AT: tuple[UpdateAt, ...] = ('perturbed', 'natural')
Moves = Literal['projected', 'summed']
MOVES: tuple[Moves, ...] = ('projected', 'summed')
Batch = Literal['same', 'other']
BATCHES: tuple[Batch, ...] = ('same', 'other')


class MethodState(NamedTuple):
  """The state of a method; save it with the optimizer state.

  Attributes:
    step: int32, the number of steps made.
    memory: the state of the direction: momentum, Fisher sums, or ().
  """

  step: Array
  memory: Any


@dataclasses.dataclass(frozen=True)
class Method:
  """A weight perturbation method, defined by its settings.

  Attributes:
    name: a display name.
    ball: the set that v lies in. With a `box`, the ball constrains each single
      move instead.
    direction: the direction that v follows.
    mask: which leaves are perturbed, as in `leaves.weight_mask`.
    num_steps: the number of ascent steps (moves), >= 1, each with a new
      gradient. Must be 1 unless the direction is the gradient.
    moves: how moves combine. 'projected': v <- project(v + move), with moves of
      1 / num_steps of the ball's size (the full size with a box). 'summed': v
      is the linear maximizer along the sum of the gradients.
    box: the set that v is projected onto after every move; None means the ball.
    examples_below: only examples whose loss at w + v is below this threshold
      enter the ascent; the mean is still over all. None means all examples. The
      loss function must return losses [B].
    mix: (a, b), the weights of the losses at w and at w + v.
    natural_batch: whether the gradient at w uses the 'same' batch (and is
      shared with the first pass of the ascent) or an 'other' one.
    aux_at: the pass whose aux (e.g. running statistics) is returned.
    update_at: the parameters passed to the optimizer, on which its weight decay
      acts: 'perturbed' (w + v) or 'natural' (w). Optimizers that store or bound
      parameters need 'natural'; see `perturbed_step.apply_at_perturbed`.
    start: the first step that perturbs, counted from 0.
    every: perturbs every `every`-th step from `start`.

  Raises:
    ValueError: if a count is out of range, a choice is unknown, or a direction
      that uses no gradients has `num_steps` > 1 or `examples_below`.
  """

  name: str
  ball: Ball
  direction: Direction = dataclasses.field(default_factory=directions.gradient)
  mask: Mask = leaves.is_weight
  num_steps: int = 1
  moves: Moves = 'projected'
  box: Ball | None = None
  examples_below: Scalar | None = None
  mix: tuple[Scalar, Scalar] = (0, 1)
  natural_batch: Batch = 'same'
  aux_at: UpdateAt = 'perturbed'
  update_at: UpdateAt = 'natural'
  start: int = 0
  every: int = 1

  def __post_init__(self) -> None:
    checks.count('num_steps', self.num_steps)
    checks.one_of('moves', self.moves, MOVES)
    checks.one_of('natural_batch', self.natural_batch, BATCHES)
    checks.one_of('aux_at', self.aux_at, UPDATE_AT)
    checks.one_of('update_at', self.update_at, UPDATE_AT)
    checks.count('start', self.start, minimum=0)
    checks.count('every', self.every)
    if isinstance(self.mask, list) and all(
        isinstance(pattern, str) for pattern in self.mask):
      object.__setattr__(self, 'mask', tuple(self.mask))
    if self.direction.source != 'gradient' and (
        self.num_steps > 1 or self.examples_below is not None):
      raise ValueError(
          f'direction {self.direction.name!r} uses no gradients: num_steps '
          'must be 1 and examples_below None, got '
          f'{self.num_steps} and {self.examples_below}.')

  def init(self, params: Params) -> MethodState:
    """The state before the first step.

    Args:
      params: w.

    Returns:
      The state. Its memory covers the perturbed leaves only.

    Raises:
      ValueError: if the mask does not match the parameters.

    .. note::
      Warns if perturbed parameters are in half precision, in which w + v rounds
      away most of a small v. Keep float32 master weights and cast them inside
      the loss function.
    """
    chosen = self.chosen(params)
    if not self.is_off:
      _warn_of_half_precision(params, chosen)
    return MethodState(
        jnp.int32(0), self.direction.init(leaves.select(params, chosen)))

  def chosen(self, params: Params) -> Params:
    """A pytree like `params`, True at each perturbed leaf."""
    return leaves.weight_mask(params, self.mask, self.ball.stack_axes)

  @property
  def is_off(self) -> bool:
    """Whether the size is the number 0."""
    return not callable(self.ball.size) and leaves.is_off(self.ball.size)

  @property
  def is_scheduled(self) -> bool:
    """Whether some steps are unperturbed."""
    return self.start > 0 or self.every > 1

  def perturbs_at(self, step: Any) -> Any:
    """Whether step number `step` perturbs, by `start` and `every`.

    Args:
      step: an int, or a device or traced scalar.

    Returns:
      A bool, or a bool scalar.
    """
    since = step - self.start
    return (since >= 0) & (since % self.every == 0)

  @property
  def uses_natural(self) -> bool:
    """Whether the loss or aux at w is used."""
    a = self.mix[0]
    return self.aux_at == 'natural' or not leaves.is_off(a)


def _warn_of_half_precision(params: Params, chosen: Params) -> None:
  half = [
      path for path, leaf, flag in zip(
          leaves.leaf_paths(params), jax.tree.leaves(params),
          jax.tree.leaves(chosen), strict=True)
      if flag and numerics.wide_dtype(leaf.dtype) != leaf.dtype]
  if half:
    warnings.warn(
        f'{len(half)} perturbed parameters are in half precision, among them '
        f'{half[0]}: w + v rounds away most of a small v. Keep float32 master '
        'weights and cast them inside the loss function.', stacklevel=3)


def size_of(name: str, value: Size) -> Size:
  """Checks a size, naming the caller's argument in errors."""
  if not callable(value):
    checks.not_negative(name, value)
  return value


def mixture(name: str, value: Scalar) -> tuple[Scalar, Scalar]:
  """Mixture weights (1 - value, value), with value in [0, 1].

  Args:
    name: the name of the argument, for the error.
    value: the weight of the loss at w + v.

  Returns:
    The weights of the losses at w and at w + v.

  Raises:
    ValueError: if the value is negative or not finite or, as a Python number,
      above 1.
  """
  checks.not_negative(name, value)
  if isinstance(value, int | float) and value > 1:
    raise ValueError(f'{name} must be at most 1, got {value!r}.')
  return 1 - value, value
