"""The interface of an attack: pure functions on a batch, and their records.

A custom attack is an `AttackSpec` whose `build` returns a `BoundAttack`.
`awp_jax.evaluate` and `awp_jax.auto_attack(attacks=...)` run it like any other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from awp_jax.evaluation.model import Model
from awp_jax.threat import ThreatModel
from awp_jax.types import Array


class Examples(NamedTuple):
  """The batch of examples that an attack receives.

  Attributes:
    images: natural images [B, ...].
    labels: [B].
    targets: the wrong classes in falling order of their natural logits, [B, T].
    keys: a PRNG key per example and run, [B].
    runs: number of the restart or target, [B], from 0.
  """

  images: Array
  labels: Array
  targets: Array
  keys: Array
  runs: Array


class Report(NamedTuple):
  """Result of one step for each example.

  Attributes:
    candidates: the inputs that the step evaluated, [B, ...]; inside ball and
      box where `broken`.
    broken: whether the candidate is misclassified, [B].
    finished: whether the run is over, [B].
    zero_gradient: whether every entry of the gradient at the start was zero,
      [B].
    nonfinite: whether the gradient had entries that are not finite, [B]; None
      means False for all.
    margin: how far the candidate is misclassified, [B], as `model.margins`;
      -inf where it does not count, such as outside the ball. Of the candidates
      of a run, those of higher margin are judged. None judges the first one
      that is `broken`.
  """

  candidates: Array
  broken: Array
  finished: Array
  zero_gradient: Array
  nonfinite: Array | None = None
  margin: Array | None = None


class BoundAttack(NamedTuple):
  """An attack on batches.

  Attributes:
    num_runs: restarts times targets, >= 1.
    init: examples -> state, any pytree of arrays with a leading batch axis.
    step: (examples, state) -> (state, report), a pure function that keeps the
      shapes and dtypes of the state. Entry i of each array may depend on
      example i only.
  """

  num_runs: int
  init: Callable[[Examples], Any]
  step: Callable[[Examples, Any], tuple[Any, Report]]


class BuildAttack(Protocol):
  """Makes an attack on a model within a threat model."""

  def __call__(self, model: Model, threat: ThreatModel, /) -> BoundAttack:
    """Makes the attack without compiling anything."""
    ...


class AttackSpec(NamedTuple):
  """An attack by name, not yet bound to a model.

  Attributes:
    name: unique within an evaluation; seeds the randomness of the attack.
    build: makes the attack.
    white_box: whether it uses gradients.
    num_targets: number of target classes; 0 if untargeted.
    min_classes: fewest classes for which its loss is defined; with fewer, it
      ascends a plain difference of logits.
    needs_images: whether inputs must be [B, H, W, C].
    eot_samples: draws of a randomized model that each gradient is averaged
      over, unless the evaluation sets its own; more than 1 needs such a model.
    settings: everything that `build` depends on, by name: plain values, or
      functions of arrays, which are compared by their traces. Resuming an
      interrupted evaluation needs equal settings. None means unknown: such an
      attack is never resumed, and on CPUs its loop is not compiled.
  """

  name: str
  build: BuildAttack
  white_box: bool = True
  num_targets: int = 0
  min_classes: int = 2
  needs_images: bool = False
  eot_samples: int | None = None
  settings: Mapping[str, Any] | None = None


@jax.jit
def step_keys(keys: Array, time: Array) -> Array:
  """A key per example for its iteration `time`, [B]."""
  return jax.vmap(jax.random.fold_in)(keys, time)


@jax.jit
def run_keys(key: Array, indices: Array, runs: Array) -> Array:
  """A key per example and run, for any batch they are in: [B], [B] -> [B]."""
  def one(index: Array, run: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, index), run)
  return jax.vmap(one)(indices, runs)
