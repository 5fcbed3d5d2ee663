"""Any method as an optax transformation, for those who change only `tx`.

As `optax.contrib.sam`, in two modes. Opaque: `update` is handed a function
that gives further gradients, and a step is one call. Transparent: the loop is
left alone, and several successive gradients make a step; between them the
parameters that the loop sees are w + v.

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
    opt_state: the wrapped optimizer's.
    method_state: the method's.
    pending: in transparent mode, the step that is under way; else None.
  """

  opt_state: Any
  method_state: MethodState
  pending: Any = None


class Pending(NamedTuple):
  """A step of transparent mode that is under way.

  Attributes:
    phase: the number of gradients received so far.
    weights: the perturbed leaves of w by path; the loop sees w + v. The other
      leaves are those that the loop sees.
    ascent: v so far, the sum of gradients, and the gradient at w if the method
      needs it.
  """

  phase: Array
  weights: Chosen
  ascent: Ascent


def _valued(gradients: Params) -> Any:
  """((loss, aux), gradients) of a pass, with a loss that is never read."""
  return (jnp.float32(0), None), gradients


def _check(method: Method, noise_key: Array | None) -> None:
  if method.examples_below is not None:
    raise ValueError(
        f'method {method.name!r} looks at the losses of single examples, which '
        'an optimizer does not see; use perturbed_step, or leave them all in.')
  if method.natural_batch == 'other':
    raise ValueError(
        f'method {method.name!r} uses two batches; use perturbed_step.')
  engine.begin(method, MethodState(jnp.int32(0), ()), noise_key)


def _descend_updates(
    tx: optax.GradientTransformation, method: Method, opt_state: Any,
    params: Params, out: engine.Descent, extra: dict[str, Any]
) -> tuple[Params, Any]:
  """The optimizer's updates from w, shown what `update_at` names."""
  shown = params
  if method.update_at == 'perturbed':
    shown = leaves.perturb(params, out.perturbation)
  return optax.with_extra_args_support(tx).update(
      out.gradients, opt_state, shown, **extra)


def perturbed_optimizer(
    tx: optax.GradientTransformation, method: Method, *,
    noise_key: Array | None = None, transparent: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Wraps an optimizer in a method of weight perturbation.

  Args:
    tx: any optax optimizer.
    method: the choices.
    noise_key: for methods that draw noise, the run's key, the same on all
      devices.
    transparent: whether several calls of `update` make a step. The gradient of
      the first is taken at w, those of the others at the parameters that the
      updates lead to: `method.num_steps` moves, then the optimizer's step.
      Parameters and state may be donated to a jitted call.

  Returns:
    A transformation whose `update` needs the parameters. Other keywords are
    handed on to `tx`. In opaque mode it also
    needs `grad_fn=`, params -> gradients of the same batch, averaged over
    devices; the gradients handed in are those at w. Steps that the method
    leaves out cost no call of `grad_fn`; in transparent mode every step takes
    as many calls of `update`.

  Raises:
    ValueError: for a method that needs more than gradients of one batch.
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
      raise ValueError('params must be handed to update, got None.')
    if transparent:
      return jax.lax.cond(
          state.pending.phase < method.num_steps,
          lambda: _move(method, state, gradients, params, noise_key),
          lambda: _finish(tx, method, state, gradients, params, extra))
    if grad_fn is None:
      raise ValueError(
          'grad_fn must be handed to update: params -> gradients, got None.')
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
  """A whole step, the gradients at w being known."""
  at_natural = _valued(gradients)
  ascent = engine.ascend(
      method, state, engine.begin(method, state, noise_key), params,
      lambda shifted: _valued(grad_fn(shifted)), at_natural=at_natural)

  def perturbed_fn(shifted: Params) -> Any:
    if ascent.perturbation is None:  # switched off: the pass is at w
      return at_natural
    if not method.is_scheduled:
      return _valued(grad_fn(shifted))
    return _valued(jax.lax.cond(
        method.perturbs_at(state.step), lambda: grad_fn(shifted),
        lambda: gradients))

  return engine.descend(
      method, state, ascent, params, perturbed_fn, lambda _: at_natural)


def _first_pending(method: Method, params: Params) -> Pending:
  """No step under way, in the shapes of one and in buffers of its own."""
  chosen = method.chosen(params)

  def zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)

  wide = leaves.select(params, chosen)
  return Pending(jnp.int32(0), zeros(_narrow(wide, params)), Ascent(
      zeros(wide), zeros(wide) if method.moves == 'summed' else None,
      zeros(params) if method.uses_natural else None))


def _narrow(values: Chosen, params: Params) -> Chosen:
  """The values in the dtypes of the parameters."""
  dtypes = dict(zip(leaves.leaf_paths(params), (
      leaf.dtype for leaf in jax.tree.leaves(params)), strict=True))
  return {path: x.astype(dtypes[path]) for path, x in values.items()}


def _with_weights(params: Params, weights: Chosen) -> Params:
  """The parameters with some leaves replaced."""
  flat, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(structure, [
      weights.get(path, leaf)
      for path, leaf in zip(leaves.leaf_paths(params), flat, strict=True)])


def _move(
    method: Method, state: PerturbedState, gradients: Params, params: Params,
    noise_key: Array | None) -> tuple[Params, PerturbedState]:
  """A gradient that moves v: the parameters become w + the next v."""
  pending, counted = state.pending, state.method_state
  is_first = pending.phase == 0

  def newest(new: Params, old: Params) -> Params:
    return jax.tree.map(lambda x, y: jnp.where(is_first, x, y), new, old)

  # At the first of the gradients the loop's parameters are w itself.
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
  """The gradient at w + v: the parameters become the next w."""
  pending = state.pending
  w, ascent = _with_weights(params, pending.weights), pending.ascent
  out = engine.descend(
      method, state.method_state, ascent._replace(natural=None), w,
      lambda _: _valued(gradients), lambda _: _valued(ascent.natural))
  updates, opt_state = _descend_updates(
      tx, method, state.opt_state, w, out, extra)
  # In the type of the parameters, as those of `_move` are.
  updates = jax.tree.map(
      lambda x, u, p: (x + u - p).astype(p.dtype), w, updates, params)
  return updates, PerturbedState(
      opt_state, out.state, pending._replace(phase=jnp.int32(0)))
