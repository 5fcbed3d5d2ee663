"""The choices that make a weight perturbation, as one record.

AWP and its relatives all train on a loss at weights that are shifted within a
set,

  v = a point of  { v : |v_i| <= size s_i, all groups i },
  G = a grad L(w; B') + b grad L(w + v; B),        w <- optimizer(w, G),

and differ in a handful of choices, the fields of a `Method`: what v follows
(gradient, momentum, noise), the norm and scale of the set, which leaves are
shifted, in how many moves, which examples enter the ascent, the weights (a, b),
the batch B', where weight decay acts, and in which steps it is done at all.
`methods` names those of the literature. One of one's own:

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
  """What a method carries from step to step; save it with the optimizer's.

  Attributes:
    step: int32, how many steps were made.
    memory: the direction's: momentum, Fisher sums, or ().
  """

  step: Array
  memory: Any


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to perturb weights: its choices, one by one.

  Attributes:
    name: for people.
    ball: the set that v lies in. If there is a `box`, the ball is that of a
      single move instead.
    direction: what v follows.
    mask: which leaves are shifted, as in `leaves.weight_mask`.
    num_steps: moves >= 1, each with a gradient of its own; 1 unless the
      direction is the gradient.
    moves: how several moves make v. 'projected': v <- project(v + move), a move
      being 1 / num_steps of the ball's size (with a box all of it). 'summed':
      v is the farthest point of the ball along the sum of the gradients.
    box: the set that v is projected on after every move, if not the ball.
    examples_below: only examples whose loss at w + v is smaller enter the
      ascent, the mean still being over all; None lets all of them in. The loss
      function must return losses [B].
    mix: (a, b), the weights of the losses at w and at w + v.
    natural_batch: whether the gradient at w is taken on the 'same' batch (and
      then shared with the ascent's first pass) or an 'other'.
    aux_at: the pass whose aux (running statistics, say) is handed out.
    update_at: the parameters that the optimizer is shown, hence those that its
      weight decay acts on: 'perturbed' (w + v) or 'natural' (w). Optimizers
      that keep or bound the parameters themselves need 'natural'; see
      `steps.apply_at_perturbed`.
    start: the first step, counted from 0, that perturbs.
    every: perturbs every `every`-th step from `start`.
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
          f'direction {self.direction.name!r} takes no gradients: num_steps '
          'must be 1 and examples_below None, got '
          f'{self.num_steps} and {self.examples_below}.')

  def init(self, params: Params) -> MethodState:
    """The state before the first step.

    Args:
      params: w.

    Returns:
      The state. Its memory holds the perturbed leaves alone.

    Raises:
      ValueError: if the mask does not fit the parameters.

    .. note::
      Warns if perturbed parameters are in half precision, where the sum w + v
      rounds most of a small v away. Keep float32 master weights, and cast them
      inside the loss function.
    """
    chosen = self.chosen(params)
    if not self.is_off:
      _warn_of_half_precision(params, chosen)
    return MethodState(
        jnp.int32(0), self.direction.init(leaves.select(params, chosen)))

  def chosen(self, params: Params) -> Params:
    """True at each leaf that is perturbed, a pytree like `params`."""
    return leaves.weight_mask(params, self.mask, self.ball.stack_axes)

  @property
  def is_off(self) -> bool:
    """Whether the size is the number 0."""
    return not callable(self.ball.size) and leaves.is_off(self.ball.size)

  @property
  def is_scheduled(self) -> bool:
    """Whether some steps are left out."""
    return self.start > 0 or self.every > 1

  def perturbs_at(self, step: Any) -> Any:
    """Whether step number `step` is one that `start` and `every` leave in.

    Args:
      step: an int, or a device or traced scalar.

    Returns:
      A bool, or a bool scalar.
    """
    since = step - self.start
    return (since >= 0) & (since % self.every == 0)

  @property
  def uses_natural(self) -> bool:
    """Whether the pass at w counts."""
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
        f'{half[0]}: w + v rounds most of a small v away. Keep float32 master '
        'weights and cast them inside the loss function.', stacklevel=3)


def size_of(name: str, value: Size) -> Size:
  """Checks a size under the name that the caller knows it by."""
  if not callable(value):
    checks.not_negative(name, value)
  return value


def mixture(name: str, value: Scalar) -> tuple[Scalar, Scalar]:
  """(1 - value, value), value in [0, 1]: the weights of a mixture."""
  checks.not_negative(name, value)
  if isinstance(value, int | float) and value > 1:
    raise ValueError(f'{name} must be at most 1, got {value!r}.')
  return 1 - value, value
