"""Runs a list of attacks, each on the examples that survived the earlier ones.

The examples stay on the host and stream through the device in batches of one
fixed size. `EvalOptions.progress` gets a record after each group of examples.
Passed as `EvalOptions.done`, these records resume an interrupted evaluation
with the same result. Verdicts are computed in float32 at matrix precision
'float32' (see `verdicts`), whatever the attacks' precision and model.
"""

from collections.abc import Callable, Sequence
import time
import zlib

import jax
import numpy as np

from awp_jax.core import checks
from awp_jax.evaluation import (
  arguments,
  diagnostics,
  fingerprint,
  results,
  verdicts,
)
from awp_jax.evaluation import setting as setting_lib
from awp_jax.evaluation import store as store_lib
from awp_jax.evaluation.arguments import EvalOptions
from awp_jax.evaluation.engine import slots, threads
from awp_jax.evaluation.engine.driver import Job
from awp_jax.evaluation.model import average_gradients
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import AttackResult, AttackWarning, BatchResult
from awp_jax.evaluation.setting import Setting
from awp_jax.threat import ThreatModel
from awp_jax.types import Array


def _check_model(
    setting: Setting, logits_fn: Callable[..., Array], takes_key: bool
) -> list[AttackWarning]:
  """Warns if logits vary for one image, or if the attacks' model differs."""
  rows = next(verdicts.blocks(len(setting.labels), setting.verdicts.size))
  place = setting.verdicts.place
  keys = place(jax.random.split(setting.key, rows.size))
  batch = setting.images[rows]

  def logits(images: Array) -> Array:
    return setting.verdicts.model.logits(images, keys)

  found = []
  if setting.own_model:
    count = min(rows.size, len(setting.labels))  # further rows are repeated
    found += diagnostics.check_attack_model(*(
        np.asarray(model.logits(place(batch), keys))[:count]
        for model in (setting.model, setting.verdicts.model)))
  if takes_key:
    return found
  found += diagnostics.check_randomized(logits_fn, logits, place(batch))
  if rows.size > 1:
    found += diagnostics.check_batch_dependence(logits, batch, place)
  return found


def _make_job(setting: Setting, spec: AttackSpec, eot_samples: int) -> Job:
  model = average_gradients(setting.model, eot_samples)
  attack = spec.build(model, setting.verdicts.threat)
  checks.count(f'num_runs of attack {spec.name!r}', attack.num_runs)
  return Job(
      attack,
      slots.make_advance(
          attack, model.takes_key, setting.own_model,
          # With settings a step depends on nothing else.
          compiled=spec.settings is not None and setting.traced.suits_loops),
      jax.random.fold_in(setting.key, zlib.crc32(spec.name.encode())),
      setting.sizes if spec.white_box else setting.forward_sizes,
      setting.verdicts.place, verdicts.make_check(setting.verdicts, spec.name),
      setting.own_model,
      # A gradient takes three times a forward pass.
      setting.traced.operations * eot_samples * (3 if spec.white_box else 1))


def _attack_group(
    setting: Setting, name: str, job: Job, again: Job | None,
    indices: np.ndarray, targets: np.ndarray) -> BatchResult:
  begin = time.perf_counter()
  group = verdicts.Group(
      indices, np.asarray(setting.images[indices]), setting.labels[indices],
      targets[indices])
  outcome = threads.attack_group(job, group, streams=setting.num_streams)
  if again is not None:
    outcome = threads.attack_again(
        again, group, outcome, streams=setting.num_streams)
  broken = outcome.broken
  anomalies = results.Anomalies(*(
      int(np.sum(getattr(outcome, field)))
      for field in results.Anomalies._fields))
  return BatchResult(
      name, indices, broken, outcome.adversarial[broken],
      outcome.distances[broken], anomalies, time.perf_counter() - begin,
      setting.identity)


def _attack_share(
    setting: Setting, spec: AttackSpec, targets: np.ndarray,
    remaining: np.ndarray, known: Sequence[BatchResult], options: EvalOptions
) -> list[BatchResult]:
  """Attacks the examples without a record; returns the records of all.

  Args:
    setting: of the evaluation.
    spec: the attack.
    targets: target classes of all examples.
    remaining: the examples that survived the earlier attacks.
    known: records of this attack.
    options: of the evaluation.

  Returns:
    The records of this attack, by all processes.
  """
  draws = options.eot_samples or spec.eot_samples or 1
  job, again = _make_job(setting, spec, draws), None
  if setting.own_model:
    again = _make_job(setting._replace(
        model=setting.verdicts.model, own_model=False), spec, draws)
  missing = results.without_record(remaining, known)
  share = options.share
  if share is not None:
    missing = missing[share.index::share.count]
  own: list[BatchResult] = []
  for begin in range(0, missing.size, setting.group_size):
    record = _attack_group(
        setting, spec.name, job, again,
        missing[begin:begin + setting.group_size], targets)
    if options.progress is not None:
      options.progress(record)
    own.append(record)
  if share is None:
    return [*known, *own]
  found = share.exchange(own)
  results.check_records(
      found, [spec.name], setting.identity, 'EvalOptions.share')
  missing = results.without_record(remaining, [*known, *found])
  if missing.size:
    raise ValueError(
        f'EvalOptions.share: no process returned a record of {missing.size} '
        f'examples for {spec.name}.')
  return [*known, *found]


