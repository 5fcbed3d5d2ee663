"""What stays the same through an evaluation, made from its arguments."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from awp_jax.core import checks, loops, sharding
from awp_jax.evaluation import fingerprint
from awp_jax.evaluation.arguments import EvalOptions, Traced
from awp_jax.evaluation.engine import slots, threads
from awp_jax.evaluation.model import Model, in_float32, make_model
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.verdicts import VerdictSettings
from awp_jax.threat import ThreatModel
from awp_jax.types import Array

#: Factor on the batch size of attacks without gradients, except on the CPU.
_FORWARD_BATCH = 4

#: Batches per group on the CPU, and elsewhere. Larger batches form smaller
#: groups, so that progress is reported and saved as often.
_BATCHES_PER_GROUP = 8
_FEWER_BATCHES_PER_GROUP = 2

#: The batch of the verdicts over the batch of few verdicts.
_FEW = 8

#: `jax.default_matmul_precision` of the verdicts.
VERDICT_PRECISION = 'float32'


class Setting(NamedTuple):
  """What stays the same through an evaluation.

  Attributes:
    key: a PRNG key.
    model: the model that attacks evaluate.
    verdicts: settings of the verdicts.
    images: [N, ...], on the host.
    labels: [N].
    sizes: batch sizes of attacks that use gradients.
    forward_sizes: batch sizes of the others.
    group_size: examples per record.
    num_streams: batches that run in parallel.
    own_model: whether the attacks use another function than the verdicts.
    traced: the attacks' model.
    identity: hash of the evaluation; '' if no record is written or read.
  """

  key: Array
  model: Model
  verdicts: VerdictSettings
  images: np.ndarray
  labels: np.ndarray
  sizes: tuple[int, ...]
  forward_sizes: tuple[int, ...]
  group_size: int
  num_streams: int
  own_model: bool
  traced: Traced
  identity: str


def _identity(
    key: Array, traced: Traced, attack_traced: Traced, images: np.ndarray,
    labels: np.ndarray, threat: ThreatModel, specs: Sequence[AttackSpec],
    options: EvalOptions, batch_size: int) -> str:
  """The identity of an evaluation; '' if nothing needs it."""
  if options.store is None and not any(
      (options.progress, options.done, options.share)):
    return ''
  models = [traced]
  if options.attack_fn is not None:
    models.append(attack_traced)
  return fingerprint.identify(
      key, models, images, labels, threat, specs, {
          'eot_samples': options.eot_samples, 'batch_size': batch_size,
          'attack_precision': options.attack_precision})


def make(
    key: Array, logits_fn: Callable[..., Array], traced: Traced,
    attack_traced: Traced, images: np.ndarray, labels: np.ndarray,
    threat: ThreatModel, specs: Sequence[AttackSpec], options: EvalOptions
) -> Setting:
  """Checks the batching options and makes the setting of an evaluation.

  Args:
    key: a PRNG key.
    logits_fn: the model of the verdicts.
    traced: its trace.
    attack_traced: the trace of the attacks' model.
    images: [N, ...].
    labels: integers [N].
    threat: the threat model.
    specs: the attacks.
    options: of the evaluation.

  Returns:
    The setting.

  Raises:
    ValueError: for a batch size that is not positive or does not divide among
      the devices.
  """
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

  def make(function: Callable[..., Array], precision: str | None) -> Model:
    return make_model(
        function, traced.num_classes, takes_key=options.takes_key,
        precision=precision, devices=options.devices)

  model = verdict_model = make(logits_fn, VERDICT_PRECISION)
  if options.attack_fn is not None:
    model = make(in_float32(options.attack_fn), options.attack_precision)
  elif options.attack_precision != VERDICT_PRECISION:
    model = make(logits_fn, options.attack_precision)
  # Always Threefry: other generators draw for a whole batch at once, and an
  # example's draws must not depend on the rest of the batch.
  seed = jax.random.bits(key, (2,), jnp.uint32)
  key = jax.random.wrap_key_data(seed, impl='threefry2x32')
  num_streams = 1 if options.devices else threads.num_streams(batch_size)
  sizes, forward_sizes = (
      slots.batch_sizes(factor * batch_size // num_streams, num_devices)
      for factor in (1, 1 if loops.unrolls() else _FORWARD_BATCH))
  verdict_settings = VerdictSettings(
      verdict_model, threat, key, sizes[0],
      min(size for size in sizes if size >= sizes[0] // _FEW),
      functools.partial(sharding.shard, devices=options.devices))
  return Setting(
      key, model, verdict_settings, images, labels, sizes, forward_sizes,
      group_size, num_streams, options.attack_fn is not None, attack_traced,
      _identity(
          key, traced, attack_traced, images, labels, threat, specs, options,
          batch_size))
