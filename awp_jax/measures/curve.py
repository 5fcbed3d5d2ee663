"""Robust accuracy over epsilon.

An example that is broken at one epsilon is broken at all larger ones. Each
evaluation therefore attacks only the survivors of the previous one, and the
curve cannot rise:

  r(epsilon_k) = #{ i : nothing at epsilon_1, ..., epsilon_k breaks i } / N

  >>> import jax, jax.numpy as jnp
  >>> logits_fn = lambda x: 8 * x @ jnp.eye(2)  # broken from half the margin
  >>> images = jnp.array([[0.75, 0.25], [0.55, 0.45]])
  >>> curve = robust_curve(
  ...     jax.random.key(0), logits_fn, images, jnp.array([0, 0]), 'Linf',
  ...     (0.1, 0.2, 0.3), attacks=('apgd-ce',))
  >>> print(curve.robust_accuracy, curve.smallest_epsilon)
  [0.5 0.5 0. ] [0.3 0.1]
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from awp_jax.attacks import autoattack
from awp_jax.core import checks
from awp_jax.evaluation import arguments
from awp_jax.evaluation.arguments import EvalOptions
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import AttackResult, confidence_interval
from awp_jax.threat import Norm, ThreatModel
from awp_jax.types import Array


class RobustCurve(NamedTuple):
  """Robust accuracy over epsilon.

  Attributes:
    epsilons: rising, [E].
    robust_accuracy: fractions of all examples, [E]; never rises.
    intervals: their 95 % confidence intervals, [E, 2].
    natural: which natural images are classified correctly, [N].
    smallest_epsilon: the smallest of the epsilons at which the example was
      broken, [N]; 0 if its natural image is misclassified, infinity if it never
      was.
    results: the evaluation at each epsilon, of the survivors of the previous
      one; None if there were none.
  """

  epsilons: np.ndarray
  robust_accuracy: np.ndarray
  intervals: np.ndarray
  natural: np.ndarray
  smallest_epsilon: np.ndarray
  results: tuple[AttackResult | None, ...]


def robust_curve(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    labels: Array | np.ndarray, norm: Norm, epsilons: Sequence[float], *,
    attacks: Sequence[str | AttackSpec] = ('apgd-ce', 'apgd-t'),
    lower: float = 0.0, upper: float = 1.0,
    options: EvalOptions | None = None) -> RobustCurve:
  """Runs AutoAttack or some of its attacks at each of several epsilons.

  Args:
    key: a PRNG key.
    logits_fn: as for `auto_attack`.
    images: as for `auto_attack`, [N, ...].
    labels: integers [N].
    norm: 'Linf', 'L2' or 'L1'.
    epsilons: radii > 0, rising. Each compiles anew.
    attacks: as for `auto_attack`; by default those of its version 'fast'.
    lower: of the box.
    upper: of the box.
    options: as for `auto_attack`. `done` and `share` are not supported; `store`
      is. The model is checked once.

  Returns:
    The curve. `smallest_epsilon` is an upper bound of the distance to the
    nearest misclassified point. `minimal_perturbations` searches that point
    directly; either bound may be the smaller one.

  Raises:
    ValueError: if the epsilons are not positive and rising, for unsupported
      options, or as `auto_attack`; before anything is compiled.
  """
  options = EvalOptions() if options is None else options
  if options.done or options.share:
    raise ValueError(
        'robust_curve supports neither EvalOptions.done nor share; '
        'EvalOptions.store resumes it.')
  for name, value in (('epsilons', epsilons), ('attacks', attacks)):
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
      raise ValueError(f'{name} must be a sequence, got {value!r}.')
  radii = [float(epsilon) for epsilon in epsilons]
  for epsilon in radii:
    checks.positive('epsilons', epsilon)
  if not radii or sorted(set(radii)) != radii:
    raise ValueError(f'epsilons must rise, got {tuple(epsilons)}.')
  images, labels = np.asanyarray(images), np.asarray(labels)
  arguments.check_model_inputs(
      logits_fn, images, labels, ThreatModel(norm, radii[-1], lower, upper),
      options.takes_key)
  remaining = np.arange(len(labels))
  found: list[AttackResult | None] = []
  smallest, natural = np.full(len(labels), np.inf), np.ones(len(labels), bool)
  accuracies = []
  for epsilon in radii:
    result = None
    if remaining.size:
      if options.verbose:
        print(f'epsilon {epsilon:g}, {remaining.size} of {len(labels)} '
              'examples left:', flush=True)
      result = autoattack.auto_attack(
          key, logits_fn, images[remaining], labels[remaining],
          ThreatModel(norm, epsilon, lower, upper), attacks=attacks,
          options=options)
      options = dataclasses.replace(options, check_model=False)
      if not found:
        natural = result.natural
        smallest[~natural] = 0
      # A randomized model may misclassify the natural image only now.
      broken = remaining[~result.robust]
      smallest[broken[natural[broken]]] = epsilon
      remaining = remaining[result.robust]
    found.append(result)
    accuracies.append(remaining.size / len(labels))
  return RobustCurve(
      np.array(radii), np.array(accuracies), np.array([
          confidence_interval(round(share * len(labels)), len(labels))
          for share in accuracies]), natural, smallest, tuple(found))