def _run(
    setting: Setting, natural: verdicts.Natural, specs: Sequence[AttackSpec],
    options: EvalOptions, found: list[AttackWarning],
    judged: results.Judgement) -> AttackResult:
  robust = natural.correct.copy()
  adversarial = setting.images.copy() if options.keep_images else None
  results.check_records(
      options.done, [spec.name for spec in specs], setting.identity)
  reports: list[results.AttackReport] = []
  for number, spec in enumerate(specs):
    records = _attack_share(
        setting, spec, natural.targets, np.flatnonzero(robust),
        results.of_attack(spec.name, options.done), options)
    outcome = results.merge(records, robust)
    robust[outcome.broken] = False
    # Without records, of no robust example, the shape of images is not known.
    if adversarial is not None and outcome.broken.size:
      adversarial[outcome.broken] = outcome.adversarial
    found += diagnostics.after_attack(
        spec, outcome.anomalies, outcome.broken.size / robust.size,
        any(earlier.white_box for earlier in specs[:number]))
    reports.append(results.AttackReport(
        spec.name, sum(record.seconds for record in records),
        float(robust.mean()), outcome.broken, outcome.largest_distance,
        outcome.anomalies))
  return AttackResult(
      adversarial, robust, natural.correct, float(natural.correct.mean()),
      float(robust.mean()), tuple(reports), tuple(found), judged)


def evaluate(
    key: Array, logits_fn: Callable[..., Array], images: Array | np.ndarray,
    labels: Array | np.ndarray, threat: ThreatModel,
    specs: Sequence[AttackSpec], *, options: EvalOptions | None = None
) -> AttackResult:
  """Runs attacks in turn, each on the examples that survived the earlier ones.

  Args:
    key: a PRNG key. Randomness depends on attack, example and run, not on the
      batch size or on the other attacks.
    logits_fn: images [B, ...] -> logits [B, C], C >= 2, traceable by JAX.
    images: [N, ...], N >= 1, rank >= 2, in the box of `threat`; they stay on
      the host.
    labels: integers [N] in [0, C).
    threat: the threat model.
    specs: the attacks, with distinct names.
    options: batching, resuming and reporting.

  Returns:
    The result, on the host.

  Raises:
    ValueError: for arguments that are not as above, before anything compiles.
  """
  options = options or EvalOptions()
  # `asanyarray` keeps memory maps unloaded.
  images = np.asanyarray(images)
  labels = np.asarray(labels)
  arguments.check_images(images, threat)
  if images.dtype != np.float32 and images.dtype != np.float64:
    images = images.astype(np.float32)
  with jax.default_matmul_precision(setting_lib.VERDICT_PRECISION):
    traced = arguments.trace_model(logits_fn, images, options.takes_key)
    attack_traced = arguments.trace_attack_model(options, images, traced)
  arguments.check_labels(labels, len(images), traced.num_classes)
  arguments.check_specs(
      specs, images.ndim, options.takes_key, options.eot_samples)
  setting = setting_lib.make(
      key, logits_fn, traced, attack_traced, images, labels.astype(np.int32),
      threat, specs, options)
  stored = store_lib.open_store(
      options, setting.identity, specs, threat, len(images))
  natural = verdicts.classify_natural(
      setting.verdicts, images, setting.labels,
      max(spec.num_targets for spec in specs))
  setting = setting._replace(
      verdicts=setting.verdicts._replace(spread=natural.spread))
  found = diagnostics.about_logits(
      natural.nonfinite, natural.probable and options.check_model, traced)
  if options.check_model:
    found += _check_model(setting, logits_fn, options.takes_key)
    found += diagnostics.check_classes(specs, traced.num_classes)
    found += diagnostics.check_layout(specs, images.shape[1:])
  judged = results.Judgement(
      natural.dtype, str(traced.dtype), traced.product,
      setting_lib.VERDICT_PRECISION,
      tuple(device.device_kind for device in natural.devices),
      fingerprint.versions(), attack_traced.product, options.attack_precision)
  return _run(
      setting, natural, specs,
      store_lib.reporting(options, stored, natural.correct), found, judged)
