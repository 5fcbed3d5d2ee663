"""The training state, and the forward pass of its model.

A `TrainState` holds a flax.linen model as its `apply_fn`, or any other model as
a `forward_fn` of five arguments:

  >>> import jax, jax.numpy as jnp, optax
  >>> def forward_fn(params, batch_stats, x, train, key):
  ...   return x @ params['kernel'], batch_stats
  >>> state = TrainState.create(
  ...     forward_fn=forward_fn, params={'kernel': jnp.ones((2, 3))},
  ...     tx=optax.sgd(0.1))
  >>> logits, _ = forward(
  ...     state, state.params, state.batch_stats, jnp.ones((1, 2)), train=False)
  >>> print(logits)
  [[2. 2. 2.]]
"""

from collections.abc import Callable
from typing import Any, cast

from flax import struct
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

from awp_jax.perturbation import leaves
from awp_jax.perturbation.base import Method
from awp_jax.training import averaging
from awp_jax.types import Array, ForwardFn, Params


class TrainState(train_state.TrainState):
  """Flax's `TrainState` with running statistics, for any model.

  Attributes:
    batch_stats: the running statistics: the 'batch_stats' collection of a linen
      model, any pytree of arrays with a `forward_fn`; {} for none.
    average: an `awp_jax.Average` that the caller updates, or None. Steps return
      it unchanged.
    memory: the memory of the weight perturbation method,
      `method.init(params).memory`; () for methods without one. The method's
      step count is `step`.
    forward_fn: a `ForwardFn`, or None for a linen model. Static: a jitted step
      recompiles for each new function object, so create it once.
  """

  batch_stats: Any
  average: averaging.Average | None = None
  memory: Any = ()
  forward_fn: ForwardFn | None = struct.field(pytree_node=False, default=None)

  @classmethod
  def create(  # type: ignore[override]
      cls, *, params: Params, tx: optax.GradientTransformation,
      apply_fn: Callable[..., Any] | None = None, batch_stats: Any = None,
      method: Method | None = None, forward_fn: ForwardFn | None = None,
      **fields: Any) -> 'TrainState':
    """Creates the state before the first step.

    Args:
      params: w, any pytree of float arrays.
      tx: any optax optimizer.
      apply_fn: `model.apply` of a linen model whose `__call__` takes
        `(x, train)`. Not needed with a `forward_fn`.
      batch_stats: the running statistics; None or {} for none.
      method: the weight perturbation method of `train_step`. Required for
        methods with a memory.
      forward_fn: the model as a function; replaces `apply_fn`.
      **fields: other fields: `average`, `memory`, or those of a subclass.

    Returns:
      The state; its step is 0.

    Raises:
      ValueError: if there is no model, or if both `method` and `memory` are
        given.
    """
    if apply_fn is None and forward_fn is None:
      raise ValueError(
          'TrainState.create needs the model: apply_fn=model.apply of a linen '
          'module, or forward_fn=(params, batch_stats, x, train, key) -> '
          '(logits, batch_stats). Both are None.')
    if method is not None:
      if 'memory' in fields:
        raise ValueError(
            'method and memory were both given; the memory is made from the '
            'method.')
      fields['memory'] = method.init(params).memory
    return cls(
        step=0, apply_fn=cast(Any, apply_fn), params=params, tx=tx,
        opt_state=tx.init(params),
        batch_stats={} if batch_stats is None else batch_stats,
        forward_fn=forward_fn, **fields)


def _linen_forward(apply_fn: Callable[..., Any]) -> ForwardFn:
  """A linen model's `apply` as a `ForwardFn`."""

  def forward_fn(
      params: Params, batch_stats: Any, x: Array, train: bool,
      key: Array | None) -> tuple[Array, Any]:
    variables = {'params': params, 'batch_stats': batch_stats}
    try:
      if not train:
        return apply_fn(variables, x, train=False), batch_stats
      logits, moved = apply_fn(
          variables, x, train=True, mutable=['batch_stats'],
          rngs=None if key is None else {'dropout': key})
    except TypeError as error:
      if "unexpected keyword argument 'train'" not in str(error):
        raise
      raise TypeError(
          'the model takes no argument `train`. A linen module is called as '
          'module(x, train=True or False); for any other model, pass '
          'TrainState.create a forward_fn=(params, batch_stats, x, train, key) '
          '-> (logits, batch_stats).') from error
    return logits, moved.get('batch_stats', batch_stats)

  return forward_fn


def forward(
    state: TrainState, params: Params, batch_stats: Any, images: Array, *,
    train: bool, key: Array | None = None) -> tuple[Array, Any]:
  """Computes logits, and the running statistics after the pass.

  Args:
    state: the state with the model.
    params: the parameters of the pass.
    batch_stats: the running statistics before the pass.
    images: [B, ...].
    train: whether the model runs in train mode. In eval mode it gets no key,
      and the statistics are returned unchanged.
    key: a PRNG key for dropout in train mode.

  Returns:
    Logits [B, C] and the statistics.

  Raises:
    TypeError: if the model does not take these arguments, or its forward
      function does not return a pair.
    ValueError: if the logits have the wrong shape, or the structure of the
      statistics differs from that of the state.
  """
  forward_fn = state.forward_fn or _linen_forward(state.apply_fn)
  out = forward_fn(
      params, batch_stats, images, train, key if train else None)
  if not isinstance(out, tuple) or len(out) != 2:
    raise TypeError(
        'forward_fn must return the pair (logits, batch_stats), got '
        f'{type(out).__name__}.')
  logits, moved = out
  if jnp.ndim(logits) != 2 or len(logits) != len(images):
    raise ValueError(
        f'the model must return logits [B, C] for a batch of {len(images)} '
        f'images, got shape {jnp.shape(logits)}.')
  if not train:
    return logits, batch_stats
  expected, got = leaves.leaf_paths(batch_stats), leaves.leaf_paths(moved)
  if got != expected:
    raise ValueError(
        "the model's statistics do not match the state's batch_stats: it holds "
        f'{expected}, the model returned {got}.')
  # Keep the dtypes, so loops can carry the statistics and steps not recompile.
  return logits, jax.tree.unflatten(jax.tree.structure(batch_stats), [
      jnp.asarray(new).astype(jnp.result_type(old)) for new, old in zip(
          jax.tree.leaves(moved), jax.tree.leaves(batch_stats), strict=True)])


def check_memory(state: TrainState, method: Method) -> None:
  """Raises ValueError unless the state's memory matches the method."""

  def spec(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [
        jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]

  expected = jax.eval_shape(method.init, state.params).memory
  if spec(state.memory) != spec(expected):
    raise ValueError(
        f'the memory of the state ({len(jax.tree.leaves(state.memory))} '
        f'arrays) does not match method {method.name!r}, which needs '
        f'{len(jax.tree.leaves(expected))} for these parameters. Create the '
        'state with TrainState.create(..., method=...), and pass train_step '
        'the same method.')
