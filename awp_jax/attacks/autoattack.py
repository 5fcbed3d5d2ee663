"""AutoAttack: a fixed list of attacks that need no tuning.

Each attack sees only the examples that survived the earlier attacks. Examples
that survive all of them count as robust.

  >>> import jax, jax.numpy as jnp
  >>> from awp_jax.threat import ThreatModel
  >>> logits_fn = lambda x: x @ jnp.eye(4) * 4.0
  >>> images = jnp.array([[0.6, 0.4, 0, 0], [0.9, 0.1, 0, 0]])
  >>> result = auto_attack(
  ...     jax.random.key(0), logits_fn, images, jnp.array([0, 0]),
  ...     ThreatModel('Linf', 0.2), attacks=('apgd-ce', 'apgd-dlr'))
  >>> result.robust_accuracy, [len(a.broken) for a in result.attacks]
  (0.5, [1, 0])
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
from typing import Literal

import numpy as np

from awp_jax.attacks.apgd import apgd_spec
from awp_jax.attacks.fab import fab_spec
from awp_jax.attacks.square import square_spec
from awp_jax.core import checks
from awp_jax.evaluation import evaluate
from awp_jax.evaluation.evaluate import AttackResult, EvalOptions
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.threat import Norm, ThreatModel
from awp_jax.types import Array

Version = Literal['standard', 'plus', 'rand', 'fast']

#: The attacks of each version, in their order.
VERSIONS: dict[Version, tuple[str, ...]] = {
    'standard': ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
    'plus': ('apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t'),
    'rand': ('apgd-ce', 'apgd-dlr'),
    'fast': ('apgd-ce', 'apgd-t'),
}

ATTACKS: tuple[str, ...] = (
    'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square')

#: Draws of a randomized model that 'rand' averages each gradient over.
RAND_DRAWS = 20


def make_specs(
    names: Sequence[str], norm: Norm, version: Version
) -> tuple[AttackSpec, ...]:
  """The attacks of a version with its settings.

  Args:
    names: from `ATTACKS`.
    norm: L_1 has its own settings in 'standard' and 'fast': five restarts of
      APGD-CE, five targets for APGD-T, and radii that shrink in stages.
    version: 'plus' gives APGD-CE, APGD-DLR and FAB five restarts; 'rand'
      averages gradients over 20 draws and needs a model that takes a key.

  Returns:
    One spec per name.

  Raises:
    ValueError: for an unknown name.
  """
  plus = version == 'plus'
  staged = norm == 'L1' and version in ('standard', 'fast')
  restarts = 5 if plus or staged else 1
  make: dict[str, Callable[[], AttackSpec]] = {
      'apgd-ce': lambda: apgd_spec(
          'apgd-ce', loss='ce', restarts=restarts, eps_schedule=staged),
      'apgd-dlr': lambda: apgd_spec(
          'apgd-dlr', loss='dlr', restarts=restarts, eps_schedule=staged),
      'apgd-t': lambda: apgd_spec(
          'apgd-t', loss='dlr-targeted', num_targets=5 if staged else 9,
          eps_schedule=staged),
      'fab': lambda: fab_spec(
          'fab', targeted=False, restarts=5 if plus else 1),
      'fab-t': lambda: fab_spec('fab-t', targeted=True),
      'square': square_spec,
  }
  for name in names:
    checks.one_of('attack', name, make)
  draws = RAND_DRAWS if version == 'rand' else None
  return tuple(make[name]()._replace(eot_samples=draws) for name in names)


def auto_attack(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel, *,
    version: Version = 'standard',
    attacks: Sequence[str | AttackSpec] | None = None,
    store: str | os.PathLike[str] | None = None,
    options: EvalOptions | None = None) -> AttackResult:
  """Robust accuracy under AutoAttack.

  Args:
    key: a PRNG key. An attack draws the same randomness alone and in a list.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2, traceable by JAX, for
      example `lambda x: model.apply(variables, x)` in eval mode, with the
      normalization inside. Logits, not probabilities.
    images: [N, ...], N >= 1, rank >= 2, inside the box of `threat`, usually
      [0, 1]. Square needs [N, H, W, channels]; H and W may differ.
    labels: integers [N] in [0, C).
    threat: L_inf, L_2 or L_1.
    version: the list of attacks, unless `attacks` is given.

      * 'standard': APGD-CE, APGD-T (9 targets), FAB-T (9 targets) and Square
        (5000 queries).
      * 'plus': APGD-CE, APGD-DLR and FAB with 5 restarts each, Square, APGD-T
        and FAB-T.
      * 'rand', for randomized models: APGD-CE and APGD-DLR on gradients
        averaged over 20 draws. It needs `EvalOptions.takes_key`.
      * 'fast': only APGD-CE and APGD-T. In nine published logs of 'standard'
        these two determine the robust accuracy to within 0.02 percentage
        points, in 24 to 33 % of the time. The error can be far larger on a
        model that masks its gradients, and this version cannot detect that.
    attacks: names from `ATTACKS`, or specs, to run instead, in this order.
    store: a folder from which an interrupted call resumes, short for
      `EvalOptions(store=...)`.
    options: batching, resuming, reporting and devices.

  Returns:
    Verdicts, adversarial examples, what each attack broke, and warnings.
    With few classes there are fewer targets, and differences of logits replace
    the DLR losses (which need 3 classes, 4 if targeted), with a warning.

  Raises:
    ValueError: for an unknown version or attack, images outside the box or
      with NaN, labels out of range, wrong shapes, no examples, or 'rand' for
      a model without a key; before anything is compiled.

  References:
    Croce and Hein, Reliable Evaluation of Adversarial Robustness with an
    Ensemble of Diverse Parameter-free Attacks, ICML 2020.
  """
  checks.one_of('version', version, VERSIONS)
  options = EvalOptions() if options is None else options
  if store is not None:
    if options.store is not None:
      raise ValueError(
          f'store={str(store)!r} and EvalOptions.store={str(options.store)!r} '
          'were both given.')
    options = dataclasses.replace(options, store=store)
  chosen = VERSIONS[version] if attacks is None else attacks
  if version == 'rand' and not options.takes_key:
    raise ValueError(
        "version='rand' is for randomized models: pass logits_fn(images, key) "
        "and EvalOptions(takes_key=True), or use version='standard' for a "
        'deterministic model.')
  specs = []
  for attack in chosen:
    if isinstance(attack, str):
      attack, = make_specs((attack,), threat.norm, version)
    elif version == 'rand' and attack.eot_samples is None:
      attack = attack._replace(eot_samples=RAND_DRAWS)
    specs.append(attack)
  return evaluate.evaluate(
      key, logits_fn, images, labels, threat, specs, options=options)
