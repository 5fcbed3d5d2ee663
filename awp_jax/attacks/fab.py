"""Fast Adaptive Boundary attack: steps to the boundary, biased to the image.

The decision boundary between y and another class is linearized at x_k. With d
and e the shortest steps to it inside the box from x_k and from the image x,

  x_{k+1} = clip( (1 - a)(x_k + 1.05 d) + a (x + 1.05 e) ),
  a = min( |d| / (|d| + |e|), 0.1 ).

A misclassified point moves back to x + 0.9 (x_{k+1} - x). FAB minimizes the
distance; here an example is broken, and its run ends, as soon as a
misclassified point is inside the ball.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax import threat as threats
from awp_jax.attacks import hyperplanes
from awp_jax.core import checks, loops
from awp_jax.evaluation import evaluate, protocol
from awp_jax.evaluation.losses import difference
from awp_jax.evaluation.model import (
  Gradients,
  Model,
  either,
  make_gradients,
  margins,
  misclassified,
)
from awp_jax.evaluation.protocol import (
  AttackSpec,
  BoundAttack,
  Examples,
  Report,
)
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

_MAX_BIAS = 0.1    # the largest a
_OVERSHOOT = 1.05  # factor on the step, to pass the boundary
_BACKWARD = 0.9    # factor on x_{k+1} - x of a misclassified point


class FABState(NamedTuple):
  """One row per example.

  Attributes:
    x: the point of the next linearization, [B, ...].
    time: iterations made, [B].
  """

  x: Array
  time: Array


class _Boundary(NamedTuple):
  """A linearized boundary.

  Attributes:
    value: z_k - z_y, [B].
    gradient: its gradient, [B, ...], with 0 for entries that are not finite.
    distance: from the point to the boundary, [B].
    nonfinite: whether the gradient had entries that are not finite, [B].
  """

  value: Array
  gradient: Array
  distance: Array
  nonfinite: Array | None = None


def _column(values: Array, like: Array) -> Array:
  return values.reshape((-1,) + (1,) * (like.ndim - 1))


def _norm(x: Array, threat: ThreatModel) -> Array:
  """|x_i|_p, [B]."""
  return threat.distance(x, jnp.zeros_like(x))


@functools.partial(jax.jit, static_argnames=('threat', 'restarts'))
def start(
    examples: Examples, threat: ThreatModel, restarts: int) -> FABState:
  """The image itself; on a restart a random point at distance epsilon / 2."""
  x = examples.images
  none = jnp.zeros(x.shape[0], jnp.int32)
  if restarts == 1:
    return FABState(x, none)
  draw = jax.random.uniform if threat.norm == 'Linf' else jax.random.normal
  noise = jax.vmap(lambda key: draw(key, x.shape[1:], x.dtype))(examples.keys)
  if threat.norm == 'Linf':
    noise = 2 * noise - 1
  shape = (-1,) + (1,) * (x.ndim - 1)
  size = jnp.maximum(_norm(noise, threat), 1e-12).reshape(shape)
  away = threat.clip(x + threat.epsilon / 2 * noise / size)
  again = (examples.runs % restarts > 0).reshape(shape)
  return FABState(jnp.where(again, away, x), none)


@functools.partial(jax.jit, static_argnames=('threat',))
def _boundary(seen: Gradients, threat: ThreatModel) -> _Boundary:
  """The linearized boundary; distances divide by the dual norm of g."""
  g = seen.gradient
  if threat.norm == 'Linf':
    slope = threats.l1_norms(g).reshape(-1)
  elif threat.norm == 'L2':
    slope = threats.l2_norms(g).reshape(-1)
  else:
    slope = jnp.max(jnp.abs(g).reshape(g.shape[0], -1), axis=-1)
  # A value that is not finite is infinitely far, so no step goes there.
  finite = jnp.isfinite(seen.losses)
  return _Boundary(
      jnp.where(finite, seen.losses, 0), g * _column(finite, g).astype(g.dtype),
      jnp.where(finite, jnp.abs(seen.losses) / (1e-12 + slope), jnp.inf),
      seen.nonfinite)


@jax.jit
def _nearer(best: _Boundary, new: _Boundary, is_label: Array) -> _Boundary:
  nonfinite = best.nonfinite
  if new.nonfinite is not None:
    nonfinite = either(nonfinite, new.nonfinite & ~is_label)
  closer = (new.distance < best.distance) & ~is_label
  rows = _column(closer, new.gradient)
  return _Boundary(
      jnp.where(closer, new.value, best.value),
      jnp.where(rows, new.gradient, best.gradient),
      jnp.where(closer, new.distance, best.distance), nonfinite)


@jax.jit
def _cotangent(logits: Array, labels: Array, targets: Array) -> Array:
  """The gradient of z_t - z_y with respect to the logits."""
  classes, dtype = logits.shape[-1], logits.dtype
  return (jax.nn.one_hot(targets, classes, dtype=dtype)
          - jax.nn.one_hot(labels, classes, dtype=dtype))


@jax.jit
def _seen(
    gradient: Array, logits: Array, labels: Array, targets: Array) -> Gradients:
  """The `Gradients` of the loss z_t - z_y."""
  return make_gradients(
      gradient, difference(logits, labels, targets), logits, labels)


def _class_gradients(
    model: Model, x: Array, labels: Array, keys: Array
) -> Callable[[Array], Gradients]:
  """A function from targets [B] to z_t - z_y at x and its gradient.

  A deterministic model needs one forward pass for all targets. A randomized
  model may average its gradients over draws, so `model.gradients` is used.
  """
  if model.takes_key:
    return lambda targets: model.gradients(
        'difference', x, labels, targets, keys)
  logits, pullback = jax.vjp(lambda x: model.logits(x, keys), x)

  def at(targets: Array) -> Gradients:
    gradient, = pullback(_cotangent(logits, labels, targets))
    return _seen(gradient, logits, labels, targets)

  return at


def _nearest_boundary(
    model: Model, state: FABState, examples: Examples, keys: Array,
    threat: ThreatModel) -> _Boundary:
  """The nearest of all boundaries, one class at a time to save memory."""
  gradients = _class_gradients(model, state.x, examples.labels, keys)

  def look(carry: tuple[Array, _Boundary]) -> tuple[Array, _Boundary]:
    other, best = carry
    targets = jnp.zeros_like(examples.labels) + other
    new = _boundary(gradients(targets), threat)
    return other + 1, _nearer(best, new, examples.labels == other)

  far = jnp.full(state.time.shape, jnp.inf, jnp.float32)
  none = _Boundary(
      jnp.zeros_like(far), jnp.zeros_like(state.x), far,
      jnp.zeros(far.shape, bool))
  return loops.repeat_pieces(model.num_classes, look, (jnp.int32(0), none))[1]


@functools.partial(jax.jit, static_argnames=('threat',))
def approach(
    x: Array, images: Array, value: Array, gradient: Array,
    threat: ThreatModel) -> Array:
  """One step to the linearized boundary, biased towards the images.

  Args:
    x: where the boundary was linearized, [B, ...].
    images: natural images.
    value: z_k - z_y at x, [B].
    gradient: its gradient.
    threat: norm and box; its radius is not used.

  Returns:
    The next points, inside the box.
  """
  count = x.shape[0]
  flat, natural = x.reshape(count, -1), images.reshape(count, -1)
  w = gradient.reshape(count, -1)
  b = jnp.sum(w * flat, axis=-1) - value
  both = hyperplanes.project(
      jnp.concatenate([flat, natural]), jnp.concatenate([w, w]),
      jnp.concatenate([b, b]), threat.norm, threat.lower, threat.upper)
  lengths = jnp.maximum(_norm(both, threat), 1e-8)[:, None]
  from_x, from_image = lengths[:count], lengths[count:]
  bias = jnp.minimum(from_x / (from_x + from_image), _MAX_BIAS)
  mixed = ((flat + _OVERSHOOT * both[:count]) * (1 - bias)
           + (natural + _OVERSHOOT * both[count:]) * bias)
  return threat.clip(mixed).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=('threat', 'num_steps'))
def advance(
    state: FABState, x: Array, logits: Array, boundary: _Boundary,
    examples: Examples, threat: ThreatModel, num_steps: int
) -> tuple[FABState, Report]:
  """Reports which new points are broken; moves misclassified ones back."""
  wrong = misclassified(logits, examples.labels)
  inside = threat.distance(x, examples.images) <= threat.epsilon
  rows = wrong.reshape((-1,) + (1,) * (x.ndim - 1))
  back = examples.images + (x - examples.images) * _BACKWARD
  flat = jnp.all(
      boundary.gradient.reshape(x.shape[0], -1) == 0, axis=-1)
  report = Report(
      x, wrong & inside, state.time + 1 >= num_steps, flat & (state.time == 0),
      boundary.nonfinite,
      jnp.where(inside, margins(logits, examples.labels), -jnp.inf))
  return FABState(jnp.where(rows, back, x), state.time + 1), report


def fab_spec(
    name: str, *, targeted: bool, num_steps: int = 100, restarts: int = 1,
    num_targets: int = 9) -> AttackSpec:
  """FAB for a list of attacks; the arguments are those of `fab`."""
  checks.count('num_steps', num_steps)
  checks.count('restarts', restarts)
  checks.count('num_targets', num_targets)

  def build(model: Model, threat: ThreatModel) -> BoundAttack:

    def boundary(
        examples: Examples, state: FABState, keys: Array) -> _Boundary:
      if not targeted:
        return _nearest_boundary(model, state, examples, keys, threat)
      column = (examples.runs // restarts)[:, None]
      target = jnp.take_along_axis(examples.targets, column, axis=1)[:, 0]
      return _boundary(model.gradients(
          'difference', state.x, examples.labels, target, keys), threat)

    def step(examples: Examples, state: FABState) -> tuple[Any, Report]:
      keys = protocol.step_keys(examples.keys, state.time)
      near = boundary(examples, state, keys)
      x = approach(
          state.x, examples.images, near.value, near.gradient, threat)
      return advance(
          state, x, model.logits(x, keys), near, examples, threat, num_steps)

    runs = restarts
    if targeted:
      runs *= min(num_targets, model.num_classes - 1)
    return BoundAttack(
        runs, lambda examples: start(examples, threat, restarts), step)

  return AttackSpec(
      name, build, num_targets=num_targets if targeted else 0, settings={
          'attack': 'fab', 'targeted': targeted, 'num_steps': num_steps,
          'restarts': restarts, 'num_targets': num_targets})


def fab(
    key: Array, logits_fn: Any, images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel, *, targeted: bool = False,
    num_steps: int = 100, restarts: int = 1, num_targets: int = 9,
    options: evaluate.EvalOptions | None = None) -> evaluate.AttackResult:
  """The FAB attack, which searches for the nearest misclassified point.

  Args:
    key: a PRNG key; used by restarts only.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2.
    images: [N, ...], rank >= 2, inside the box.
    labels: integers [N] in [0, C).
    threat: L_inf, L_2 or L_1.
    targeted: if True, each run goes towards one class, the likeliest wrong
      ones in turn, with one gradient per iteration. If False, towards the
      nearest class, with C gradients per iteration; a deterministic model
      computes them from one forward pass.
    num_steps: iterations per run, >= 1.
    restarts: runs, per target if targeted; the first starts at the image.
    num_targets: if targeted, number of classes, at most C - 1.
    options: batching, resuming and reporting.

  Returns:
    The result.

  Raises:
    ValueError: for arguments outside the ranges above.

  References:
    Croce and Hein, Minimally Distorted Adversarial Examples with a Fast
    Adaptive Boundary Attack, ICML 2020.
  """
  spec = fab_spec(
      'fab-t' if targeted else 'fab', targeted=targeted, num_steps=num_steps,
      restarts=restarts, num_targets=num_targets)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, (spec,), options=options)
