"""One engine for AWP and its relatives, on the choices of a `Method`.

A step is three calls, so that a loop can do something in between (attack the
inputs at w + v, say): `begin`, `ascend` as often as wanted, `descend`.

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

Switched off (by the number 0 as size, or in steps that `start` and `every`
leave out) a method is the plain gradient at w, bit for bit, and costs no
more: the steps left out take the other branch of a `lax.cond`.
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
    perturbation: v so far, the perturbed leaves by path; None for zero.
    total: the sum of gradients, likewise, where moves are summed.
    natural: ((loss, aux), gradients) at w, if the ascent evaluated them and the
      method needs them; else None.
    key: for noise; else None.
    unperturbed_loss: L(w), if the ascent evaluated it on all examples; else
      None.
  """

  perturbation: Chosen | None = None
  total: Chosen | None = None
  natural: Any = None
  key: Array | None = None
  unperturbed_loss: Array | None = None


class Descent(NamedTuple):
  """What a method hands to the optimizer.

  Attributes:
    loss: a L(w) + b L(w + v).
    aux: of the pass that `aux_at` names.
    gradients: of that loss, a pytree like the parameters.
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
  """The perturbation before its first move.

  Args:
    method: the choices.
    state: the method's state.
    noise_key: a PRNG key, needed where the direction is noise. The step count
      is folded in here, so the same key serves every step. It must be the same
      on all devices: then so is v.

  Returns:
    v = 0.

  Raises:
    ValueError: if the direction is noise and there is no key.
  """
  if method.direction.source != 'noise':
    return Ascent()
  if noise_key is None:
    raise ValueError(
        f'method {method.name!r} draws noise: noise_key must be a PRNG key, '
        'the same on all devices, got None.')
  return Ascent(key=jax.random.fold_in(noise_key, state.step))


def _stretched(ball: Ball, params: Params) -> frozenset[str]:
  """The paths that t stretches; read only where the scale is 'adaptive'."""
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
  """One move of v along a direction.

  Args:
    method: the choices.
    ascent: v so far.
    direction: d, the perturbed leaves by path: of a pytree,
      `leaves.select(tree, method.chosen(params))`.
    params: w, the whole pytree.
    step: the step count, for sizes that depend on it.
    rounds: how often the method's moves are made; each is shorter by that.

  Returns:
    The next v; groups whose direction or weights are zero keep theirs.
  """
  ball, box = method.ball, method.box or method.ball
  w, d = leaves.select(params, method.chosen(params)), direction
  size, stretched = ball.size_at(step), _stretched(ball, params)
  v, total = ascent.perturbation, ascent.total
  # The first move ends in the ball anyway, and noise is not cut off.
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
  # A size may be wider than the weights: a schedule's float64 in 64-bit mode.
  moved = {path: x.astype(d[path].dtype) for path, x in moved.items()}
  return ascent._replace(perturbation=moved, total=total)


def _natural(method: Method, value: Any, gradient: Params) -> Any:
  """((loss, aux), gradients) at w, dropping an unused aux."""
  loss, aux = value
  return (loss, aux if method.aux_at == 'natural' else None), gradient


def _moves(
    method: Method, state: MethodState, ascent: Ascent, params: Params,
    gradient_fn: PassFn, rounds: int, at_natural: Any) -> Ascent:
  """All moves of one call of `ascend`."""
  chosen = method.chosen(params)
  w, take = leaves.select(params, chosen), method.direction.take
  if method.direction.source != 'gradient':
    return move(method, ascent, take(state.memory, None, w, ascent.key), params,
                state.step)
  # Only the first pass of all is at w. Mixing methods share it.
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


def _zeros(tree: Any) -> Any:
  """Zeros like shapes, varying over the same axes where jax tracks that."""

  def zeros(shape: Any) -> Array:
    leaf = jnp.zeros(shape.shape, shape.dtype)
    varies = tuple(sharding.varying_axes(shape))
    return jax.lax.pcast(leaf, varies, to='varying') if varies else leaf

  return jax.tree.map(zeros, tree)


def _when(
    method: Method, state: MethodState, make: Callable[[], Any]) -> Any:
  """`make()` in the steps that perturb, else zeros."""
  if not method.is_scheduled:
    return make()
  return jax.lax.cond(
      method.perturbs_at(state.step), make,
      lambda: _zeros(jax.eval_shape(make)))


def ascend(
    method: Method, state: MethodState, ascent: Ascent, params: Params,
    gradient_fn: PassFn, rounds: int = 1, at_natural: Any = None) -> Ascent:
  """The moves of v.

  Args:
    method: the choices.
    state: the method's state.
    ascent: from `begin`, or from the round before.
    params: w.
    gradient_fn: params -> ((loss, aux), gradients): the ascent's pass, the
      first of `gradients.gradient_fns`, averaged over devices. Not called where
      the direction is not the gradient.
    rounds: how often this function is called in one step, each time with
      another loss: with inputs attacked at the v before, say. The moves are
      shorter by that.
    at_natural: what `gradient_fn(params)` returns, if it is known already: the
      first pass is then not made again.

  Returns:
    The next v. In steps that the method leaves out v is zero, and the passes
    are not paid for.

  Raises:
    ValueError: for several rounds without gradients.
  """
  checks.count('rounds', rounds)
  if rounds > 1 and method.direction.source != 'gradient':
    raise ValueError(
        f'rounds={rounds} take turns with a gradient, and method '
        f'{method.name!r} follows {method.direction.name}. rounds must be 1.')
  if method.is_off:
    return ascent
  return _when(method, state, lambda: _moves(
      method, state, ascent, params, gradient_fn, rounds, at_natural
  )._replace(key=None))


def descend(
    method: Method, state: MethodState, ascent: Ascent, params: Params,
    perturbed_fn: PassFn, natural_fn: PassFn | None = None) -> Descent:
  """Loss and gradient that the optimizer is to descend.

  Args:
    method: the choices.
    state: the method's state.
    ascent: v, from `ascend`.
    params: w.
    perturbed_fn: params -> ((loss, aux), gradients), the second of
      `gradient_fns`; called at w + v.
    natural_fn: the same on the batch for the pass at w; by default
      `perturbed_fn`. It is called if `mix` needs it and the ascent did not
      evaluate it.

  Returns:
    What the optimizer needs, and the method's next state.

  Raises:
    ValueError: if the method needs another batch and `natural_fn` is None.
  """
  if method.natural_batch == 'other' and natural_fn is None:
    raise ValueError(
        f'method {method.name!r} takes the gradient at w on another batch: '
        'natural_args (in descend natural_fn) must be given, got None.')
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
    clean = jnp.full_like(loss, jnp.nan)
  if method.is_scheduled:
    # A step left out evaluates L(w) in its only pass.
    clean = jnp.where(active, clean, loss)
  return Descent(
      mixed, aux, descended, v,
      MethodState(state.step + 1, _observe(method, state, params, gradient,
                                           descended)), clean)


def _observe(
    method: Method, state: MethodState, params: Params, perturbed: Params,
    descended: Params) -> Any:
  """The next memory, of the perturbed leaves."""
  chosen = method.chosen(params)
  return method.direction.observe(
      state.memory, leaves.select(perturbed, chosen),
      leaves.select(descended, chosen))
