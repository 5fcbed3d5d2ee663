"""Runs a list of attacks, each on what the ones before left standing.

The examples lie on the host and stream through the device in batches of one
fixed size. After each group of examples `EvalOptions.progress` hears what
happened; handed back as `EvalOptions.done`, those records resume an evaluation
where it was interrupted, with the same result.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import time
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax import checks, loops, placement
from awp_jax.attacks import arguments, diagnostics, engine, results, streams
from awp_jax.attacks.engine import AttackSpec
from awp_jax.attacks.model import Model, make_model, misclassified
from awp_jax.attacks.results import AttackResult, AttackWarning, BatchResult
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

#: Batches are this much larger where no gradient is taken, off the CPU.
_FORWARD_BATCH = 4

#: Groups hold this many batches unless told otherwise.
_BATCHES_PER_GROUP = 8


@dataclasses.dataclass(frozen=True)
class EvalOptions:
  """How examples stream through an evaluation; none changes what is attacked.

  Attributes:
    batch_size: examples on the device at a time, over all devices; None means
      64 on the CPU, where larger batches leave the caches, and 512 elsewhere.
      On the CPU they are divided into up to four batches that run side by side.
    group_size: examples per record of `progress`, and per unit of resuming;
      None means eight batches.
    devices: spread each batch over these; None means the default device.
    progress: called with a `BatchResult` after each group.
    done: records of an interrupted evaluation with the same arguments, in their
      order; they are taken over instead of attacking again.
    keep_images: whether the result holds the adversarial examples.
    takes_key: whether the model is randomised: `logits_fn(images, key)`.
    num_draws: over how many draws of a randomised model a gradient is averaged;
      None means 20 for version 'rand' and 1 otherwise.
    check_model: whether to look for signs of an unreliable evaluation first.
  """

  batch_size: int | None = None
  group_size: int | None = None
  devices: Sequence[jax.Device] | None = None
  progress: Callable[[BatchResult], None] | None = None
  done: Sequence[BatchResult] = ()
  keep_images: bool = True
  takes_key: bool = False
  num_draws: int | None = None
  check_model: bool = True


class _Setting(NamedTuple):
  """Everything that stays the same through an evaluation."""

  key: Array
  model: Model
  threat: ThreatModel
  images: np.ndarray
  labels: np.ndarray
  sizes: tuple[int, ...]
  forward_sizes: tuple[int, ...]
  group_size: int
  num_streams: int
  place: Callable[[Any], Any]


class _Natural(NamedTuple):
  """What the model says of the natural images: [N], [N, T], and oddities."""

  correct: np.ndarray
  targets: np.ndarray
  not_finite: int
  probable: bool


def _blocks(count: int, size: int) -> Iterator[np.ndarray]:
  """Rows of one batch after the other; the last repeats its last row."""
  for begin in range(0, count, size):
    yield np.minimum(np.arange(begin, begin + size), count - 1)


def _logits(model: Model, keys: Array, images: Array) -> Array:
  return model.logits(images, keys)


def _keys(key: Array, count: int) -> Array:
  return jax.random.split(key, count)


def _natural(setting: _Setting, num_targets: int) -> _Natural:
  """One pass over the natural images; of each, the likeliest wrong classes."""
  count, size = len(setting.labels), setting.sizes[0]
  wanted = max(1, min(num_targets, setting.model.num_classes - 1))
  correct = np.zeros(count, bool)
  targets = np.zeros((count, wanted), np.int32)
  not_finite, probable = 0, True
  key = jax.random.fold_in(setting.key, zlib.crc32(b'natural'))
  for turn, rows in enumerate(_blocks(count, size)):
    keys = _keys(jax.random.fold_in(key, turn), size)
    logits = np.asarray(setting.model.logits(
        setting.place(setting.images[rows]), setting.place(keys)), np.float32)
    labels = setting.labels[rows]
    strange, alike = diagnostics.check_logits(logits[:count - rows[0]])
    not_finite, probable = not_finite + strange, probable and alike
    correct[rows] = (
        np.isfinite(logits).all(axis=-1) & (logits.argmax(axis=-1) == labels))
    others = logits.copy()
    others[np.arange(size), labels] = -np.inf
    targets[rows] = np.argsort(-others, axis=-1, kind='stable')[:, :wanted]
  return _Natural(correct, targets, not_finite, probable)


def _check_model(
    setting: _Setting, logits_fn: Callable[..., Array], natural: _Natural,
    specs: Sequence[AttackSpec], takes_key: bool) -> list[AttackWarning]:
  rows = next(_blocks(len(setting.labels), setting.sizes[0]))
  keys = setting.place(_keys(setting.key, rows.size))
  found = diagnostics.about_logits(natural.not_finite, natural.probable)
  if not takes_key:
    batch = setting.images[rows]
    logits = functools.partial(_logits, setting.model, keys)
    found += diagnostics.check_randomized(
        logits_fn, logits, setting.place(batch))
    if rows.size > 1:
      found += diagnostics.check_batch_dependence(logits, batch, setting.place)
  return found + diagnostics.check_classes(specs, setting.model.num_classes)


@functools.partial(jax.jit, static_argnames=('threat',))
def _judge(
    logits: Array, x_adv: Array, labels: Array, images: Array,
    threat: ThreatModel) -> tuple[Array, Array]:
  return misclassified(logits, labels), threat.distance(x_adv, images)


def _confirm(
    setting: _Setting, attack_key: Array, group: engine.Group,
    outcome: engine.Outcome) -> tuple[np.ndarray, np.ndarray]:
  """Judges what an attack found once more, by the plain forward pass.

  The step of an attack is compiled with its gradient, and may round otherwise.

  Args:
    setting: the evaluation.
    attack_key: of the attack.
    group: the examples.
    outcome: what the attack did to them.

  Returns:
    Which examples are broken, [n], and their distances, [n].
  """
  broken = np.zeros(outcome.broken.size, bool)
  distances = np.zeros(outcome.broken.size, np.float32)
  candidates = np.flatnonzero(outcome.broken)
  size = setting.sizes[0]
  for block in _blocks(candidates.size, size):
    rows = candidates[block]
    x_adv = setting.place(outcome.adversarial[rows])
    keys = setting.place(_keys(attack_key, size))
    wrong, far = _judge(
        setting.model.logits(x_adv, keys), x_adv,
        setting.place(group.labels[rows]), setting.place(group.images[rows]),
        setting.threat)
    broken[rows] = np.asarray(wrong)
    distances[rows] = np.asarray(far)
  return broken, distances


def _attack_group(
    setting: _Setting, spec: AttackSpec, attack: engine.Attack,
    indices: np.ndarray, targets: np.ndarray) -> BatchResult:
  begin = time.perf_counter()
  group = engine.Group(
      indices, np.asarray(setting.images[indices]), setting.labels[indices],
      targets[indices])
  key = jax.random.fold_in(setting.key, zlib.crc32(spec.name.encode()))
  sizes = setting.sizes if spec.white_box else setting.forward_sizes
  outcome = streams.attack_group(
      attack, key, group, sizes=sizes, place=setting.place,
      streams=setting.num_streams)
  broken, distances = _confirm(setting, key, group, outcome)
  return BatchResult(
      spec.name, indices, broken, outcome.adversarial[broken],
      distances[broken], int(outcome.flat.sum()), time.perf_counter() - begin)


def _taken_over(
    record: BatchResult, spec: AttackSpec, indices: np.ndarray) -> BatchResult:
  if record.attack != spec.name or not np.array_equal(record.indices, indices):
    raise ValueError(
        'EvalOptions.done belongs to another evaluation: it holds '
        f'{record.attack} on {len(record.indices)} examples where '
        f'{spec.name} on {len(indices)} is due. The arguments, batch and group '
        'sizes must be those of the interrupted run.')
  return record


def _run(
    setting: _Setting, natural: _Natural, specs: Sequence[AttackSpec],
    options: EvalOptions, found: list[AttackWarning]) -> AttackResult:
  robust = natural.correct.copy()
  adversarial = setting.images.copy() if options.keep_images else None
  done = iter(options.done)
  reports: list[results.AttackReport] = []
  for number, spec in enumerate(specs):
    attack = spec.build(setting.model, setting.threat)
    standing = np.flatnonzero(robust)
    seconds, flat, broken, far = 0.0, 0, [standing[:0]], 0.0
    for begin in range(0, standing.size, setting.group_size):
      indices = standing[begin:begin + setting.group_size]
      record = next(done, None)
      if record is not None:
        record = _taken_over(record, spec, indices)
      else:
        record = _attack_group(setting, spec, attack, indices, natural.targets)
        if options.progress is not None:
          options.progress(record)
      fallen = indices[record.broken]
      robust[fallen] = False
      if adversarial is not None:
        adversarial[fallen] = record.adversarial
      broken.append(fallen)
      seconds, flat = seconds + record.seconds, flat + record.flat
      far = max([far, *map(float, record.distances)])
    fallen = np.concatenate(broken)
    found += diagnostics.after_attack(
        spec, flat, fallen.size / robust.size,
        any(before.white_box for before in specs[:number]))
    reports.append(results.AttackReport(
        spec.name, seconds, float(robust.mean()), fallen, far))
  return AttackResult(
      adversarial, robust, natural.correct, float(natural.correct.mean()),
      float(robust.mean()), tuple(reports), tuple(found))


def evaluate(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel,
    specs: Sequence[AttackSpec], *, options: EvalOptions | None = None
) -> AttackResult:
  """Runs attacks one after the other, each on what still stands.

  Args:
    key: a PRNG key. Each attack, example and run draws its own randomness from
      it, whatever the batch size and whichever attacks run beside it.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2, traceable by JAX.
    images: [N, ...], N >= 1, rank >= 2, in the box of `threat`; they stay on
      the host.
    labels: integers [N] in [0, C).
    threat: what the adversary may do.
    specs: the attacks, of different names.
    options: how the examples stream through.

  Returns:
    The result, on the host.

  Raises:
    ValueError: for arguments that are not as above, before anything compiles.
  """
  options = EvalOptions() if options is None else options
  # Arrays in a file mapped into memory stay there.
  images = np.asanyarray(images)
  labels = np.asarray(labels)
  arguments.check_images(images, threat)
  if images.dtype != np.float32 and images.dtype != np.float64:
    images = images.astype(np.float32)
  num_classes = arguments.count_classes(logits_fn, images, options.takes_key)
  arguments.check_labels(labels, len(images), num_classes)
  arguments.check_specs(specs, images.ndim)
  batch_size = options.batch_size
  if batch_size is None:
    batch_size = 64 if loops.unrolls() else 512
  checks.count('batch_size', batch_size)
  num_devices = len(options.devices) if options.devices else 1
  if batch_size % num_devices:
    raise ValueError(
        f'batch_size must be a multiple of the {num_devices} devices, got '
        f'{batch_size}.')
  group_size = options.group_size or _BATCHES_PER_GROUP * batch_size
  checks.count('group_size', group_size)
  model = make_model(
      logits_fn, num_classes, takes_key=options.takes_key,
      num_draws=options.num_draws or 1)
  # Threefry, whatever the caller's kind: others draw for a whole batch at once,
  # and an example's draws must not depend on its neighbours.
  seed = jax.random.bits(key, (2,), jnp.uint32)
  side_by_side = 1 if options.devices else streams.num_streams(batch_size)
  forward = 1 if loops.unrolls() else _FORWARD_BATCH
  setting = _Setting(
      jax.random.wrap_key_data(seed, impl='threefry2x32'), model, threat,
      images, labels.astype(np.int32),
      engine.batch_sizes(batch_size // side_by_side, num_devices),
      engine.batch_sizes(forward * batch_size // side_by_side, num_devices),
      group_size, side_by_side,
      functools.partial(placement.cut, devices=options.devices))
  natural = _natural(setting, max(spec.num_targets for spec in specs))
  found: list[AttackWarning] = []
  if options.check_model:
    found = _check_model(
        setting, logits_fn, natural, specs, options.takes_key)
  return _run(setting, natural, specs, options, found)
