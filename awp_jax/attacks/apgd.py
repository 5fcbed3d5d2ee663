"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

With P the projection onto ball and box, s the steepest direction and a step
size eta, at first 2 epsilon, one iteration computes

  z   = P( x_k + eta s(grad loss(x_k)) )
  x_+ = P( x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}) ).

Checkpoints come after 22 % of the iterations, then at intervals that shrink by
3 % down to 6 %. A checkpoint halves eta if the loss rose in at most 75 % of the
iterations since the previous one, or if the previous one did not halve it and
the best loss has not risen since. The iterate then returns to the best point.

In L_1 steps are sparse: the share of the entries that move depends on the
sparsity of the best point. Three stages shrink the ball from three times
epsilon to epsilon.

  >>> import jax, jax.numpy as jnp
  >>> from awp_jax.threat import ThreatModel
  >>> logits_fn = lambda x: x @ jnp.array([[4.0, 0, 0], [0, 4.0, 0]])
  >>> result = apgd(
  ...     jax.random.key(0), logits_fn, jnp.array([[0.6, 0.4], [0.9, 0.1]]),
  ...     jnp.array([0, 0]), ThreatModel('Linf', 0.2), loss='ce', num_steps=10)
  >>> result.robust.tolist()
  [False, True]
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.attacks import apgd_steps
from awp_jax.attacks.apgd_steps import APGDState
from awp_jax.core import checks
from awp_jax.evaluation import evaluate, protocol
from awp_jax.evaluation.losses import LogitsLoss
from awp_jax.evaluation.model import Model
from awp_jax.evaluation.protocol import (
  AttackSpec,
  BoundAttack,
  Examples,
  Report,
)
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

Loss = Literal['ce', 'dlr', 'dlr-targeted', 'margin']
LOSSES: tuple[Loss, ...] = ('ce', 'dlr', 'dlr-targeted', 'margin')

#: Fewest classes that a loss needs, and its replacement with fewer.
_MIN_CLASSES: dict[Any, tuple[int, str]] = {
    'dlr': (3, 'margin'), 'dlr-targeted': (4, 'difference')}


def _target(examples: Examples, restarts: int) -> Array:
  column = (examples.runs // restarts)[:, None]
  return jnp.take_along_axis(examples.targets, column, axis=1)[:, 0]


def _check_loss(loss: Loss | LogitsLoss, num_classes: int) -> None:
  """Raises ValueError unless a callable loss returns one value per example."""
  if isinstance(loss, str):
    return
  whole = jax.ShapeDtypeStruct((2,), jnp.int32)
  losses = jax.eval_shape(
      loss, jax.ShapeDtypeStruct((2, num_classes), jnp.float32), whole, whole)
  if getattr(losses, 'shape', None) != (2,):
    raise ValueError(
        'a loss must map (logits [B, C], labels [B], targets [B]) to losses '
        f'[B], got {losses} for B = 2.')


def apgd_spec(
    name: str, *, loss: Loss | LogitsLoss, num_steps: int = 100,
    restarts: int = 1, num_targets: int = 9, targeted: bool | None = None,
    eps_schedule: bool = False) -> AttackSpec:
  """APGD for a list of attacks; the arguments are those of `apgd`."""
  if not callable(loss):
    checks.one_of('loss', loss, LOSSES)
  checks.count('num_steps', num_steps)
  checks.count('restarts', restarts)
  checks.count('num_targets', num_targets)
  if isinstance(loss, str):
    if targeted not in (None, loss == 'dlr-targeted'):
      raise ValueError(
          f'targeted={targeted!r} does not match loss={loss!r}: only '
          "'dlr-targeted' and callable losses run per target class.")
    targeted = loss == 'dlr-targeted'
  fewest, instead = _MIN_CLASSES.get(loss, (2, loss))

  def build(model: Model, threat: ThreatModel) -> BoundAttack:
    _check_loss(loss, model.num_classes)
    ascended = loss if model.num_classes >= fewest else instead
    schedule = apgd_steps.make_schedule(
        threat, num_steps, eps_schedule and threat.norm == 'L1')

    def step(examples: Examples, state: APGDState) -> tuple[Any, Report]:
      keys = protocol.step_keys(examples.keys, state.time)
      target = (_target(examples, restarts) if targeted
                else examples.targets[:, 0])
      seen = model.gradients(
          ascended, state.x, examples.labels, target, keys)
      return apgd_steps.advance(
          state, seen, examples.images, threat, schedule)

    runs = restarts
    if targeted:
      runs *= min(num_targets, model.num_classes - 1)
    return BoundAttack(
        runs, lambda examples: apgd_steps.start(examples, threat, schedule),
        step)

  return AttackSpec(
      name, build, num_targets=num_targets if targeted else 0,
      min_classes=fewest, settings={
          'attack': 'apgd', 'loss': loss, 'num_steps': num_steps,
          'restarts': restarts, 'targeted': bool(targeted),
          'num_targets': num_targets, 'eps_schedule': eps_schedule})


def apgd(
    key: Array, logits_fn: Any, images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel, *,
    loss: Loss | LogitsLoss = 'ce', num_steps: int = 100, restarts: int = 1,
    num_targets: int = 9, targeted: bool | None = None,
    eps_schedule: bool = False,
    options: evaluate.EvalOptions | None = None) -> evaluate.AttackResult:
  """Auto-PGD on a loss of the logits.

  Args:
    key: a PRNG key.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2.
    images: [N, ...], rank >= 2, inside the box.
    labels: integers [N] in [0, C).
    threat: L_inf, L_2 or L_1.
    loss: 'ce', 'dlr' (C >= 3), 'dlr-targeted' (C >= 4) or 'margin'. With fewer
      classes a DLR loss is replaced by its numerator, a difference of logits,
      with a warning. Or a function (logits [B, C], labels [B], targets [B]) ->
      losses [B] that the attack ascends.
    num_steps: iterations per run, >= 1.
    restarts: runs from different random starts; per target if targeted.
    num_targets: if targeted, number of the most likely wrong classes to
      target, at most C - 1.
    targeted: whether a callable loss has runs for each of `num_targets`
      classes. Otherwise its `targets` are the most likely wrong classes.
    eps_schedule: for L_1, shrink the ball in stages.
    options: batching, resuming and reporting.

  Returns:
    The result.

  Raises:
    ValueError: for arguments outside the ranges above.

  References:
    Croce and Hein, Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks, ICML 2020; Mind the Box:
    l1-APGD for Sparse Adversarial Attacks on Image Classifiers, ICML 2021.
  """
  name = loss if isinstance(loss, str) else 'own'
  spec = apgd_spec(
      f'apgd-{name}', loss=loss, num_steps=num_steps, restarts=restarts,
      num_targets=num_targets, targeted=targeted, eps_schedule=eps_schedule)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, (spec,), options=options)
