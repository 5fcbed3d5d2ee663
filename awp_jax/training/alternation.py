"""Alternation of input attacks and weight moves within a step.

A step makes A rounds of K1 attack steps at w + v and K2 moves of v at x', then
takes loss and gradient at (w + v, x'). See `awp_jax.training.train_step`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax

from awp_jax.perturbation import engine, leaves
from awp_jax.perturbation.base import Method, MethodState
from awp_jax.training import parts
from awp_jax.types import Array, Params

#: (params, batch_stats, key, start) -> (x', statistics after the attack).
AttackFn = Callable[[Params, Any, Array, Any], tuple[Array, Any]]


class Round(NamedTuple):
  """Inputs, statistics and perturbation after a round.

  Attributes:
    x_adv: x' [B, ...]; before the first round, the start of the attack.
    batch_stats: the running statistics before the next pass.
    ascent: the state of v.
  """

  x_adv: Any
  batch_stats: Any
  ascent: engine.Ascent


class AlternationInputs(NamedTuple):
  """Inputs shared by the passes of one step.

  With M > 1 parts, all arrays of examples, keys and statistics have a leading
  axis [M]; see `awp_jax.training.parts`.

  Attributes:
    params: w.
    images: x [B, ...].
    labels: [B] or [B, C].
    dropout_key: the key of the weight passes.
    method: the weight perturbation method.
    method_state: the method's state.
    attack_fn: computes x'.
    ascent_fn: (params, batch_stats, x', x, labels, dropout key) -> ((loss,
      aux), gradients) for the ascent of v.
    descent_fn: the same for the loss that the optimizer descends.
    keeps_statistics: whether attack passes update the running statistics.
    num_parts: M.
  """

  params: Params
  images: Array
  labels: Array
  dropout_key: Array
  method: Method
  method_state: MethodState
  attack_fn: AttackFn
  ascent_fn: Callable[..., Any]
  descent_fn: Callable[..., Any]
  keeps_statistics: bool
  num_parts: int


def _is_halved(method: Method) -> bool:
  """Whether the passes at w and w + v each use half of the batch."""
  return method.natural_batch == 'other' and not method.is_off


def _pass_fn(
    inputs: AlternationInputs, done: Round, gradient_fn: Callable[..., Any],
    rows: slice) -> engine.PassFn:
  """Returns a pass over the given rows, as a function of the parameters."""
  index = rows if inputs.num_parts == 1 else (slice(None), rows)

  def pass_fn(params: Params) -> Any:
    return gradient_fn(
        params, done.batch_stats, done.x_adv[index], inputs.images[index],
        inputs.labels[index], inputs.dropout_key)

  return pass_fn


def _perturbed_rows(method: Method) -> slice:
  return slice(0, None, 2) if _is_halved(method) else slice(None)


def _round(
    inputs: AlternationInputs, method: Method, done: Round, key: Array,
    rounds: int) -> Round:
  """Attacks the inputs at w + v from the last x', then moves v."""
  x_adv, moved = inputs.attack_fn(
      leaves.perturb(inputs.params, done.ascent.perturbation),
      done.batch_stats, key, done.x_adv)
  done = done._replace(
      x_adv=x_adv,
      batch_stats=moved if inputs.keeps_statistics else done.batch_stats)
  pass_fn = _pass_fn(
      inputs, done, inputs.ascent_fn, _perturbed_rows(method))
  return done._replace(ascent=engine.ascend(
      method, inputs.method_state, done.ascent, inputs.params, pass_fn,
      rounds=rounds))


def alternate(
    inputs: AlternationInputs, start: Any, batch_stats: Any, key: Array,
    noise_key: Array, alternations: int) -> Round:
  """Runs the rounds of a step.

  A method that is off and steps skipped by `start` and `every` make one round:
  with v = 0, further rounds would only prolong the attack.

  Args:
    inputs: the inputs of the step.
    start: the start of the first attack; later attacks continue from x'.
    batch_stats: the running statistics before the step.
    key: this device's PRNG key, or the keys [M] of its parts.
    noise_key: a PRNG key for methods that draw noise, the same on all devices.
    alternations: A >= 1.

  Returns:
    The last round.
  """
  method, state = inputs.method, inputs.method_state
  rounds = 1 if method.is_off else alternations
  keys = parts.round_keys(inputs.num_parts, key, rounds)
  first = _round(
      inputs, method,
      Round(start, batch_stats, engine.begin(method, state, noise_key)),
      keys[0], rounds)
  # The `cond` below already restricts the later rounds to perturbing steps.
  unscheduled = dataclasses.replace(method, start=0, every=1)

  def others(done: Round) -> Round:
    for round_key in keys[1:]:
      done = _round(inputs, unscheduled, done, round_key, rounds)
    return done

  if rounds == 1 or not method.is_scheduled:
    return others(first)
  return jax.lax.cond(
      method.perturbs_at(state.step), others, lambda done: done, first)


def descend(inputs: AlternationInputs, done: Round) -> engine.Descent:
  """Computes the loss and gradients that the optimizer descends.

  Args:
    inputs: the inputs of the step.
    done: the last round.

  Returns:
    The output of `engine.descend`.
  """
  method = inputs.method
  perturbed_fn = _pass_fn(
      inputs, done, inputs.descent_fn, _perturbed_rows(method))
  natural_fn = None
  if method.natural_batch == 'other':  # not called while the method is off
    natural_fn = _pass_fn(
        inputs, done, inputs.descent_fn, slice(1, None, 2))
  return engine.descend(
      method, inputs.method_state, done.ascent, inputs.params, perturbed_fn,
      natural_fn)
