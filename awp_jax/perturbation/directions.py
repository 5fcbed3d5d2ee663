"""What a weight perturbation follows: the gradient, its past, or noise.

A `Direction` is a set of pure functions in the style of optax: `init` makes its
memory, `take` gives the direction d of the next move, `observe` is shown the
gradients of each step. The ones of the literature are `gradient`, `momentum`
and `noise`; the sign of the gradient is no direction of its own but the
farthest point of a ball of single entries (`balls.farthest`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax import checks
from awp_jax.perturbation import balls
from awp_jax.perturbation.leaves import wide
from awp_jax.types import Array, Params, Scalar

Source = Literal['gradient', 'memory', 'noise']


class Direction(NamedTuple):
  """What is followed.

  Attributes:
    name: for people.
    source: what `take` reads. 'gradient': each move costs a pass, and v is the
      farthest point of the ball along d. 'memory': no pass, and the same point.
      'noise': no pass but a key, and v = size s_i d, of random length.
    init: params -> memory, a pytree of arrays; () for none.
    take: (memory, gradients or None, params, key or None) -> d, a pytree like
      the parameters.
    observe: (memory, gradients at w + v, gradients that are descended) -> the
      next memory; called once a step.
  """

  name: str
  source: Source
  init: Callable[[Params], Any]
  take: Callable[[Any, Params | None, Params, Array | None], Params]
  observe: Callable[[Any, Params, Params], Any]


def gradient() -> Direction:
  """The gradient of the loss at w + v."""
  return Direction(
      'gradient', 'gradient', init=lambda params: (),
      take=lambda memory, gradients, params, key: gradients,
      observe=lambda memory, perturbed, descended: memory)


def momentum(decay: Scalar = 0.9) -> Direction:
  """m <- decay m + (1 - decay) g over the descended gradients.

  It is the first moment that Adam keeps, and up to a factor, which no ball
  sees, SGD's momentum. Its memory is one more copy of the parameters, in
  float32 or wider.

  Args:
    decay: in [0, 1).

  Returns:
    The direction; zero in the first step.
  """
  checks.not_negative('decay', decay)
  return Direction(
      'momentum', 'memory',
      init=lambda params: jax.tree.map(
          lambda w: jnp.zeros_like(wide(w)), params),
      take=lambda memory, gradients, params, key: memory,
      observe=lambda memory, perturbed, descended: jax.tree.map(
          lambda m, g: decay * m + (1 - decay) * g, memory, descended))


def _normal(key: Array | None, params: Params) -> Params:
  """N(0, 1) of the shapes of the parameters, a key for each leaf."""
  assert key is not None  # `engine.begin` has checked
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, max(len(leaves), 1))
  return jax.tree.unflatten(structure, [
      jax.random.normal(k, leaf.shape, wide(leaf).dtype)
      for k, leaf in zip(keys, leaves, strict=False)])


def noise() -> Direction:
  """Independent N(0, 1) at every entry."""
  return Direction(
      'noise', 'noise', init=lambda params: (),
      take=lambda memory, gradients, params, key: _normal(key, params),
      observe=lambda memory, perturbed, descended: memory)


def adaptive_noise(
    eta: Scalar, beta: Scalar, filter_axis: int = -1) -> Direction:
  """N(0, 1) / sqrt(1 + eta F_j), smaller where gradients have been large.

  F <- beta F + sum over each filter j of g^2, with the gradient at w + v and
  without a factor 1 - beta. Entries of leaves of one axis are filters of their
  own. F starts at zero.

  Args:
    eta: >= 0.
    beta: in [0, 1).
    filter_axis: as in `balls.Ball`.

  Returns:
    The direction; its memory is F, one number for each filter.
  """
  checks.not_negative('eta', eta)
  checks.not_negative('beta', beta)

  def sums(tree: Params) -> Params:
    return jax.tree.map(
        lambda g: balls.filter_sums(jnp.square(wide(g)), filter_axis)
        if jnp.ndim(g) else jnp.square(wide(g)), tree)

  return Direction(
      'adaptive noise', 'noise',
      init=lambda params: jax.tree.map(jnp.zeros_like, sums(params)),
      take=lambda memory, gradients, params, key: jax.tree.map(
          lambda z, f: z / jnp.sqrt(1 + eta * f), _normal(key, params), memory),
      observe=lambda memory, perturbed, descended: jax.tree.map(
          lambda f, s: beta * f + s, memory, sums(perturbed)))
