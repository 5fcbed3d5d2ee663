"""The classifier that attacks evaluate: logits, and gradients of their losses.

Both are compiled once per batch shape and shared by all attacks of an
evaluation. The compiled gradient selects the loss by its index. This is cheap:
only the gradient with respect to the logits differs between losses.
"""

from collections.abc import Callable, Sequence
import contextlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from awp_jax import objectives
from awp_jax.core import loops
from awp_jax.evaluation import losses
from awp_jax.evaluation.engine import compilation
from awp_jax.evaluation.losses import LogitsLoss
from awp_jax.types import Array


class RandomLogitsFn(Protocol):
  """A randomized classifier: (images [B, ...], key) -> logits [B, C]."""

  def __call__(self, x: Array, key: Array, /) -> Array:
    """Maps a batch and a key to logits."""
    ...


class Gradients(NamedTuple):
  """A loss and its gradient at a batch of inputs.

  Attributes:
    gradient: of the summed losses with respect to the inputs, [B, ...], with 0
      for entries that are not finite.
    losses: [B], with -inf for NaN.
    broken: whether the inputs are misclassified, [B].
    nonfinite: whether an entry of the gradient was not finite, [B]; None means
      False for all.
    margin: of the inputs, [B], as `margins`; None if not known.
  """

  gradient: Array
  losses: Array
  broken: Array
  nonfinite: Array | None = None
  margin: Array | None = None


class Model(NamedTuple):
  """The compiled functions of one classifier.

  Attributes:
    logits: (images, keys) -> logits [B, C].
    gradients: (loss, images, labels, targets, keys) -> `Gradients`; `loss` is a
      name of `LOSSES` or a `LogitsLoss`; only targeted losses read `targets`
      [B].
    num_classes: C.
    takes_key: whether the classifier is randomized.
    precision: of matrix products, as in `jax.default_matmul_precision`; None
      keeps the caller's setting.
    devices: devices of the batches; None means the default device.
  """

  logits: Callable[[Array, Array], Array]
  gradients: Callable[
      [str | LogitsLoss, Array, Array, Array, Array], Gradients]
  num_classes: int
  takes_key: bool = False
  precision: str | None = None
  devices: tuple[jax.Device, ...] | None = None


def misclassified(logits: Array, labels: Array) -> Array:
  """Whether the top class is wrong or a logit is not finite, [B]."""
  return ~objectives.is_correct(logits, labels)


def margins(logits: Array, labels: Array) -> Array:
  """How far inputs are misclassified, max_{k != y} z_k - z_y, [B].

  Positive only if `misclassified`; 0 if a logit is not finite.
  """
  finite = jnp.all(jnp.isfinite(logits), axis=-1)
  margin = objectives.cw_margin(logits, labels).astype(jnp.float32)
  return jnp.where(finite, margin, 0)


def either(one: Array | None, other: Array | None) -> Array | None:
  """Elementwise or of two flags; None means False everywhere."""
  if one is None or other is None:
    return other if one is None else one
  return one | other


def make_gradients(
    gradient: Array, values: Array, logits: Array, labels: Array) -> Gradients:
  """The `Gradients` of losses [B], whose entries may not be finite."""
  # A NaN would stay in the iterate until the end of the run.
  finite = jnp.isfinite(gradient)
  return Gradients(
      jnp.where(finite, gradient, 0),
      jnp.where(jnp.isnan(values), -jnp.inf, values),
      misclassified(logits, labels),
      ~jnp.all(finite, axis=tuple(range(1, gradient.ndim))),
      margins(logits, labels))


def _differentiate(
    apply: Callable[[Array, Array], Array],
    functions: Sequence[Callable[..., Array]], index: Array, images: Array,
    labels: Array, targets: Array, keys: Array) -> Gradients:
  logits, pullback = jax.vjp(lambda x: apply(x, keys), images)

  def total(z: Array) -> tuple[Array, Array]:
    values = jax.lax.switch(index, functions, z, labels, targets)
    return jnp.sum(values), values

  cotangent, values = jax.grad(total, has_aux=True)(logits)
  gradient, = pullback(cotangent)
  return make_gradients(gradient, values, logits, labels)


