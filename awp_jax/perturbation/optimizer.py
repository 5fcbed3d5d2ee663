"""Any method as an optax transformation: only `tx` changes in the loop.

It has two modes, as `optax.contrib.sam`. Opaque: `update` receives a function
that computes further gradients, and one call makes a step. Transparent: the
loop is unchanged, and several successive gradients make a step; between them
the loop's parameters are w + v.

  >>> import jax, jax.numpy as jnp, optax
  >>> from awp_jax.perturbation import methods
  >>> grad_fn = jax.grad(lambda params: jnp.sum(params['w'] ** 2))
  >>> params = {'w': jnp.array([[6.0, 8.0]])}
  >>> tx = perturbed_optimizer(optax.sgd(0.25), methods.awp(gamma=0.5))
  >>> state = tx.init(params)
  >>> updates, state = tx.update(
  ...     grad_fn(params), state, params, grad_fn=grad_fn)
  >>> print(optax.apply_updates(params, updates)['w'])
  [[1.5 2. ]]
  >>> tx = perturbed_optimizer(
  ...     optax.sgd(0.25), methods.awp(gamma=0.5), transparent=True)
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(grad_fn(params), state, params)
  ...   params = optax.apply_updates(params, updates)
  ...   print(params['w'])
  [[ 9. 12.]]
  [[1.5 2. ]]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from awp_jax.perturbation import engine, leaves
from awp_jax.perturbation.base import Method, MethodState
from awp_jax.perturbation.engine import Ascent
from awp_jax.perturbation.leaves import Chosen
from awp_jax.types import Array, Params


class PerturbedState(NamedTuple):
  """The state of `perturbed_optimizer`.

  Attributes:
    opt_state: the state of the wrapped optimizer.
    method_state: the state of the method.
    pending: in transparent mode, the unfinished step; else None.
  """

  opt_state: Any
  method_state: MethodState
  pending: Any = None


class Pending(NamedTuple):
  """An unfinished step in transparent mode.

  Attributes:
    phase: the number of gradients received.
    weights: the perturbed leaves of w by path. The loop's parameters are w + v
      there and w elsewhere.
    ascent: the current v, the sum of gradients, and the gradient at w if the
      method needs it.
  """

  phase: Array
  weights: Chosen
  ascent: Ascent


def _valued(gradients: Params) -> Any:
  """((loss, aux), gradients) of a pass, with a placeholder loss."""
  return (jnp.float32(0), None), gradients


def _check(method: Method, noise_key: Array | None) -> None:
  if method.examples_below is not None:
    raise ValueError(
        f'method {method.name!r} needs per-example losses, which an optimizer '
        'does not get; use perturbed_step, or examples_below=None.')
  if method.natural_batch == 'other':
    raise ValueError(
        f'method {method.name!r} uses two batches; use perturbed_step.')
  engine.begin(method, MethodState(jnp.int32(0), ()), noise_key)


def _descend_updates(
    tx: optax.GradientTransformation, method: Method, opt_state: Any,
    params: Params, out: engine.Descent, extra: dict[str, Any]
) -> tuple[Params, Any]:
  """The optimizer's updates, at the parameters given by `update_at`."""
  given = params
  if method.update_at == 'perturbed':
    given = leaves.perturb(params, out.perturbation)
  return optax.with_extra_args_support(tx).update(
      out.gradients, opt_state, given, **extra)


