"""Runs a list of attacks, each on what the ones before left standing.

The examples lie on the host and stream through the device in batches of one
fixed size. After each group of examples `EvalOptions.progress` hears what
happened; handed back as `EvalOptions.done`, those records resume an evaluation
where it was interrupted, with the same result. Verdicts are made in float32 at
matrix precision 'float32' (see `judging`), whatever the attacks compute with.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks, loops, sharding
from awp_jax.evaluation import (
  arguments,
  diagnostics,
  driver,
  fingerprint,
  results,
  slots,
  threads,
  verdicts,
)
from awp_jax.evaluation.driver import Job
from awp_jax.evaluation.model import Model, average_gradients, make_model
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import AttackResult, AttackWarning, BatchResult
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

#: Batches are this much larger where no gradient is taken, off the CPU.
_FORWARD_BATCH = 4

#: Batches per group on the CPU; elsewhere batches are large and groups hold
#: fewer, so that progress is reported and saved as often.
_BATCHES_PER_GROUP = 8
_FEWER_BATCHES_PER_GROUP = 2

#: What `jax.default_matmul_precision` is set to where verdicts are made.
JUDGING_PRECISION = 'float32'


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
    eot_samples: over how many draws of a randomised model a gradient is averaged;
      None means 20 for the attacks of version 'rand' and 1 otherwise.
    check_model: whether to look for signs of an unreliable evaluation first.
    attack_precision: of matrix products and convolutions inside the attacks, as
      `jax.default_matmul_precision` takes it; None leaves the caller's setting.
      Verdicts are always made at 'float32'. A lower precision makes attacks
      faster and somewhat weaker on accelerators.
  """

  batch_size: int | None = None
  group_size: int | None = None
  devices: Sequence[jax.Device] | None = None
  progress: Callable[[BatchResult], None] | None = None
  done: Sequence[BatchResult] = ()
  keep_images: bool = True
  takes_key: bool = False
  eot_samples: int | None = None
  check_model: bool = True
  attack_precision: str | None = 'float32'


class _Setting(NamedTuple):
  """Everything that stays the same through an evaluation.

  Attributes:
    key: a PRNG key.
    model: the model as attacks see it.
    judging: what verdicts are made with.
    images: [N, ...], on the host.
    labels: [N].
    sizes: batch sizes of attacks by gradients.
    forward_sizes: of the others.
    group_size: examples per record.
    num_streams: batches side by side.
    identity: of the evaluation; '' where no record is taken or given.
  """

  key: Array
  model: Model
  judging: verdicts.JudgeSettings
  images: np.ndarray
  labels: np.ndarray
  sizes: tuple[int, ...]
  forward_sizes: tuple[int, ...]
  group_size: int
  num_streams: int
  identity: str


def _check_model(
    setting: _Setting, logits_fn: Callable[..., Array]) -> list[AttackWarning]:
  """Warns of a deterministic model's logits that are no function of images."""
  rows = next(verdicts.blocks(len(setting.labels), setting.judging.size))
  place = setting.judging.place
  keys = place(jax.random.split(setting.key, rows.size))
  batch = setting.images[rows]

  def logits(images: Array) -> Array:
    return setting.judging.model.logits(images, keys)

  found = diagnostics.check_randomized(logits_fn, logits, place(batch))
  if rows.size > 1:
    found += diagnostics.check_batch_dependence(logits, batch, place)
  return found


def _make_job(setting: _Setting, spec: AttackSpec, eot_samples: int) -> Job:
  model = average_gradients(setting.model, eot_samples)
  attack = spec.build(model, setting.judging.threat)
  checks.count(f'num_runs of attack {spec.name!r}', attack.num_runs)
  return Job(
      attack, driver.make_advance(attack, model.takes_key),
      jax.random.fold_in(setting.key, zlib.crc32(spec.name.encode())),
      setting.sizes if spec.white_box else setting.forward_sizes,
      setting.judging.place, verdicts.make_judge(setting.judging, spec.name))


def _attack_group(
    setting: _Setting, name: str, job: Job, indices: np.ndarray,
    targets: np.ndarray) -> BatchResult:
  begin = time.perf_counter()
  group = verdicts.Group(
      indices, np.asarray(setting.images[indices]), setting.labels[indices],
      targets[indices])
  outcome = threads.attack_group(job, group, streams=setting.num_streams)
  broken = outcome.broken
  anomalies = results.Anomalies(*(
      int(np.sum(getattr(outcome, field)))
      for field in results.Anomalies._fields))
  return BatchResult(
      name, indices, broken, outcome.adversarial[broken],
      outcome.distances[broken], anomalies, time.perf_counter() - begin,
      setting.identity)


def _taken_over(
    record: BatchResult, name: str, indices: np.ndarray, identity: str
) -> BatchResult:
  if record.attack != name or not np.array_equal(record.indices, indices):
    raise ValueError(
        'EvalOptions.done belongs to another evaluation: it holds '
        f'{record.attack} on {len(record.indices)} examples where {name} on '
        f'{len(indices)} is due. The arguments, batch and group sizes must be '
        'those of the interrupted run.')
  if not identity:
    raise ValueError(
        'EvalOptions.done cannot be resumed: an attack of this evaluation does '
        'not say what it depends on. Give its AttackSpec its `settings`.')
  if record.identity != identity:
    raise ValueError(
        'EvalOptions.done belongs to another evaluation: key, model, weights, '
        'images, labels, threat model, attacks, settings or versions differ '
        f'(identity {record.identity[:12]!r} where {identity[:12]!r} is due).')
  return record


