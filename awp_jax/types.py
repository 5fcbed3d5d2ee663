"""Type aliases, callback protocols and the outputs of steps."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax

Array = jax.Array

#: A number, or a traced or device scalar.
Scalar = chex.Numeric

#: A pytree of arrays: a linen dict, an `nnx.State`, an Equinox module, a dict.
Params = Any

#: Maps the slash-separated path of a leaf and the leaf to whether the leaf is
#: perturbed.
LeafPredicate = Callable[[str, Array], bool]


class LossFn(Protocol):
  """A loss of the parameters, as for `jax.value_and_grad`.

  `loss_fn(params, *args, **kwargs)` returns a scalar, the mean over this
  device's examples in `args`. With `has_aux=True` it returns a pair of that
  scalar and any pytree.
  """

  def __call__(self, params: Params, /, *args: Any, **kwargs: Any) -> Any:
    """Returns the loss, or (loss, aux)."""
    ...


class InputLossFn(Protocol):
  """A per-example loss of the inputs.

  `loss_fn(x)` maps inputs [B, ...] to losses [B]; entry i is the loss of
  example i. (A model in train mode couples the examples through its batch
  statistics. This is allowed: attacks differentiate the sum of the losses.)
  """

  def __call__(self, x: Array, /) -> Array:
    """Returns losses [B]."""
    ...


class StatefulInputLossFn(Protocol):
  """An `InputLossFn` with a state, such as running batch statistics.

  `loss_fn(x, state)` returns the losses [B] and the next state.
  """

  def __call__(self, x: Array, state: Any, /) -> tuple[Array, Any]:
    """Returns losses [B] and the next state."""
    ...


class LogitsFn(Protocol):
  """A classifier: maps inputs [B, ...] to logits [B, C]."""

  def __call__(self, x: Array, /) -> Array:
    """Returns logits [B, C]."""
    ...


class ForwardFn(Protocol):
  """The forward function of a model for `train_step` and `eval_step`.

  `forward_fn(params, batch_stats, x, train, key)` returns logits [B, C] and the
  running statistics after the pass. The statistics must have the structure and
  shapes of `batch_stats` and are cast to its dtypes. A model without statistics
  returns `batch_stats` unchanged.

  `train` is a Python bool: True for batch statistics and dropout. `key` is a
  PRNG key for dropout in train mode and None in eval mode. All weight passes of
  a step get the same key, so ascent and descent use the same dropout masks. The
  function must be pure. `x` lies in the box of the threat model; normalize it
  inside the function.

  For flax.nnx and Equinox see `examples/train_step_nnx.py` and
  `examples/train_step_equinox.py`.
  """

  def __call__(
      self, params: Params, batch_stats: Any, x: Array, train: bool,
      key: Array | None, /) -> tuple[Array, Any]:
    """Returns logits [B, C] and the next statistics."""
    ...


class AWPOutput(NamedTuple):
  """Output of one step of adversarial weight perturbation.

  Attributes:
    params: the parameters after the update, without the perturbation.
    opt_state: the optimizer's next state.
    loss: scalar, the loss at w + v before the update, averaged over devices.
    aux: the auxiliary output of the loss at w + v, or None.
    perturbation: v, a pytree like `params`, zero on unperturbed leaves; None if
      not requested.
  """

  params: Params
  opt_state: Any
  loss: Array
  aux: Any
  perturbation: Params | None


class PerturbedOutput(NamedTuple):
  """Output of one step with any weight perturbation method.

  Attributes:
    params: the parameters after the update, without the perturbation.
    opt_state: the optimizer's next state.
    method_state: the method's next state.
    loss: scalar, a L(w) + b L(w + v) before the update, averaged over devices.
    aux: the auxiliary output of the loss, or None.
    perturbation: v, a pytree like `params`, zero on unperturbed leaves; None if
      not requested.
    unperturbed_loss: scalar, L(w) on the batch of the pass at w + v, if the
      method evaluated it on all examples; else infinity. It costs no extra
      pass.
  """

  params: Params
  opt_state: Any
  method_state: Any
  loss: Array
  aux: Any
  perturbation: Params | None
  unperturbed_loss: Array
