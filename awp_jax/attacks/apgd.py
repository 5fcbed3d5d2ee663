"""Auto-PGD: projected gradient ascent that chooses its own step sizes.

With P the projection onto ball and box, s the steepest direction and a step
size eta, 2 epsilon at first, one iteration makes

  z   = P( x_k + eta s(grad loss(x_k)) )
  x_+ = P( x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}) ).

At checkpoints (after 22 % of the iterations, then at intervals that shrink by
3 % down to 6 %) eta is halved where the loss rose in at most 75 % of the
iterations since the last one, or where it was not halved there and the best
loss has not risen since; the iterate then goes back to the best point.

In L_1 steps are sparse: the share of the entries that moves follows the
sparsity of the best point, and three stages shrink the ball from three times
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
from awp_jax.evaluation.model import LogitsLoss, Model
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

#: How many classes a loss needs, and what replaces it with fewer.
_NEEDS: dict[Any, tuple[int, str]] = {
    'dlr': (3, 'margin'), 'dlr-targeted': (4, 'difference')}


def _target(examples: Examples, restarts: int) -> Array:
  column = (examples.runs // restarts)[:, None]
  return jnp.take_along_axis(examples.targets, column, axis=1)[:, 0]


def _check_loss(loss: Loss | LogitsLoss, num_classes: int) -> None:
  """Raises ValueError unless a callable loss gives one number per example."""
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
          f'targeted={targeted!r} does not go with loss={loss!r}: only '
          "'dlr-targeted' and a callable loss run per target class.")
    targeted = loss == 'dlr-targeted'
  fewest, instead = _NEEDS.get(loss, (2, loss))

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
      classes a DLR loss gives way to the difference of logits above its
      division, with a warning. Or a function (logits [B, C], labels [B],
      targets [B]) -> losses [B] that the adversary makes large.
    num_steps: iterations of a run, >= 1.
    restarts: runs from other random starts, per target where targeted.
    num_targets: targeted: the most likely wrong classes, at most C - 1.
    targeted: whether a callable loss has runs for each of `num_targets`
      classes; else its `targets` are the most likely wrong ones.
    eps_schedule: L_1: shrink the ball in stages.
    options: how the examples stream through.

  Returns:
    What stands and what broke.

  Raises:
    ValueError: for arguments that are not as above.

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
