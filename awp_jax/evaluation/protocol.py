"""What an attack is: pure functions on a batch, and the records they exchange.

An attack of one's own is an `AttackSpec` whose `build` returns a `BoundAttack`.
`awp_jax.evaluate` and `awp_jax.auto_attack(attacks=...)` run it beside others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from awp_jax.evaluation.model import Model
from awp_jax.threat import ThreatModel
from awp_jax.types import Array


class Examples(NamedTuple):
  """What an attack knows of the examples in its batch.

  Attributes:
    images: natural images [B, ...].
    labels: [B].
    targets: the wrong classes in falling order of their natural logits, [B, T].
    keys: a PRNG key per example and run, [B].
    runs: which restart or target this is, [B], from 0.
  """

  images: Array
  labels: Array
  targets: Array
  keys: Array
  runs: Array


class Report(NamedTuple):
  """What one step says of each example.

  Attributes:
    candidates: the inputs that were judged, [B, ...], inside ball and box where
      `broken`.
    broken: whether the candidate is misclassified, [B].
    finished: whether the run is over, [B].
    zero_gradient: whether the gradient was zero in every entry at the start, [B].
    nonfinite: whether the gradient had entries that are not finite, [B]; None
      means nowhere.
  """

  candidates: Array
  broken: Array
  finished: Array
  zero_gradient: Array
  nonfinite: Array | None = None


class BoundAttack(NamedTuple):
  """An attack on batches.

  Attributes:
    num_runs: restarts times targets, >= 1.
    init: examples -> state, any pytree of arrays with a leading batch axis.
    step: (examples, state) -> (state, report). Entry i of everything depends on
      example i alone.
  """

  num_runs: int
  init: Callable[[Examples], Any]
  step: Callable[[Examples, Any], tuple[Any, Report]]


class BuildAttack(Protocol):
  """Makes an attack on a model within a threat model."""

  def __call__(self, model: Model, threat: ThreatModel, /) -> BoundAttack:
    """Makes the attack; compiles nothing yet."""
    ...


class AttackSpec(NamedTuple):
  """An attack by name, before it knows its model.

  Attributes:
    name: unique within an evaluation; randomness derives from it.
    build: makes the attack.
    white_box: whether it uses gradients.
    num_targets: how many target classes it wants, 0 if it is untargeted.
    min_classes: fewest classes for which its own loss is defined; below, it
      ascends a plain difference of logits.
    needs_images: whether inputs must be [B, H, W, C].
    eot_samples: over how many draws of a randomised model its gradients are
      averaged, unless the evaluation says; more than 1 needs such a model.
    settings: all that `build` depends on, by name: plain values, or functions
      of arrays, which are told apart by their traces. Records of an
      interrupted evaluation are resumed only where these are the same; None
      means that they are not known, and nothing is resumed.
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
  """A key per example and run, whatever batch they are in: [B], [B] -> [B]."""
  def one(index: Array, run: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, index), run)
  return jax.vmap(one)(indices, runs)
