"""Targeted misclassification: whether inputs can be moved to a given class.

An example counts as broken only where the logit of its target class t is larger
than all others; a tie is no success. For one target this is untargeted
misclassification of a model with two classes,

  g(x) = ( max_{k != t} f_k(x),  f_t(x) ),   label 0,

so every attack applies, and verdicts are those of `awp_jax.evaluate`. Examples
with the same target are evaluated together.

  >>> import jax, jax.numpy as jnp
  >>> logits_fn = lambda x: 8 * x @ jnp.eye(3)
  >>> images = jnp.array([[0.5, 0.45, 0.0], [0.5, 0.45, 0.0]])
  >>> found = targeted_attack(
  ...     jax.random.key(0), logits_fn, images, jnp.array([1, 2]),
  ...     ThreatModel('Linf', 0.1))
  >>> print(found.success, found.success_rate)
  [ True False] 0.5
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple
import warnings

import jax.numpy as jnp
import numpy as np

from awp_jax.attacks import autoattack
from awp_jax.evaluation import arguments
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import AttackResult, RobustnessWarning
from awp_jax.threat import ThreatModel
from awp_jax.types import Array


class TargetedResult(NamedTuple):
  """Results of targeted attacks.

  Attributes:
    success: whether an attack reached the target class, or the natural image is
      already there, [N].
    natural_success: whether the natural image is classified as the target, [N].
    success_rate: the fraction in `success`.
    adversarial: [N, ...]; the natural image where no attack succeeded, and None
      without `EvalOptions.keep_images`.
    results: target class -> the evaluation of its examples. Its "natural" and
      "robust" mean: not yet, and never, classified as the target.
  """

  success: np.ndarray
  natural_success: np.ndarray
  success_rate: float
  adversarial: np.ndarray | None
  results: dict[int, AttackResult]


def _towards(
    logits_fn: Callable[..., Array], target: int) -> Callable[..., Array]:
  """The model with two classes: any but the target, and the target."""

  def two_classes(*args: Array) -> Array:
    logits = logits_fn(*args)
    is_target = jnp.arange(logits.shape[-1]) == target
    others = jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1)
    return jnp.stack([others, logits[..., target]], axis=-1)

  return two_classes


def targeted_attack(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    targets: Array | np.ndarray, threat: ThreatModel, *,
    attacks: Sequence[str | AttackSpec] = ('apgd-ce', 'fab'),
    options: arguments.EvalOptions | None = None) -> TargetedResult:
  """Attacks that succeed only at a given class of each example.

  Args:
    key: a PRNG key.
    logits_fn: as for `auto_attack`.
    images: as for `auto_attack`, [N, ...].
    targets: the class that each example is moved to, integers [N] in [0, C).
    threat: the threat model.
    attacks: as for `auto_attack`. Their losses see two classes, so those with
      targets of their own add nothing.
    options: as for `auto_attack`; `done` and `share` are not supported, and
      `attack_fn` must return the logits of all classes. Each target compiles
      anew.

  Returns:
    The result. Logits that are not finite count as a success, as they count as
    misclassified elsewhere.

  Raises:
    ValueError: for targets out of range, unsupported options, or as
      `auto_attack`.
  """
  options = arguments.EvalOptions() if options is None else options
  if options.done or options.share:
    raise ValueError(
        'targeted_attack supports neither EvalOptions.done nor share; '
        'EvalOptions.store resumes it.')
  images, targets = np.asanyarray(images), np.asarray(targets)
  arguments.check_model_inputs(
      logits_fn, images, targets, threat, options.takes_key, 'targets')
  success = np.zeros(len(targets), bool)
  natural = np.zeros(len(targets), bool)
  adversarial = images.copy() if options.keep_images else None
  found: dict[int, AttackResult] = {}
  for target in np.unique(targets).tolist():
    rows = np.flatnonzero(targets == target)
    own = options
    if options.attack_fn is not None:
      own = dataclasses.replace(
          options, attack_fn=_towards(options.attack_fn, target))
    with warnings.catch_warnings():
      # Two classes are meant here.
      warnings.filterwarnings(
          'ignore', '.* with 2 classes', RobustnessWarning)
      result = autoattack.auto_attack(
          key, _towards(logits_fn, target), images[rows],
          np.zeros(len(rows), np.int32), threat, attacks=attacks, options=own)
    found[target] = result
    success[rows], natural[rows] = ~result.robust, ~result.natural
    if adversarial is not None and result.adversarial is not None:
      adversarial[rows] = result.adversarial
  return TargetedResult(
      success, natural, float(success.mean()), adversarial, found)
