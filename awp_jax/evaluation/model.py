"""A classifier as the attacks see it: logits, and gradients of losses of them.

Both are compiled once per batch shape and shared by all attacks of an
evaluation: the loss is selected inside, by number. Its part of the gradient is
with respect to the logits only, hence next to nothing.
"""

from collections.abc import Callable, Sequence
import contextlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from awp_jax import objectives
from awp_jax.core import loops, numerics
from awp_jax.evaluation import compilation
from awp_jax.types import Array


class RandomLogitsFn(Protocol):
  """A randomised classifier: (images [B, ...], key) -> logits [B, C]."""

  def __call__(self, x: Array, key: Array, /) -> Array:
    """Maps a batch and a key to logits."""
    ...


class LogitsLoss(Protocol):
  """A loss of logits: (logits [B, C], labels [B], targets [B]) -> losses [B].

  Larger is better for the adversary. `targets` holds a wrong class per example.
  """

  def __call__(
      self, logits: Array, labels: Array, targets: Array, /) -> Array:
    """Returns the losses, one per example."""
    ...


class Gradients(NamedTuple):
  """A loss and its gradient at a batch of inputs.

  Attributes:
    gradient: of the summed losses with respect to the inputs, [B, ...], with 0
      for entries that are not finite.
    losses: [B], with -inf for NaN.
    broken: whether the inputs are misclassified, [B].
    nonfinite: whether an entry of the gradient was not finite, [B]; None means
      nowhere.
  """

  gradient: Array
  losses: Array
  broken: Array
  nonfinite: Array | None = None


class Model(NamedTuple):
  """The compiled pieces of one classifier.

  Attributes:
    logits: (images, keys) -> logits [B, C].
    gradients: (loss, images, labels, targets, keys) -> `Gradients`; `loss` is a
      name of `LOSSES` or a `LogitsLoss`, `targets` [B] is read by targeted
      losses only.
    num_classes: C.
    takes_key: whether the classifier is randomised.
    precision: of matrix products, as `jax.default_matmul_precision` takes it;
      None leaves the caller's setting.
    devices: where the batches lie; None means the default device.
  """

  logits: Callable[[Array, Array], Array]
  gradients: Callable[
      [str | LogitsLoss, Array, Array, Array, Array], Gradients]
  num_classes: int
  takes_key: bool = False
  precision: str | None = None
  devices: tuple[jax.Device, ...] | None = None


def _sorted_and_picked(
    logits: Array, labels: Array, targets: Array) -> tuple[Array, Array, Array]:
  wide = numerics.wide(logits)
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
  """Whether another class comes first, or logits are not finite, [B]."""
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  return ~finite | (jnp.argmax(logits, axis=-1) != labels)


def either(one: Array | None, other: Array | None) -> Array | None:
  """Whether one of two flags is set; None means nowhere."""
  if one is None or other is None:
    return other if one is None else one
  return one | other


def _differentiate(
    apply: Callable[[Array, Array], Array],
    branches: Sequence[Callable[..., Array]], number: Array, images: Array,
    labels: Array, targets: Array, keys: Array) -> Gradients:
  logits, pullback = jax.vjp(lambda x: apply(x, keys), images)

  def total(z: Array) -> tuple[Array, Array]:
    losses = jax.lax.switch(number, branches, z, labels, targets)
    return jnp.sum(losses), losses

  cotangent, losses = jax.grad(total, has_aux=True)(logits)
  gradient, = pullback(cotangent)
  # One NaN would stay in the iterate for the rest of the run.
  finite = jnp.isfinite(gradient)
  return Gradients(
      jnp.where(finite, gradient, 0),
      jnp.where(jnp.isnan(losses), -jnp.inf, losses),
      misclassified(logits, labels),
      ~jnp.all(finite, axis=tuple(range(1, images.ndim))))


def make_model(
    logits_fn: Callable[..., Array], num_classes: int, *,
    takes_key: bool = False, precision: str | None = None,
    devices: Sequence[jax.Device] | None = None) -> Model:
  """Compiles the pieces of a classifier.

  Args:
    logits_fn: images [B, ...] -> logits [B, C]; with `takes_key` it takes a key
      as well, and is called with one per example. Arrays that it closes over
      become arguments of the compiled programs.
    num_classes: C.
    takes_key: whether the classifier is randomised.
    precision: of matrix products; None leaves the caller's setting.
    devices: where the batches lie; None means the default device.

  Returns:
    The pieces; nothing is compiled before they are called.
  """
  logits_fn = compilation.unwrap(logits_fn)

  # Inside of the traced functions, since other threads call them too.
  def exactly() -> contextlib.AbstractContextManager[Any]:
    if precision is None:
      return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)

  def apply(images: Array, keys: Array) -> Array:
    with exactly():
      if not takes_key:
        return logits_fn(images)
      one = jax.vmap(lambda image, key: logits_fn(image[None], key)[0])
      return one(images, keys)

  def program(branches: Sequence[Callable[..., Array]]) -> Callable[..., Any]:
    def run(*arguments: Array) -> Gradients:
      with exactly():
        return _differentiate(apply, branches, *arguments)
    return compilation.constants_as_arguments(run, devices)

  named = program(_branches(num_classes))
  own: dict[LogitsLoss, Callable[..., Any]] = {}

  def gradients(
      loss: str | LogitsLoss, images: Array, labels: Array, targets: Array,
      keys: Array) -> Gradients:
    batch = images, labels, targets, keys
    if isinstance(loss, str):
      return named(jnp.int32(LOSSES.index(loss)), *batch)
    if loss not in own:
      own[loss] = program([loss])
    return own[loss](jnp.int32(0), *batch)

  return Model(
      compilation.constants_as_arguments(apply, devices), gradients, num_classes,
      takes_key, precision, tuple(devices) if devices else None)


def average_gradients(model: Model, eot_samples: int) -> Model:
  """The model with gradients averaged over draws of its randomness.

    g = 1/n sum_i grad loss(f(x; fold_in(key, i)), y)

  Args:
    model: a randomised model.
    eot_samples: n >= 1; 1 leaves the model as it is.

  Returns:
    The model; losses and verdicts of its gradients are those of the last draw.

  References:
    Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018.
  """
  if eot_samples == 1:
    return model

  def gradients(
      loss: str | LogitsLoss, images: Array, labels: Array, targets: Array,
      keys: Array) -> Gradients:

    def draw(carry: tuple[Array, Gradients]) -> tuple[Array, Any]:
      turn, total = carry
      fresh = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
      new = model.gradients(loss, images, labels, targets, fresh)
      return turn + 1, Gradients(
          total.gradient + new.gradient / eot_samples,
          new.losses.astype(jnp.float32), new.broken,
          either(total.nonfinite, new.nonfinite))

    none = jnp.zeros(labels.shape, bool)
    begin = Gradients(
        jnp.zeros_like(images), jnp.zeros(labels.shape, jnp.float32), none,
        none)
    return loops.repeat_pieces(eot_samples, draw, (jnp.int32(0), begin))[1]

  return model._replace(gradients=gradients)