def perturbed_optimizer(
    tx: optax.GradientTransformation, method: Method, *,
    noise_key: Array | None = None, transparent: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer in a weight perturbation method.

  Args:
    tx: any optax optimizer.
    method: the method.
    noise_key: a PRNG key for methods that draw noise, the same on all devices.
    transparent: whether several calls of `update` make a step. The first takes
      the gradient at w, the others at the parameters that the updates lead to:
      `method.num_steps` moves, then the optimizer's step. Parameters and state
      may be donated to a jitted call.

  Returns:
    A transformation whose `update` requires the parameters and passes other
    keywords to `tx`. In opaque mode, `update` takes the gradients at w and
    requires `grad_fn=`, a function params -> gradients on the same batch,
    averaged over devices; skipped steps do not call it. In transparent mode
    skipped steps take as many calls of `update` as the others.

  Raises:
    ValueError: if the method needs more than gradients of one batch.
  """
  _check(method, noise_key)

  def init(params: Params) -> PerturbedState:
    pending = _first_pending(method, params) if transparent else None
    return PerturbedState(tx.init(params), method.init(params), pending)

  def update(
      gradients: Params, state: PerturbedState, params: Params | None = None,
      *, grad_fn: Callable[[Params], Params] | None = None, **extra: Any
  ) -> tuple[Params, PerturbedState]:
    if params is None:
      raise ValueError('params must be passed to update, got None.')
    if transparent:
      return jax.lax.cond(
          state.pending.phase < method.num_steps,
          lambda: _move(method, state, gradients, params, noise_key),
          lambda: _finish(tx, method, state, gradients, params, extra))
    if grad_fn is None:
      raise ValueError(
          'grad_fn must be passed to update: params -> gradients, got None.')
    out = _opaque_descent(
        method, state.method_state, params, gradients, grad_fn, noise_key)
    updates, opt_state = _descend_updates(
        tx, method, state.opt_state, params, out, extra)
    return updates, PerturbedState(opt_state, out.state)

  return optax.GradientTransformationExtraArgs(init, update)


def _opaque_descent(
    method: Method, state: MethodState, params: Params, gradients: Params,
    grad_fn: Callable[[Params], Params], noise_key: Array | None
) -> engine.Descent:
  """A whole step, given the gradients at w."""
  at_natural = _valued(gradients)
  ascent = engine.ascend(
      method, state, engine.begin(method, state, noise_key), params,
      lambda shifted: _valued(grad_fn(shifted)), at_natural=at_natural)

  def perturbed_fn(shifted: Params) -> Any:
    if ascent.perturbation is None:  # the method is off: the pass is at w
      return at_natural
    if not method.is_scheduled:
      return _valued(grad_fn(shifted))
    return _valued(jax.lax.cond(
        method.perturbs_at(state.step), lambda: grad_fn(shifted),
        lambda: gradients))

  return engine.descend(
      method, state, ascent, params, perturbed_fn, lambda _: at_natural)


def _first_pending(method: Method, params: Params) -> Pending:
  """The initial `Pending`, in new buffers so that state can be donated."""
  chosen = method.chosen(params)

  def zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)

  wide = leaves.select(params, chosen)
  return Pending(jnp.int32(0), zeros(_narrow(wide, params)), Ascent(
      zeros(wide), zeros(wide) if method.moves == 'summed' else None,
      zeros(params) if method.uses_natural else None))


def _narrow(values: Chosen, params: Params) -> Chosen:
  """Casts values to the dtypes of the parameters."""
  dtypes = dict(zip(leaves.leaf_paths(params), (
      leaf.dtype for leaf in jax.tree.leaves(params)), strict=True))
  return {path: x.astype(dtypes[path]) for path, x in values.items()}


def _with_weights(params: Params, weights: Chosen) -> Params:
  """Returns the parameters with the leaves in `weights` replaced."""
  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, [
      weights.get(path, leaf)
      for path, leaf in zip(leaves.leaf_paths(params), flat, strict=True)])


def _move(
    method: Method, state: PerturbedState, gradients: Params, params: Params,
    noise_key: Array | None) -> tuple[Params, PerturbedState]:
  """Moves v along a gradient; the parameters become w + v."""
  pending, counted = state.pending, state.method_state
  is_first = pending.phase == 0

  def newest(new: Params, old: Params) -> Params:
    return jax.tree.map(lambda x, y: jnp.where(is_first, x, y), new, old)

  # At the first gradient the loop's parameters are w.
  chosen = method.chosen(params)
  weights = newest(
      _narrow(leaves.select(params, chosen), params), pending.weights)
  w = _with_weights(params, weights)
  natural = pending.ascent.natural
  key = engine.begin(method, counted, noise_key).key
  so_far = jax.tree.map(
      lambda x: jnp.where(is_first, 0, x),
      pending.ascent._replace(natural=None))
  moved = engine.move(
      method, so_far,
      method.direction.take(
          counted.memory, leaves.select(gradients, chosen),
          leaves.select(w, chosen), key), w, counted.step)
  if method.is_scheduled:
    active = method.perturbs_at(counted.step)
    moved = jax.tree.map(lambda x: jnp.where(active, x, 0), moved)
  updates = jax.tree.map(
      jnp.subtract, leaves.perturb(w, moved.perturbation), params)
  return updates, state._replace(pending=Pending(
      pending.phase + 1, weights, moved._replace(
          natural=None if natural is None else newest(gradients, natural))))


def _finish(
    tx: optax.GradientTransformation, method: Method, state: PerturbedState,
    gradients: Params, params: Params, extra: dict[str, Any]
) -> tuple[Params, PerturbedState]:
  """Descends the gradient at w + v; the parameters become the next w."""
  pending = state.pending
  w, ascent = _with_weights(params, pending.weights), pending.ascent
  out = engine.descend(
      method, state.method_state, ascent._replace(natural=None), w,
      lambda _: _valued(gradients), lambda _: _valued(ascent.natural))
  updates, opt_state = _descend_updates(
      tx, method, state.opt_state, w, out, extra)
  # `lax.cond` needs the dtypes of `_move`, those of the parameters.
  updates = jax.tree.map(
      lambda x, u, p: (x + u - p).astype(p.dtype), w, updates, params)
  return updates, PerturbedState(
      opt_state, out.state, pending._replace(phase=jnp.int32(0)))
