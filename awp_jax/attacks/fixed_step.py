"""PGD and CW with a fixed step size, as in published evaluations.

`awp_jax.pgd` makes inputs for training. The attacks here evaluate a model: an
example is broken if the *last* iterate of a run is misclassified. Gradients of
a second model make it a transfer attack.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks
from awp_jax.evaluation import evaluate, protocol
from awp_jax.evaluation.model import Gradients, Model, make_model
from awp_jax.evaluation.protocol import (
  AttackSpec,
  BoundAttack,
  Examples,
  Report,
)
from awp_jax.threat import ThreatModel
from awp_jax.types import Array, LogitsFn

Loss = Literal['ce', 'margin']
LOSSES: tuple[Loss, ...] = ('ce', 'margin')


class _State(NamedTuple):
  """The next point to evaluate, [B, ...], and evaluations made, [B]."""

  x: Array
  time: Array


@functools.partial(jax.jit, static_argnames=('threat', 'random_start'))
def _start(
    examples: Examples, threat: ThreatModel, random_start: bool) -> _State:
  x = examples.images
  if random_start:
    x = jax.vmap(lambda key, image: threat.random_start(key, image[None])[0])(
        examples.keys, x)
  return _State(x, jnp.zeros(x.shape[0], jnp.int32))


@functools.partial(
    jax.jit, static_argnames=('threat', 'num_steps', 'transfer'))
def _advance(
    state: _State, seen: Gradients, x: Array, step_size: float,
    threat: ThreatModel, num_steps: int, transfer: bool
) -> tuple[_State, Report]:
  # The source of a transfer cannot decide, so every last iterate is claimed.
  step = step_size * threat.linear_maximizer(seen.gradient)
  last = state.time >= num_steps
  flat = jnp.all(seen.gradient.reshape(x.shape[0], -1) == 0, axis=-1)
  # The margin under the source of a transfer decides nothing either.
  margin = None if seen.margin is None or transfer else jnp.where(
      last, seen.margin, -jnp.inf)
  report = Report(
      state.x, last & (seen.broken | transfer), last, flat & (state.time == 0),
      seen.nonfinite, margin)
  x_next = threat.project(state.x + step.astype(x.dtype), x)
  return _State(x_next, state.time + 1), report


def pgd_spec(
    name: str, *, step_size: float, num_steps: int, loss: Loss = 'ce',
    restarts: int = 1, random_start: bool = True,
    source_fn: LogitsFn | None = None) -> AttackSpec:
  """PGD for a list of attacks.

  Args:
    name: in reports; also seeds the randomness.
    step_size: > 0, in the units of the images.
    num_steps: >= 1.
    loss: 'ce', or 'margin' for CW.
    restarts: runs; an example is broken if one of them ends misclassified.
    random_start: start at a random point of the ball, otherwise at the image.
    source_fn: a model for the gradients, if not the one under attack. Only the
      last iterate is checked, and restarts are not allowed.

  Returns:
    The spec.

  Raises:
    ValueError: for arguments outside the ranges above.
  """
  checks.positive('step_size', step_size)
  checks.count('num_steps', num_steps)
  checks.count('restarts', restarts)
  checks.one_of('loss', loss, LOSSES)
  if restarts > 1 and (source_fn is not None or not random_start):
    raise ValueError(
        f'restarts={restarts} needs a random start and no source_fn.')

  def build(model: Model, threat: ThreatModel) -> BoundAttack:
    source = model
    if source_fn is not None:
      source = make_model(
          source_fn, model.num_classes, precision=model.precision,
          devices=model.devices)

    def step(examples: Examples, state: _State) -> tuple[Any, Report]:
      keys = protocol.step_keys(examples.keys, state.time)
      seen = source.gradients(
          loss, state.x, examples.labels, examples.labels, keys)
      return _advance(
          state, seen, examples.images, step_size, threat, num_steps,
          source_fn is not None)

    return BoundAttack(
        restarts, lambda examples: _start(examples, threat, random_start), step)

  return AttackSpec(name, build, white_box=source_fn is None, settings={
      'attack': 'pgd', 'step_size': step_size, 'num_steps': num_steps,
      'loss': loss, 'restarts': restarts, 'random_start': random_start,
      'source_fn': source_fn})


def cw_attack(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel, *, step_size: float,
    num_steps: int = 100, restarts: int = 1,
    options: evaluate.EvalOptions | None = None) -> evaluate.AttackResult:
  """CW_inf as in the robustness literature: PGD on the margin loss.

  Args:
    key: a PRNG key.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2.
    images: [N, ...], rank >= 2, inside the box.
    labels: integers [N] in [0, C).
    threat: any norm.
    step_size: > 0, in the units of the images.
    num_steps: >= 1.
    restarts: runs from different random starts.
    options: batching, resuming and reporting.

  Returns:
    The result, decided by the last iterates.

  References:
    Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks,
    S&P 2017.
  """
  spec = pgd_spec(
      f'cw-{num_steps}', step_size=step_size, num_steps=num_steps,
      loss='margin', restarts=restarts)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, (spec,), options=options)


def transfer_attack(
    key: Array, source_fn: LogitsFn, logits_fn: Callable[..., Array],
    images: Array | np.ndarray, labels: Array | np.ndarray,
    threat: ThreatModel, *, step_size: float, num_steps: int = 20,
    loss: Loss = 'ce', options: evaluate.EvalOptions | None = None
) -> evaluate.AttackResult:
  """Adversarial examples of one model, evaluated on another.

  Args:
    key: a PRNG key.
    source_fn: the model whose loss PGD ascends, with the same classes.
    logits_fn: the model under attack; its gradients are not used.
    images: [N, ...], rank >= 2, inside the box.
    labels: integers [N] in [0, C).
    threat: any norm.
    step_size: > 0, in the units of the images.
    num_steps: >= 1.
    loss: 'ce' or 'margin', of the source.
    options: batching, resuming and reporting.

  Returns:
    The result; all accuracies are those of `logits_fn`.

  Raises:
    ValueError: for arguments outside the ranges above, or if the two models
      have different numbers of classes.
  """
  shape = jax.ShapeDtypeStruct((2, *np.shape(images)[1:]), np.float32)
  takes_key = options is not None and options.takes_key
  attacked = jax.eval_shape(
      logits_fn, shape, *((jax.random.key(0),) if takes_key else ()))
  source = jax.eval_shape(source_fn, shape)
  if source.shape != attacked.shape:
    raise ValueError(
        'source_fn and logits_fn must return logits of the same shape, got '
        f'{source.shape} and {attacked.shape}.')
  spec = pgd_spec(
      'transfer', step_size=step_size, num_steps=num_steps, loss=loss,
      source_fn=source_fn)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, (spec,), options=options)
