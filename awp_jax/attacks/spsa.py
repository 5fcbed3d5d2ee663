"""SPSA: Adam on gradients estimated from differences of the loss.

With random signs v and a small h, the gradient of the margin
m(x) = max_{k != y} z_k - z_y is estimated as

  g = mean over v of  (m(x + h v) - m(x - h v)) / (2 h)  v,

so the attack needs logits only. Adam ascends along g, and the threat model
projects after every step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax import objectives
from awp_jax.core import checks, loops
from awp_jax.evaluation import evaluate, protocol
from awp_jax.evaluation.model import Model, margins, misclassified
from awp_jax.evaluation.protocol import (
  AttackSpec,
  BoundAttack,
  Examples,
  Report,
)
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

# Adam's default constants.
_MEAN_DECAY, _SQUARE_DECAY, _FLOOR = 0.9, 0.999, 1e-8


class SPSAState(NamedTuple):
  """One row per example.

  Attributes:
    x: the iterate, [B, ...].
    mean: Adam's running mean of the gradients, [B, ...].
    square: the running mean of their squares, [B, ...].
    time: iterations made, [B].
  """

  x: Array
  mean: Array
  square: Array
  time: Array


@jax.jit
def _signs(keys: Array, turn: Array, x: Array) -> Array:
  fresh = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
  return jax.vmap(
      lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(fresh)


@jax.jit
def _both_sides(x: Array, signs: Array, radius: Array) -> tuple[Array, Array]:
  return x + radius * signs, x - radius * signs


class _Estimate(NamedTuple):
  """A gradient estimate [B, ...]; whether a difference was not finite, [B]."""

  total: Array
  nonfinite: Array


@jax.jit
def _add(
    estimate: _Estimate, signs: Array, above: Array, below: Array,
    labels: Array, weight: Array) -> _Estimate:
  gain = (objectives.cw_margin(above, labels)
          - objectives.cw_margin(below, labels))
  finite = jnp.isfinite(gain)
  gain = jnp.where(finite, gain, 0)
  rows = (gain * weight).reshape((-1,) + (1,) * (signs.ndim - 1))
  return _Estimate(
      estimate.total + rows.astype(signs.dtype) * signs,
      estimate.nonfinite | ~finite)


@functools.partial(jax.jit, static_argnames=('threat',))
def _climb(
    state: SPSAState, gradient: Array, x: Array, step_size: Array,
    threat: ThreatModel) -> SPSAState:
  mean = _MEAN_DECAY * state.mean + (1 - _MEAN_DECAY) * gradient
  square = (_SQUARE_DECAY * state.square
            + (1 - _SQUARE_DECAY) * jnp.square(gradient))
  wide = jnp.promote_types(x.dtype, jnp.float32)
  mean, square = mean.astype(wide), square.astype(wide)
  count = (state.time + 1).astype(wide).reshape((-1,) + (1,) * (x.ndim - 1))
  unbiased = mean / (1 - _MEAN_DECAY ** count)
  size = jnp.sqrt(square / (1 - _SQUARE_DECAY ** count)) + _FLOOR
  step = (step_size * unbiased / size).astype(x.dtype)
  return SPSAState(
      threat.project(state.x + step, x), mean.astype(x.dtype),
      square.astype(x.dtype), state.time + 1)


@functools.partial(jax.jit, static_argnames=('num_steps',))
def _report(
    state: SPSAState, logits: Array, labels: Array, nonfinite: Array,
    num_steps: int) -> Report:
  broken = misclassified(logits, labels)
  return Report(
      state.x, broken, state.time >= num_steps, jnp.zeros_like(broken),
      nonfinite, margins(logits, labels))


@jax.jit
def _start(examples: Examples) -> SPSAState:
  x = examples.images
  zeros = jnp.zeros_like(x)
  return SPSAState(x, zeros, zeros, jnp.zeros(x.shape[0], jnp.int32))


def spsa_spec(
    name: str = 'spsa', *, num_steps: int = 100, num_samples: int = 256,
    radius: float = 0.001, step_size: float = 0.01) -> AttackSpec:
  """SPSA for a list of attacks; the arguments are those of `spsa`."""
  checks.count('num_steps', num_steps)
  checks.count('num_samples', num_samples, 2)
  checks.positive('radius', radius)
  checks.positive('step_size', step_size)
  pairs = num_samples // 2

  def build(model: Model, threat: ThreatModel) -> BoundAttack:

    def estimate(
        examples: Examples, state: SPSAState, keys: Array) -> _Estimate:

      def sample(carry: tuple[Array, _Estimate]) -> tuple[Array, _Estimate]:
        turn, so_far = carry
        signs = _signs(keys, turn, state.x)
        above, below = _both_sides(state.x, signs, jnp.float32(radius))
        so_far = _add(
            so_far, signs, model.logits(above, keys), model.logits(below, keys),
            examples.labels, jnp.float32(1 / (2 * radius * pairs)))
        return turn + 1, so_far

      none = _Estimate(
          jnp.zeros_like(state.x), jnp.zeros(state.time.shape, bool))
      return loops.repeat_pieces(pairs, sample, (jnp.int32(0), none))[1]

    def step(examples: Examples, state: SPSAState) -> tuple[Any, Report]:
      keys = protocol.step_keys(examples.keys, state.time)
      logits = model.logits(state.x, keys)
      gradient = estimate(examples, state, keys)
      report = _report(
          state, logits, examples.labels, gradient.nonfinite, num_steps)
      return _climb(
          state, gradient.total, examples.images, jnp.float32(step_size),
          threat), report

    return BoundAttack(1, _start, step)

  return AttackSpec(name, build, white_box=False, settings={
      'attack': 'spsa', 'num_steps': num_steps, 'num_samples': num_samples,
      'radius': radius, 'step_size': step_size})


def spsa(
    key: Array, logits_fn: Any, images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel, *, num_steps: int = 100,
    num_samples: int = 256, radius: float = 0.001, step_size: float = 0.01,
    options: evaluate.EvalOptions | None = None) -> evaluate.AttackResult:
  """SPSA, an attack that ascends the margin without gradients of the model.

  Args:
    key: a PRNG key.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2; evaluated also
      up to `radius` outside the box.
    images: [N, ...], rank >= 2, inside the box.
    labels: integers [N] in [0, C).
    threat: any norm.
    num_steps: iterations, >= 1; a run ends at its first misclassified iterate.
    num_samples: evaluations per gradient estimate, two per direction, >= 2.
    radius: h > 0, in the units of the images.
    step_size: Adam's step size, > 0.
    options: batching, resuming and reporting.

  Returns:
    The result.

  Raises:
    ValueError: for arguments outside the ranges above.

  References:
    Uesato et al., Adversarial Risk and the Dangers of Evaluating Against Weak
    Attacks, ICML 2018.
  """
  spec = spsa_spec(
      num_steps=num_steps, num_samples=num_samples, radius=radius,
      step_size=step_size)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, (spec,), options=options)
