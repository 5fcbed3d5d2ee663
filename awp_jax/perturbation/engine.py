"""The engine: runs any `Method` of weight perturbation.

A step is three calls: `begin`, `ascend` one or more times, and `descend`. A
loop can act between them, e.g. attack the inputs at w + v.

  >>> import jax.numpy as jnp
  >>> from awp_jax.perturbation.balls import Ball
  >>> from awp_jax.perturbation.value_and_grad import gradient_fns
  >>> method = Method('AWP', Ball(0.1))
  >>> params = {'w': jnp.array([[3.0, 4.0]])}
  >>> ascent_fn, descent_fn = gradient_fns(
  ...     method, lambda p: jnp.sum(p['w'] ** 2))
  >>> state = method.init(params)
  >>> ascent = ascend(method, state, begin(method, state), params, ascent_fn)
  >>> print(ascent.perturbation['w'])
  [[0.3 0.4]]
  >>> out = descend(method, state, ascent, params, descent_fn)
  >>> print(out.loss, out.gradients['w'], out.state.step)
  30.25 [[6.6 8.8]] 1

A method of size 0 (the Python number) and the steps skipped by `start` and
`every` give the plain gradient at w, bit for bit, at no extra cost. Skipped
steps take the other branch of a `lax.cond`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from awp_jax.core import checks, loops, sharding
from awp_jax.perturbation import balls, leaves
from awp_jax.perturbation.balls import Ball
from awp_jax.perturbation.base import Method, MethodState
from awp_jax.perturbation.leaves import Chosen
from awp_jax.types import Array, Params

#: A pass: params -> ((mean loss, aux), gradients).
PassFn = Callable[[Params], tuple[tuple[Array, Any], Params]]


class Ascent(NamedTuple):
  """The state of the ascent between moves.

  Attributes:
    perturbation: the current v, perturbed leaves by path; None for zero.
    total: the sum of gradients by path, if moves are summed.
    natural: ((loss, aux), gradients) at w, if the ascent evaluated them and the
      method needs them; else None.
    key: the PRNG key of the noise; else None.
    unperturbed_loss: L(w), if the ascent evaluated it on all examples; else
      None.
  """

  perturbation: Chosen | None = None
  total: Chosen | None = None
  natural: Any = None
  key: Array | None = None
  unperturbed_loss: Array | None = None


class Descent(NamedTuple):
  """Loss and gradients for the optimizer, and the method's next state.

  Attributes:
    loss: a L(w) + b L(w + v).
    aux: the aux of the pass given by `aux_at`.
    gradients: the gradients of `loss`, a pytree like the parameters.
    perturbation: v, the perturbed leaves by path; None for zero.
    state: the method's next state.
    unperturbed_loss: L(w) on the batch of the pass at w + v, if the method
      evaluated it; else NaN.
  """

  loss: Array
  aux: Any
  gradients: Params
  perturbation: Chosen | None
  state: MethodState
  unperturbed_loss: Array


def begin(
    method: Method, state: MethodState, noise_key: Array | None = None
) -> Ascent:
  """The state of the ascent before the first move, v = 0.

  Args:
    method: the method.
    state: the method's state.
    noise_key: a PRNG key, required if the direction is noise. The step count is
      folded in, so the key may be the same in every step. It must be the same
      on all devices, so that v is.

  Returns:
    The initial state.

  Raises:
    ValueError: if the direction is noise and `noise_key` is None.
  """
  if method.direction.source != 'noise':
    return Ascent()
  if noise_key is None:
    raise ValueError(
        f'method {method.name!r} draws noise: noise_key must be a PRNG key, '
        'the same on all devices, got None.')
  return Ascent(key=jax.random.fold_in(noise_key, state.step))


def _stretched(ball: Ball, params: Params) -> frozenset[str]:
  """The paths that t stretches; empty unless the scale is 'adaptive'."""
  if ball.scale != 'adaptive':
    return frozenset()
  mask = leaves.is_no_bias if ball.stretched is None else ball.stretched
  flags = jax.tree.leaves(leaves.weight_mask(params, mask))
  return frozenset(path for path, flag in zip(
      leaves.leaf_paths(params), flags, strict=True) if flag)


def _sum(a: Chosen, b: Chosen) -> Chosen:
  return {path: x + b[path] for path, x in a.items()}


def move(
    method: Method, ascent: Ascent, direction: Chosen, params: Params,
    step: Array, rounds: int = 1) -> Ascent:
  """Moves v once along a direction.

  Args:
    method: the method.
    ascent: the current v.
    direction: d, the perturbed leaves by path, e.g.
      `leaves.select(gradients, method.chosen(params))`.
    params: w, the whole pytree.
    step: the step count, for sizes that depend on it.
    rounds: the number of rounds of moves; divides the length of each move.

  Returns:
    The next v. Groups with zero direction or zero weights do not move.
  """
  ball, box = method.ball, method.box or method.ball
  w, d = leaves.select(params, method.chosen(params)), direction
  size, stretched = ball.size_at(step), _stretched(ball, params)
  v, total = ascent.perturbation, ascent.total
  # The first move always ends in the ball, and noise is not projected.
  adds = (v is not None and method.moves == 'projected'
          and method.direction.source != 'noise')
  if method.direction.source == 'noise':
    scale = balls.lengths(ball, w, stretched)
    moved = {path: size * scale[path] * z for path, z in d.items()}
  elif method.moves == 'summed':
    total = d if total is None else _sum(total, d)
    moved = balls.linear_maximizer(ball, total, w, size, stretched)
  else:
    length = size if method.box else size / (method.num_steps * rounds)
    moved = balls.linear_maximizer(ball, d, w, length, stretched)
    moved = moved if v is None else _sum(v, moved)
  if method.box or adds:
    moved = balls.project(
        box, moved, w, box.size_at(step), _stretched(box, params))
  # In 64-bit mode a schedule may return float64, wider than the weights.
  moved = {path: x.astype(d[path].dtype) for path, x in moved.items()}
  return ascent._replace(perturbation=moved, total=total)


def _natural(method: Method, value: Any, gradient: Params) -> Any:
  """((loss, aux), gradients) at w, dropping an unused aux."""
  loss, aux = value
  return (loss, aux if method.aux_at == 'natural' else None), gradient


def _moves(
    method: Method, state: MethodState, ascent: Ascent, params: Params,
    gradient_fn: PassFn, rounds: int, at_natural: Any) -> Ascent:
  """All moves of one call to `ascend`."""
  chosen = method.chosen(params)
  w, take = leaves.select(params, chosen), method.direction.take
  if method.direction.source != 'gradient':
    return move(method, ascent, take(state.memory, None, w, ascent.key), params,
                state.step)
  # Only the first pass is at w. Methods that mix L(w) in reuse it.
  at_w = ascent.perturbation is None
  is_whole = method.examples_below is None
  shares = (rounds == 1 and method.uses_natural and is_whole
            and method.natural_batch == 'same')

  def moved(ascent: Ascent, gradient: Params) -> Ascent:
    direction = take(state.memory, leaves.select(gradient, chosen), w, None)
    return move(method, ascent, direction, params, state.step, rounds)

  def body(ascent: Ascent) -> Ascent:
    _, gradient = gradient_fn(leaves.perturb(params, ascent.perturbation))
    return moved(ascent, gradient)

  if not at_w:
    return loops.repeat(method.num_steps, body, ascent)
  value, gradient = at_natural or gradient_fn(params)
  ascent = moved(ascent, gradient)._replace(
      unperturbed_loss=value[0] if is_whole else None,
      natural=_natural(method, value, gradient) if shares else None)
  return loops.repeat(method.num_steps - 1, body, ascent)


def _when(
    method: Method, state: MethodState, make: Callable[[], Any]) -> Any:
  """`make()` in perturbing steps, zeros in skipped ones."""
  if not method.is_scheduled:
    return make()
  return jax.lax.cond(
      method.perturbs_at(state.step), make,
      lambda: sharding.zeros(jax.eval_shape(make)))


def ascend(
    method: Method, state: MethodState, ascent: Ascent, params: Params,
    gradient_fn: PassFn, rounds: int = 1, at_natural: Any = None) -> Ascent:
  """Runs the moves of v.

  Args:
    method: the method.
    state: the method's state.
    ascent: from `begin`, or from the previous round.
    params: w.
    gradient_fn: params -> ((loss, aux), gradients), averaged over devices; the
      first of `value_and_grad.gradient_fns`. Called only if the direction is
      the gradient.
    rounds: the number of calls of this function per step, e.g. with inputs
      attacked at the previous v. Divides the length of the moves.
    at_natural: the output of `gradient_fn(params)` if already known; saves the
      first pass.

  Returns:
    The next v. In skipped steps v is zero and no pass runs.

  Raises:
    ValueError: if `rounds` > 1 and the direction is not the gradient.
  """
  checks.count('rounds', rounds)
  if rounds > 1 and method.direction.source != 'gradient':
    raise ValueError(
        f'rounds={rounds} need a gradient, but method {method.name!r} follows '
        f'{method.direction.name}. rounds must be 1.')
  if method.is_off:
    return ascent
  return _when(method, state, lambda: _moves(
      method, state, ascent, params, gradient_fn, rounds, at_natural
  )._replace(key=None))


def descend(
    method: Method, state: MethodState, ascent: Ascent, params: Params,
    perturbed_fn: PassFn, natural_fn: PassFn | None = None) -> Descent:
  """Computes the loss and gradients that the optimizer descends.

  Args:
    method: the method.
    state: the method's state.
    ascent: v, from `ascend`.
    params: w.
    perturbed_fn: params -> ((loss, aux), gradients), the second of
      `value_and_grad.gradient_fns`; called at w + v.
    natural_fn: the same on the batch of the pass at w; `perturbed_fn` by
      default. Called only if the method needs this pass and the ascent did not
      run it.

  Returns:
    Loss and gradients, and the method's next state.

  Raises:
    ValueError: if the method needs another batch and `natural_fn` is None.
  """
  if method.natural_batch == 'other' and natural_fn is None:
    raise ValueError(
        f'method {method.name!r} takes the gradient at w on another batch: '
        'natural_args (natural_fn in descend) must be given, got None.')
  v = ascent.perturbation
  (loss, aux), gradient = perturbed_fn(leaves.perturb(params, v))
  mixed, descended = loss, gradient
  clean = loss if v is None else ascent.unperturbed_loss
  active = method.perturbs_at(state.step)
  if method.uses_natural and not method.is_off:
    natural = None if natural_fn else ascent.natural
    if natural is None:
      at_natural = natural_fn or perturbed_fn
      natural = _when(method, state, lambda: _natural(
          method, *at_natural(params)))
    if clean is None and natural_fn is None:
      clean = natural[0][0]
    a, b = method.mix
    if method.is_scheduled:
      a, b = jnp.where(active, a, 0), jnp.where(active, b, 1)
    mixed = a * natural[0][0] + b * loss
    descended = jax.tree.map(
        lambda n, p: (a * n + b * p).astype(p.dtype), natural[1], gradient)
    if method.aux_at == 'natural':
      aux = natural[0][1] if not method.is_scheduled else jax.tree.map(
          lambda n, p: jnp.where(active, n, p), natural[0][1], aux)
  if clean is None:
    # Not known. A NaN would end every step under `jax_debug_nans`.
    clean = jnp.full_like(loss, jnp.inf)
  if method.is_scheduled:
    # A skipped step evaluates L(w) in its only pass.
    clean = jnp.where(active, clean, loss)
  return Descent(
      mixed, aux, descended, v,
      MethodState(state.step + 1, _observe(method, state, params, gradient,
                                           descended)), clean)


def _observe(
    method: Method, state: MethodState, params: Params, perturbed: Params,
    descended: Params) -> Any:
  """The next memory of the direction."""
  chosen = method.chosen(params)
  return method.direction.observe(
      state.memory, leaves.select(perturbed, chosen),
      leaves.select(descended, chosen))