def in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
  """The classifier with float32 logits."""
  inner = compilation.unwrap(function)
  return lambda *args: inner(*args).astype(jnp.float32)


def make_model(
    logits_fn: Callable[..., Array], num_classes: int, *,
    takes_key: bool = False, precision: str | None = None,
    devices: Sequence[jax.Device] | None = None) -> Model:
  """Makes the compiled functions of a classifier.

  Args:
    logits_fn: images [B, ...] -> logits [B, C]; with `takes_key`, (images, key)
      -> logits, called with one key per example. Arrays that it closes over
      become arguments of the compiled programs.
    num_classes: C.
    takes_key: whether the classifier is randomized.
    precision: of matrix products; None keeps the caller's setting.
    devices: devices of the batches; None means the default device.

  Returns:
    The model; each function compiles at its first call.
  """
  logits_fn = compilation.unwrap(logits_fn)

  # Set inside the traced functions, because other threads call them too.
  def at_precision() -> contextlib.AbstractContextManager[Any]:
    if precision is None:
      return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)

  def apply(images: Array, keys: Array) -> Array:
    with at_precision():
      if not takes_key:
        return logits_fn(images)
      one = jax.vmap(lambda image, key: logits_fn(image[None], key)[0])
      return one(images, keys)

  def program(functions: Sequence[Callable[..., Array]]) -> Callable[..., Any]:
    def run(*arguments: Array) -> Gradients:
      with at_precision():
        return _differentiate(apply, functions, *arguments)
    return compilation.constants_as_arguments(run, devices)

  named = program(losses.loss_functions(num_classes))
  custom: dict[LogitsLoss, Callable[..., Any]] = {}

  def gradients(
      loss: str | LogitsLoss, images: Array, labels: Array, targets: Array,
      keys: Array) -> Gradients:
    batch = images, labels, targets, keys
    if isinstance(loss, str):
      return named(jnp.int32(losses.LOSSES.index(loss)), *batch)
    if loss not in custom:
      custom[loss] = program([loss])
    return custom[loss](jnp.int32(0), *batch)

  return Model(
      compilation.constants_as_arguments(apply, devices), gradients,
      num_classes, takes_key, precision, tuple(devices) if devices else None)


def average_gradients(model: Model, eot_samples: int) -> Model:
  """The model with gradients averaged over draws of its randomness.

    g = 1/n sum_i grad loss(f(x; fold_in(key, i)), y)

  Args:
    model: a randomized model.
    eot_samples: n >= 1; 1 returns the model unchanged.

  Returns:
    The model. `losses` and `broken` of its gradients are from the last draw.

  References:
    Athalye et al., Synthesizing Robust Adversarial Examples, ICML 2018.
  """
  if eot_samples == 1:
    return model

  # The host may run the loop below, so what is done in each draw is compiled.
  fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))

  @jax.jit
  def add(total: Gradients, new: Gradients) -> Gradients:
    return Gradients(
        total.gradient + new.gradient / eot_samples,
        new.losses.astype(jnp.float32), new.broken,
        either(total.nonfinite, new.nonfinite))

  def gradients(
      loss: str | LogitsLoss, images: Array, labels: Array, targets: Array,
      keys: Array) -> Gradients:

    def draw(carry: tuple[Array, Gradients]) -> tuple[Array, Any]:
      turn, total = carry
      new = model.gradients(loss, images, labels, targets, fold(keys, turn))
      return turn + 1, add(total, new)

    none = jnp.zeros(labels.shape, bool)
    begin = Gradients(
        jnp.zeros_like(images), jnp.zeros(labels.shape, jnp.float32), none,
        none)
    return loops.repeat_pieces(eot_samples, draw, (jnp.int32(0), begin))[1]

  return model._replace(gradients=gradients)