def _run(
    setting: _Setting, natural: verdicts.Natural, specs: Sequence[AttackSpec],
    options: EvalOptions, found: list[AttackWarning],
    judged: results.Judgement) -> AttackResult:
  robust = natural.correct.copy()
  adversarial = setting.images.copy() if options.keep_images else None
  done = iter(options.done)
  reports: list[results.AttackReport] = []
  for number, spec in enumerate(specs):
    job = _make_job(
        setting, spec, options.eot_samples or spec.eot_samples or 1)
    standing = np.flatnonzero(robust)
    seconds, broken, far = 0.0, [standing[:0]], 0.0
    anomalies = results.Anomalies()
    for begin in range(0, standing.size, setting.group_size):
      indices = standing[begin:begin + setting.group_size]
      record = next(done, None)
      if record is not None:
        record = _taken_over(record, spec.name, indices, setting.identity)
      else:
        record = _attack_group(
            setting, spec.name, job, indices, natural.targets)
        if options.progress is not None:
          options.progress(record)
      fallen = indices[record.broken]
      robust[fallen] = False
      if adversarial is not None:
        adversarial[fallen] = record.adversarial
      broken.append(fallen)
      seconds += record.seconds
      anomalies = anomalies.plus(record.anomalies)
      far = max([far, *map(float, record.distances)])
    fallen = np.concatenate(broken)
    found += diagnostics.after_attack(
        spec, anomalies, fallen.size / robust.size,
        any(before.white_box for before in specs[:number]))
    reports.append(results.AttackReport(
        spec.name, seconds, float(robust.mean()), fallen, far, anomalies))
  return AttackResult(
      adversarial, robust, natural.correct, float(natural.correct.mean()),
      float(robust.mean()), tuple(reports), tuple(found), judged)


def _make_setting(
    key: Array, logits_fn: Callable[..., Array], traced: arguments.Traced,
    images: np.ndarray, labels: np.ndarray, threat: ThreatModel,
    specs: Sequence[AttackSpec], options: EvalOptions) -> _Setting:
  """Checks what streams how, and makes the pieces of an evaluation."""
  batch_size = options.batch_size
  if batch_size is None:
    batch_size = 64 if loops.unrolls() else 512
  checks.count('batch_size', batch_size)
  num_devices = len(options.devices) if options.devices else 1
  if batch_size % num_devices:
    raise ValueError(
        f'batch_size must be a multiple of the {num_devices} devices, got '
        f'{batch_size}.')
  group_size = options.group_size
  if group_size is None:
    group_size = batch_size * (
        _BATCHES_PER_GROUP if loops.unrolls() else _FEWER_BATCHES_PER_GROUP)
  checks.count('group_size', group_size)

  def make(precision: str | None) -> Model:
    return make_model(
        logits_fn, traced.num_classes, takes_key=options.takes_key,
        precision=precision, devices=options.devices)

  model = judge = make(JUDGING_PRECISION)
  if options.attack_precision != JUDGING_PRECISION:
    model = make(options.attack_precision)
  # Threefry, whatever the caller's kind: others draw for a whole batch at once,
  # and an example's draws must not depend on its neighbours.
  seed = jax.random.bits(key, (2,), jnp.uint32)
  key = jax.random.wrap_key_data(seed, impl='threefry2x32')
  side_by_side = 1 if options.devices else threads.num_streams(batch_size)
  forward = 1 if loops.unrolls() else _FORWARD_BATCH
  sizes, forward_sizes = (
      slots.batch_sizes(size // side_by_side, num_devices)
      for size in (batch_size, forward * batch_size))
  name = ''
  if options.progress is not None or options.done:
    name = fingerprint.identify(
        key, traced, images, labels, threat, specs,
        {'eot_samples': options.eot_samples, 'batch_size': batch_size,
         'attack_precision': options.attack_precision})
  judging = verdicts.JudgeSettings(
      judge, threat, key, sizes[0],
      functools.partial(sharding.shard, devices=options.devices))
  return _Setting(
      key, model, judging, images, labels, sizes, forward_sizes, group_size,
      side_by_side, name)


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
  # `asanyarray` keeps memory maps unloaded.
  images = np.asanyarray(images)
  labels = np.asarray(labels)
  arguments.check_images(images, threat)
  if images.dtype != np.float32 and images.dtype != np.float64:
    images = images.astype(np.float32)
  with jax.default_matmul_precision(JUDGING_PRECISION):
    traced = arguments.trace_model(logits_fn, images, options.takes_key)
  arguments.check_labels(labels, len(images), traced.num_classes)
  arguments.check_specs(
      specs, images.ndim, options.takes_key, options.eot_samples)
  setting = _make_setting(
      key, logits_fn, traced, images, labels.astype(np.int32), threat, specs,
      options)
  natural = verdicts.judge_natural(
      setting.judging, images, setting.labels,
      max(spec.num_targets for spec in specs))
  found = diagnostics.about_logits(
      natural.nonfinite, natural.probable and options.check_model, traced)
  if options.check_model:
    if not options.takes_key:
      found += _check_model(setting, logits_fn)
    found += diagnostics.check_classes(specs, traced.num_classes)
    found += diagnostics.check_layout(specs, images.shape[1:])
  judged = results.Judgement(
      natural.dtype, str(traced.dtype), traced.product, JUDGING_PRECISION,
      tuple(device.device_kind for device in natural.devices),
      fingerprint.versions())
  return _run(setting, natural, specs, options, found, judged)
