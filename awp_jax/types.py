"""Names for what the library passes around, and the callbacks' contracts."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax

Array = jax.Array

#: A number, or a traced or device scalar.
Scalar = chex.Numeric

#: A pytree of arrays: a linen dict, an `nnx.State`, an Equinox module, a dict.
Params = Any

#: Decides, from the slash-separated path of a leaf and the leaf, whether the
#: leaf is perturbed.
LeafPredicate = Callable[[str, Array], bool]


class LossFn(Protocol):
  """A loss of parameters, as `jax.value_and_grad` takes it.

  `loss_fn(params, *args, **kwargs)` returns a scalar: the mean over the
  examples that `args` hold on this device. With `has_aux=True` it returns a
  pair of that scalar and any pytree.
  """

  def __call__(self, params: Params, /, *args: Any, **kwargs: Any) -> Any:
    """The loss, and aux if the caller asked for it."""
    ...


class InputLossFn(Protocol):
  """A loss of inputs, one value per example.

  `loss_fn(x)` maps inputs [B, ...] to losses [B]; entry i must be the loss of
  example i. (A model in train mode couples the examples through its batch
  statistics. That is allowed: the gradient taken is that of the sum.)
  """

  def __call__(self, x: Array, /) -> Array:
    """Losses [B]."""
    ...


class StatefulInputLossFn(Protocol):
  """An `InputLossFn` that carries a state, say running batch statistics.

  `loss_fn(x, state)` returns the losses [B] and the next state.
  """

  def __call__(self, x: Array, state: Any, /) -> tuple[Array, Any]:
    """Losses [B] and the next state."""
    ...


class LogitsFn(Protocol):
  """A classifier: maps inputs [B, ...] to logits [B, C]."""

  def __call__(self, x: Array, /) -> Array:
    """Logits [B, C]."""
    ...


class ForwardFn(Protocol):
  """A model as `train_step` and `eval_step` call it.

  `forward_fn(params, batch_stats, x, train, key)` returns logits [B, C] and the
  running statistics after the pass, a pytree of the structure and shapes of
  `batch_stats`, to whose dtypes it is cast; a model without statistics returns
  what it was given.

  `train` is a Python bool: True for batch statistics and dropout. `key` is a
  PRNG key for dropout in train mode and None in eval mode. Every pass of a step
  over the weights gets the same key, so the ascent and the descent draw the
  same masks. The function must be pure, and `x` is in the box of the threat
  model: the model normalizes inside.

  For flax.nnx and Equinox see `examples/train_step_nnx.py` and
  `examples/train_step_equinox.py`.
  """

  def __call__(
      self, params: Params, batch_stats: Any, x: Array, train: bool,
      key: Array | None, /) -> tuple[Array, Any]:
    """Logits [B, C] and the next statistics."""
    ...


class AWPOutput(NamedTuple):
  """What one step of adversarial weight perturbation returns.

  Attributes:
    params: the parameters after the update, without the perturbation.
    opt_state: the optimizer's next state.
    loss: scalar, the loss at w + v before the update, averaged over devices.
    aux: what the loss returned beside its value at w + v, or None.
    perturbation: v, a pytree like `params`, zeros on leaves left alone; None if
      it was not asked for.
  """

  params: Params
  opt_state: Any
  loss: Array
  aux: Any
  perturbation: Params | None


class PerturbedOutput(NamedTuple):
  """What one step with any method of weight perturbation returns.

  Attributes:
    params: the parameters after the update, without the perturbation.
    opt_state: the optimizer's next state.
    method_state: the method's next state.
    loss: scalar, a L(w) + b L(w + v) before the update, averaged over devices.
    aux: what the loss returned beside its value, or None.
    perturbation: v, a pytree like `params`, zeros on leaves left alone; None if
      it was not asked for.
    unperturbed_loss: scalar, L(w) on the batch of the pass at w + v, if the
      method evaluated it on all examples; else NaN. It costs no pass of its
      own.
  """

  params: Params
  opt_state: Any
  method_state: Any
  loss: Array
  aux: Any
  perturbation: Params | None
  unperturbed_loss: Array
