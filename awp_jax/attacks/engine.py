"""What drives every attack: a fixed batch whose places are always filled.

An attack is a pair of pure functions on a batch: `init` makes a state, `step`
moves it on by one iteration and reports which examples it broke. The engine
owns the loop. Its work is a queue of tasks (example, run), where a run is a
restart or a target class, ordered by run, and a batch of B places:

  step all places;  where an example broke or a run ended, take it out;
  drop what is queued for broken examples;  fill the free places from the queue.

Places run at their own iteration each, so no time goes to broken examples and
no shape changes. When the queue is empty the batch shrinks, to one of a few
sizes. An example is broken as soon as one iterate is misclassified, so
leaving early changes no verdict.

Randomness belongs to (attack, example, run), never to a place in the batch.
Which of several runs gets the credit for an example can depend on the batch
size; whether one of them does can not, but for rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax import loops
from awp_jax.attacks.model import Model
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
    flat: whether the gradient was zero in every entry at the start, [B].
  """

  candidates: Array
  broken: Array
  finished: Array
  flat: Array


class Attack(NamedTuple):
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

  def __call__(self, model: Model, threat: ThreatModel, /) -> Attack:
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
  """

  name: str
  build: BuildAttack
  white_box: bool = True
  num_targets: int = 0
  min_classes: int = 2
  needs_images: bool = False


class Group(NamedTuple):
  """Examples on the host that are attacked together.

  Attributes:
    indices: their places in the whole data set, [n].
    images: [n, ...].
    labels: [n].
    targets: [n, T].
  """

  indices: np.ndarray
  images: np.ndarray
  labels: np.ndarray
  targets: np.ndarray


class Outcome(NamedTuple):
  """What an attack did to a group.

  Attributes:
    broken: [n].
    adversarial: [n, ...]; the natural image where not broken.
    flat: examples with an all-zero gradient at a start, [n].
  """

  broken: np.ndarray
  adversarial: np.ndarray
  flat: np.ndarray


class _Carry(NamedTuple):
  examples: Examples
  state: Any
  found: Report


class _Places(NamedTuple):
  """Which task sits in which place: example -1 where it is idle."""

  example: np.ndarray
  run: np.ndarray


#: Iterations at one batch size before another is worth compiling.
_SHRINK_AFTER = 64


def batch_sizes(batch_size: int, num_devices: int) -> tuple[int, ...]:
  """The full batch and the smaller ones that the end of a queue shrinks to.

  On the CPU idle places cost as much as busy ones, so the sizes lie close; an
  accelerator hardly notices them, and compiles for longer.
  """
  if loops.unrolls():
    parts = (batch_size >> k for k in range(8))
    sizes = sorted({s for p in parts for s in (p, p * 3 // 4)}, reverse=True)
  else:
    sizes = [batch_size, batch_size // 4, batch_size // 16]
  return tuple(
      s for s in sizes
      if s == batch_size or (s >= 8 and s % num_devices == 0))


def _rows(mask: Array, new: Array, old: Array) -> Array:
  return jnp.where(mask.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)


@jax.jit
def _merge(fresh: Array, new: _Carry, old: _Carry) -> _Carry:
  return jax.tree.map(lambda a, b: _rows(fresh, a, b), new, old)


@jax.jit
def _take(carry: _Carry, rows: Array) -> _Carry:
  return jax.tree.map(lambda leaf: leaf[rows], carry)


@jax.jit
def _note(found: Report, report: Report) -> tuple[Report, Array]:
  """Adds a report to what was found so far; the first success is kept."""
  news = report.broken & ~found.broken & ~found.finished
  total = Report(
      _rows(news, report.candidates, found.candidates),
      found.broken | news, found.finished | report.finished,
      found.flat | report.flat)
  return total, total.broken | total.finished


@jax.jit
def step_keys(keys: Array, time: Array) -> Array:
  """A key per example for its iteration `time`, [B]."""
  return jax.vmap(jax.random.fold_in)(keys, time)


@jax.jit
def _keys(key: Array, indices: Array, runs: Array) -> Array:
  def one(index: Array, run: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, index), run)
  return jax.vmap(one)(indices, runs)


def _load(
    attack: Attack, key: Array, group: Group, places: _Places,
    place: Callable[[Any], Any]) -> _Carry:
  rows = np.maximum(places.example, 0)
  images, labels, targets, indices, runs = place((
      group.images[rows], group.labels[rows], group.targets[rows],
      group.indices[rows].astype(np.int32), places.run.astype(np.int32)))
  examples = Examples(images, labels, targets, _keys(key, indices, runs), runs)
  no = jnp.zeros_like(labels, dtype=bool)
  return _Carry(examples, attack.init(examples), Report(images, no, no, no))


def _tasks(
    count: int, num_runs: int, broken: np.ndarray
) -> Iterator[tuple[int, int]]:
  """The queue; reads `broken` as it stands when a task is taken."""
  for run in range(num_runs):
    for example in range(count):
      if not broken[example]:
        yield example, run


def _fill(
    places: _Places, tasks: Iterator[tuple[int, int]], sizes: tuple[int, ...],
    may_shrink: bool) -> tuple[_Places, np.ndarray, np.ndarray]:
  """Puts tasks into idle places; shrinks the batch when the queue runs dry.

  Args:
    places: what sits where.
    tasks: the queue.
    sizes: the batch sizes allowed, largest first.
    may_shrink: whether the size may change now.

  Returns:
    The next places, the old row of each, and which of them are fresh.
  """
  example, run = places.example.copy(), places.run.copy()
  fresh = np.zeros(example.size, bool)
  dry = False
  for row in np.flatnonzero(example < 0):
    task = next(tasks, None)
    if task is None:
      dry = True
      break
    example[row], run[row] = task
    fresh[row] = True
  rows = np.arange(example.size)
  occupied = int(np.sum(example >= 0))
  size = min((s for s in sizes if s >= occupied), default=example.size)
  if dry and may_shrink and size < example.size:
    # Idle places last, in their old order otherwise.
    rows = np.argsort(example < 0, kind='stable')[:size]
  return _Places(example[rows], run[rows]), rows, fresh[rows]


def _refill(
    attack: Attack, key: Array, group: Group, carry: _Carry | None,
    filled: tuple[_Places, np.ndarray, np.ndarray],
    place: Callable[[Any], Any]) -> _Carry:
  places, rows, fresh = filled
  if carry is None:
    return _load(attack, key, group, places, place)
  if rows.size < carry.examples.labels.size:
    carry = place(_take(carry, rows))
  if fresh.any():
    new = _load(attack, key, group, places, place)
    carry = _merge(place(fresh), new, carry)
  return carry


def _nothing_around(batch_size: int) -> AbstractContextManager[None]:
  del batch_size
  return nullcontext()


def attack_group(
    attack: Attack, key: Array, group: Group, *, sizes: tuple[int, ...],
    place: Callable[[Any], Any],
    around: Callable[[int], AbstractContextManager[None]] = _nothing_around
) -> Outcome:
  """Runs an attack on a group until every example is broken or out of runs.

  Args:
    attack: the attack.
    key: a PRNG key; example i, run r draw from fold_in(fold_in(key, i), r).
    group: the examples, all of them standing; memory on the device depends on
      the batch size, not on their number.
    sizes: batch sizes as `batch_sizes` gives them.
    place: puts arrays with a leading batch axis onto the devices.
    around: makes the context, given the batch size, of each call of the device.

  Returns:
    The outcome.
  """

  def iterate(
      carry: tuple[_Carry, Array]) -> tuple[_Carry, Array]:
    (examples, state, found), _ = carry
    state, report = attack.step(examples, state)
    found, over = _note(found, report)
    return _Carry(examples, state, found), over

  advance = loops.chunked(iterate)
  count = group.labels.size
  broken, flat = np.zeros(count, bool), np.zeros(count, bool)
  adversarial = group.images.copy()
  tasks = _tasks(count, attack.num_runs, broken)
  width = min((s for s in sizes if s >= count), default=sizes[0])
  places = _Places(np.full(width, -1), np.zeros(width, int))
  carry: _Carry | None = None
  steps = 0
  while True:
    filled = _fill(places, tasks, sizes, steps >= _SHRINK_AFTER)
    steps = steps if filled[0].run.size == places.run.size else 0
    places = filled[0]
    occupied = places.example >= 0
    if not occupied.any():
      return Outcome(broken, adversarial, flat)
    carry = _refill(attack, key, group, carry, filled, place)
    over = np.zeros(occupied.size, bool)
    patience = min(int(occupied.sum()), max(1, occupied.size // 8))
    pair = (carry, place(over))
    while np.sum(over & occupied) < patience:
      with around(occupied.size):
        pair = advance(pair)
      steps += loops.chunk_size()
      over = np.asarray(pair[1])
    carry = pair[0]
    won = occupied & np.asarray(carry.found.broken)
    seen = occupied & np.asarray(carry.found.flat)
    flat[places.example[seen]] = True
    if won.any():
      broken[places.example[won]] = True
      adversarial[places.example[won]] = np.asarray(
          carry.found.candidates)[won]
    # Another run of an example that has just been broken leaves as well.
    gone = occupied & (over | broken[np.maximum(places.example, 0)])
    places = _Places(np.where(gone, -1, places.example), places.run)
