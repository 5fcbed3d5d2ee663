"""A classifier as the attacks see it: logits, and gradients of losses of them.

Both are compiled once per batch shape and shared by all attacks of an
evaluation: the loss is picked inside, by number. Its part of the gradient is
with respect to the logits only, hence next to nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from awp_jax import loops, objectives
from awp_jax.types import Array


class RandomLogitsFn(Protocol):
  """A randomised classifier: (images [B, ...], key) -> logits [B, C]."""

  def __call__(self, x: Array, key: Array, /) -> Array:
    """Maps a batch and a key to logits."""
    ...


class Gradients(NamedTuple):
  """A loss and its gradient at a batch of inputs.

  Attributes:
    gradient: of the summed losses with respect to the inputs, [B, ...].
    losses: [B].
    broken: whether the inputs are misclassified, by finite logits, [B].
  """

  gradient: Array
  losses: Array
  broken: Array


class Model(NamedTuple):
  """The compiled pieces of one classifier.

  Attributes:
    logits: (images, keys) -> logits [B, C].
    gradients: (loss, images, labels, targets, keys) -> `Gradients`; `loss` is a
      name of `LOSSES`, `targets` [B] is read by targeted losses only.
    num_classes: C.
  """

  logits: Callable[[Array, Array], Array]
  gradients: Callable[[str, Array, Array, Array, Array], Gradients]
  num_classes: int


def _sorted_and_picked(
    logits: Array, labels: Array, targets: Array) -> tuple[Array, Array, Array]:
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  ranked = jnp.sort(wide, axis=-1)
  true = jnp.take_along_axis(wide, labels[:, None], axis=-1)[:, 0]
  target = jnp.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]
  return ranked, true, target


def difference(logits: Array, labels: Array, targets: Array) -> Array:
  """z_t - z_y of each example: logits [B, C], labels and targets [B] -> [B]."""
  _, true, target = _sorted_and_picked(logits, labels, targets)
  return target - true


def dlr(logits: Array, labels: Array) -> Array:
  """Difference of logits ratio, which ignores shifts and scales of the logits.

    -(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12),   z sorted downwards

  Args:
    logits: [B, C], C >= 3.
    labels: integers [B].

  Returns:
    Losses [B], above 0 exactly where the example is misclassified; 0 where the
    three largest logits are equal.

  Raises:
    ValueError: with fewer than 3 classes.

  References:
    Croce and Hein, Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks, ICML 2020.
  """
  if logits.shape[-1] < 3:
    raise ValueError(
        f'the DLR loss needs at least 3 classes, got {logits.shape[-1]}.')
  ranked, _, _ = _sorted_and_picked(logits, labels, labels)
  margin = objectives.cw_margin(logits, labels)
  return margin / (ranked[:, -1] - ranked[:, -3] + 1e-12)


def targeted_dlr(logits: Array, labels: Array, targets: Array) -> Array:
  """The DLR loss towards a class t.

    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)

  Args:
    logits: [B, C], C >= 4.
    labels: integers [B].
    targets: integers [B].

  Returns:
    Losses [B].

  Raises:
    ValueError: with fewer than 4 classes.

  References:
    As `dlr`.
  """
  if logits.shape[-1] < 4:
    raise ValueError(
        'the targeted DLR loss needs at least 4 classes, got '
        f'{logits.shape[-1]}.')
  ranked, true, target = _sorted_and_picked(logits, labels, targets)
  spread = ranked[:, -1] - (ranked[:, -3] + ranked[:, -4]) / 2
  return (target - true) / (spread + 1e-12)


#: The losses that inputs may ascend, in the order of their numbers.
LOSSES: tuple[str, ...] = ('ce', 'margin', 'difference', 'dlr', 'dlr-targeted')


def _branches(num_classes: int) -> list[Callable[..., Array]]:
  """One function per entry of `LOSSES` that `num_classes` allows."""
  branches: list[Callable[..., Array]] = [
      lambda z, y, t: objectives.cross_entropy(z, y),
      lambda z, y, t: objectives.cw_margin(z, y), difference]
  if num_classes >= 3:
    branches.append(lambda z, y, t: dlr(z, y))
  if num_classes >= 4:
    branches.append(targeted_dlr)
  return branches


def misclassified(logits: Array, labels: Array) -> Array:
  """Whether finite logits put another class first, [B].

  Logits that are not finite are a failure of the model, not of its robustness.
  """
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  return finite & (jnp.argmax(logits, axis=-1) != labels)


def make_model(
    logits_fn: Callable[..., Array], num_classes: int, *,
    takes_key: bool = False, num_draws: int = 1) -> Model:
  """Compiles the pieces of a classifier.

  Args:
    logits_fn: images [B, ...] -> logits [B, C]; with `takes_key` it takes a key
      as well, and is called with one per example.
    num_classes: C.
    takes_key: whether the classifier is randomised.
    num_draws: over how many draws a gradient is averaged (expectation over
      transformations).

  Returns:
    The pieces; nothing is compiled before they are called.
  """
  branches = _branches(num_classes)

  def apply(images: Array, keys: Array) -> Array:
    if not takes_key:
      return logits_fn(images)
    one = jax.vmap(lambda image, key: logits_fn(image[None], key)[0])
    return one(images, keys)

  @jax.jit
  def once(
      number: Array, images: Array, labels: Array, targets: Array, keys: Array
  ) -> Gradients:
    logits, pullback = jax.vjp(lambda x: apply(x, keys), images)

    def total(z: Array) -> tuple[Array, Array]:
      losses = jax.lax.switch(number, branches, z, labels, targets)
      return jnp.sum(losses), losses

    cotangent, losses = jax.grad(total, has_aux=True)(logits)
    gradient, = pullback(cotangent)
    return Gradients(gradient, losses, misclassified(logits, labels))

  def gradients(
      loss: str, images: Array, labels: Array, targets: Array, keys: Array
  ) -> Gradients:
    number = jnp.int32(LOSSES.index(loss))
    if num_draws == 1:
      return once(number, images, labels, targets, keys)

    def draw(carry: tuple[Array, Gradients]) -> tuple[Array, Any]:
      turn, total = carry
      fresh = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
      new = once(number, images, labels, targets, fresh)
      # The mean of the gradients; loss and verdict of the last draw.
      mean = total.gradient + new.gradient / num_draws
      return turn + 1, Gradients(mean, new.losses, new.broken)

    zeros = Gradients(
        jnp.zeros_like(images), jnp.zeros(labels.shape, jnp.float32),
        jnp.zeros(labels.shape, bool))
    return loops.repeat_pieces(num_draws, draw, (jnp.int32(0), zeros))[1]

  return Model(jax.jit(apply), gradients, num_classes)
