"""The loop that steps every attack, on a batch of fixed size.

An attack is a pair of pure functions on a batch: `init` makes a state, `step`
advances it by one iteration and reports which examples it broke. The driver
owns the loop. It has a queue of tasks (example, run), ordered by run, where a
run is a restart or a target class, and a batch of B places:

  step all places;  if a run ended or broke its example, check the candidate;
  drop the tasks of broken examples;  refill free places from the queue.

Each place has its own iteration number, so no time is spent on broken examples
and no shape changes. On a deterministic model a run ends at its first
misclassified iterate. On a randomized model it runs to its end and its last
misclassified iterate is checked, since one draw of many misclassified the
first. If the check rejects a candidate, the example is still robust: the run
continues unless it is over, and the example's other runs stay in the queue.

An attack may use another model than the verdicts, such as the same network in
bfloat16. Then many candidates can be rejected. On a deterministic model, if the
attack reports margins, the candidate after a rejection at margin m is checked
at a margin above 2 m, so a run has few checks; and at the end of a run its
candidate of the largest margin is checked, whether or not the attack's model
misclassifies it. Examples that stay robust with a rejected candidate, or one
that the verdicts nearly misclassify, are attacked again with the model of the
verdicts (`evaluate`).

Randomness depends on (attack, example, run), never on the place in the batch.
The batch size can change which of several runs gets credit for an example.
It does not change whether one of them succeeds, up to rounding.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from awp_jax.core import loops
from awp_jax.evaluation.engine import slots
from awp_jax.evaluation.engine.slots import (
  Advance,
  Carry,
  Filled,
  Found,
  Places,
)
from awp_jax.evaluation.protocol import BoundAttack, Examples, run_keys
from awp_jax.evaluation.verdicts import CheckCandidates, Group
from awp_jax.types import Array


class Outcome(NamedTuple):
  """Results of an attack on a group.

  Attributes:
    broken: [n].
    adversarial: [n, ...]; the natural image where not broken.
    distances: between adversarial and natural images, [n].
    zero_gradient: examples with an all-zero gradient at a start, [n].
    nonfinite_gradient: with gradient entries that are not finite, [n].
    nonfinite_logits: broken by logits that are not finite, [n].
    outside: with a candidate that has NaN or is outside ball or box, [n].
    refused: with a candidate inside that the attack's model misclassified and
      the check did not, [n].
    close: with a candidate that is `Verdicts.close`, [n].
  """

  broken: np.ndarray
  adversarial: np.ndarray
  distances: np.ndarray
  zero_gradient: np.ndarray
  nonfinite_gradient: np.ndarray
  nonfinite_logits: np.ndarray
  outside: np.ndarray
  refused: np.ndarray
  close: np.ndarray


def no_outcome(group: Group) -> Outcome:
  """The outcome before the first step."""
  count = group.labels.size
  return Outcome(
      np.zeros(count, bool), group.images.copy(), np.zeros(count, np.float32),
      *(np.zeros(count, bool) for _ in range(6)))


class Job(NamedTuple):
  """An attack with everything that its groups share.

  Attributes:
    attack: the attack.
    advance: runs it until enough places are free or enough iterations made.
    key: a PRNG key; run r of example i draws from fold_in(fold_in(key, i), r).
    sizes: batch sizes of `slots.batch_sizes`.
    place: puts arrays with a leading batch axis onto the devices.
    check: decides which candidates count.
    own_model: whether the attack uses another model than the verdicts. Then
      candidates are checked without delay, so that runs do not depend on the
      rest of their batch.
    operations: floating-point operations of an iteration per example; with 0
      the batch keeps its size.
  """

  attack: BoundAttack
  advance: Advance
  key: Array
  sizes: tuple[int, ...]
  place: Callable[[Any], Any]
  check: CheckCandidates
  own_model: bool = False
  operations: float = 0.0


#: In each group a smaller batch is chosen after this many floating-point
#: operations on idle places, about those made in the time of compiling: on CPUs
#: (0.3 TFLOP/s and 1.2 s were measured on two cores), and elsewhere (assumed:
#: 100 TFLOP/s and 10 s). A count, unlike a time, gives the same batches in
#: every evaluation.
_COMPILING = 4e11
_COMPILING_ELSEWHERE = 1e15

@jax.jit
def _merge(fresh: Array, new: Carry, old: Carry) -> Carry:
  return jax.tree.map(lambda a, b: slots.select(fresh, a, b), new, old)


@jax.jit
def _take(carry: Carry, rows: Array) -> Carry:
  return jax.tree.map(lambda leaf: leaf[rows], carry)


def _load(job: Job, group: Group, places: Places) -> Carry:
  rows = np.maximum(places.example, 0)
  images, labels, targets, indices, runs, no, low = job.place((
      group.images[rows], group.labels[rows], group.targets[rows],
      group.indices[rows].astype(np.int32), places.run.astype(np.int32),
      np.zeros(rows.size, bool), np.full(rows.size, -np.inf, np.float32)))
  examples = Examples(
      images, labels, targets, run_keys(job.key, indices, runs), runs)
  return Carry(
      examples, job.attack.init(examples),
      Found(images, no, no, no, no, no, low, low))


def _refill(
    job: Job, group: Group, carry: Carry | None, filled: Filled) -> Carry:
  if carry is None:
    return _load(job, group, filled.places)
  if filled.rows.size < carry.examples.labels.size:
    carry = job.place(_take(carry, filled.rows))
  if filled.fresh.any():
    new = _load(job, group, filled.places)
    carry = _merge(job.place(filled.fresh), new, carry)
  return carry


def _collect(
    job: Job, group: Group, places: Places, rows: np.ndarray, found: Found,
    outcome: Outcome) -> None:
  """Checks candidates and records those that count.

  Args:
    job: the attack.
    group: its examples.
    places: the task in each place.
    rows: the places with a candidate.
    found: the results of their runs.
    outcome: of the group so far; updated in place.
  """
  examples = places.example[rows]
  candidates = np.asarray(found.candidates)[rows]
  part = Group(*(leaf[examples] for leaf in group))
  verdicts = job.check(part, places.run[rows], candidates)
  outcome.outside[examples[verdicts.outside]] = True
  outcome.close[examples[verdicts.close]] = True
  claimed = np.asarray(found.broken)[rows]
  outcome.refused[
      examples[claimed & ~verdicts.broken & ~verdicts.outside]] = True
  # Of two runs of one example, the earlier gets the credit.
  for row in np.argsort(-places.run[rows], kind='stable'):
    if verdicts.broken[row]:
      example = examples[row]
      outcome.broken[example] = True
      outcome.adversarial[example] = candidates[row]
      outcome.distances[example] = verdicts.distances[row]
      outcome.nonfinite_logits[example] = verdicts.nonfinite[row]


def _nothing_around(batch_size: int) -> AbstractContextManager[None]:
  del batch_size
  return nullcontext()


def attack_group(
    job: Job, group: Group, *,
    around: Callable[[int], AbstractContextManager[None]] = _nothing_around
) -> Outcome:
  """Runs an attack on a group until every example is broken or out of runs.

  Args:
    job: the attack.
    group: the examples, all of them robust so far. Memory on the device depends
      on the batch size, not on their number.
    around: batch size -> context manager around each call on the device.

  Returns:
    The outcome.
  """
  count, outcome = group.labels.size, no_outcome(group)
  queue = slots.tasks(count, job.attack.num_runs, outcome.broken)
  width = slots.first_size(job.sizes, count * job.attack.num_runs)
  places = Places(np.full(width, -1), np.zeros(width, int))
  carry: Carry | None = None
  worth = _COMPILING if loops.unrolls() else _COMPILING_ELSEWHERE
  wasted, limit = 0.0, 1
  while True:
    filled = slots.fill(places, queue, job.sizes, wasted >= worth)
    wasted = wasted if filled.rows.size == places.run.size else 0.0
    places = filled.places
    busy = places.example >= 0
    if not busy.any():
      return outcome
    carry = _refill(job, group, carry, filled)
    over = np.zeros_like(busy)
    # On CPUs a return to the host is cheap.
    patience = 1 if job.own_model or loops.unrolls() else min(
        int(busy.sum()), max(1, busy.size // 8))
    waste = job.operations * slots.spare(busy, job.sizes)
    while np.sum(over & busy) < patience and wasted < worth:
      most = min(limit, math.ceil((worth - wasted) / waste)) if waste else limit
      with around(busy.size):
        begin = time.perf_counter()
        carry, over, made = job.advance(carry, busy, patience, most)
        limit = slots.next_limit(limit, made, time.perf_counter() - begin)
      wasted += made * waste
    found = carry.found
    finished = np.asarray(found.finished)
    for seen, field in ((found.zero_gradient, outcome.zero_gradient),
                        (found.nonfinite, outcome.nonfinite_gradient)):
      field[places.example[busy & np.asarray(seen)]] = True
    claimed = busy & over & np.asarray(found.pending)
    if claimed.any():
      _collect(job, group, places, np.flatnonzero(claimed), found, outcome)
    broken = outcome.broken[np.maximum(places.example, 0)]
    refused = claimed & ~broken & ~finished
    if refused.any():
      carry = carry._replace(found=slots.clear_refused(
          found, job.place(refused)))
    # Other runs of an example that was just broken are dropped too.
    done = busy & (finished | broken)
    places = Places(np.where(done, -1, places.example), places.run)
