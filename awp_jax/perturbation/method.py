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
  >>> method.num_steps, method.mix, method.decay_at
  (1, (0, 1), 'natural')
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from awp_jax import checks
from awp_jax.perturbation import directions, leaves
from awp_jax.perturbation.balls import Ball, Size
from awp_jax.perturbation.directions import Direction
from awp_jax.perturbation.leaves import Mask
from awp_jax.types import Array, Params, Scalar

DecayAt = Literal['perturbed', 'natural']
DECAY_AT: tuple[DecayAt, ...] = ('perturbed', 'natural')
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
    decay_at: the parameters that the optimizer is shown, hence those that
      weight decay acts on: 'perturbed' (w + v) or 'natural' (w).
    start: the first step, counted from 0, that perturbs.
    every: from there on, one step in so many perturbs.
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
  aux_at: DecayAt = 'perturbed'
  decay_at: DecayAt = 'natural'
  start: int = 0
  every: int = 1

  def __post_init__(self) -> None:
    checks.count('num_steps', self.num_steps)
    checks.one_of('moves', self.moves, MOVES)
    checks.one_of('natural_batch', self.natural_batch, BATCHES)
    checks.one_of('aux_at', self.aux_at, DECAY_AT)
    checks.one_of('decay_at', self.decay_at, DECAY_AT)
    checks.count('start', self.start, minimum=0)
    checks.count('every', self.every)
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
      The state.

    Raises:
      ValueError: if the mask does not fit the parameters.
    """
    leaves.weight_mask(params, self.mask)
    return MethodState(jnp.int32(0), self.direction.init(params))

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
