"""From a config's plain values to the objects of a run, checked before anything runs."""

from collections.abc import Iterator
import difflib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

import awp_jax
from awp_jax import checks
from awp_jax import models
from awp_jax.attacks.pgd import STARTS
from awp_jax.step import MODES, STATISTICS
from awp_jax.threat import NORMS
from awp_jax.weights import DECAY_AT
from experiments import data

MODELS = ('preact_resnet', 'wide_resnet')
OBJECTIVES = ('AT', 'TRADES', 'MART')
DTYPES = ('float32', 'bfloat16', 'float64')
PAD_MODES = ('reflect', 'constant')
SELECT_ON = ('test', 'validation')


class Setup(NamedTuple):
  """The objects that a config describes.

  Attributes:
    objective: what inputs ascend and weights descend.
    threat: the ball and the box.
    attack: of training.
    perturbation: of the weights, once past its warm-up.
    eval_attack: of evaluation.
  """

  objective: awp_jax.Objective
  threat: awp_jax.ThreatModel
  attack: awp_jax.Attack
  perturbation: awp_jax.WeightPerturbation
  eval_attack: awp_jax.Attack


def flatten(
    config: ml_collections.ConfigDict, prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """Pairs of a dotted field name and its value."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def check_fields(
    config: ml_collections.ConfigDict, known: ml_collections.ConfigDict
) -> None:
  """Raises ValueError where `config` lacks a field of `known` or has another."""
  wanted, given = dict(flatten(known)), dict(flatten(config))
  for name in given:
    if name not in wanted:
      near = difflib.get_close_matches(name, wanted, n=1, cutoff=0.0)
      raise ValueError(
          f'the config has an unknown field {name!r}. Did you mean {near[0]!r}?')
  for name in wanted:
    if name not in given:
      raise ValueError(f'the config lacks the field {name!r}.')


def build(config: ml_collections.ConfigDict) -> Setup:
  """Checks a config's values and makes what they describe.

  Args:
    config: with the fields of `experiments/configs/cifar10_awp.py`.

  Returns:
    A `Setup`.

  Raises:
    ValueError: for the first value that is not allowed.
  """
  _check_names(config)
  _check_numbers(config)
  attack, awp, evaluation = config.attack, config.awp, config.eval
  return Setup(
      objective=_objective(config.objective, config.beta),
      threat=awp_jax.ThreatModel(config.threat.norm, config.threat.epsilon),
      attack=awp_jax.Attack(
          step_size=attack.step_size, num_steps=attack.num_steps,
          start=attack.start, restarts=attack.restarts, mode=attack.mode),
      perturbation=awp_jax.WeightPerturbation(
          gamma=awp.gamma, num_steps=awp.num_steps,
          alternations=awp.alternations, decay_at=awp.decay_at),
      eval_attack=awp_jax.Attack(
          step_size=evaluation.step_size, num_steps=evaluation.num_steps,
          start='random'))


def _objective(name: str, beta: float) -> awp_jax.Objective:
  if name == 'AT':
    return awp_jax.standard()
  return {'TRADES': awp_jax.trades, 'MART': awp_jax.mart}[name](beta)


def _check_names(config: ml_collections.ConfigDict) -> None:
  for name, value, allowed in (
      ('dataset', config.dataset, data.NAMES),
      ('augmentation.pad_mode', config.augmentation.pad_mode, PAD_MODES),
      ('model.name', config.model.name, MODELS),
      ('model.dtype', config.model.dtype, DTYPES),
      ('model.param_dtype', config.model.param_dtype, DTYPES),
      ('objective', config.objective, OBJECTIVES),
      ('threat.norm', config.threat.norm, NORMS),
      ('attack.start', config.attack.start, STARTS),
      ('attack.mode', config.attack.mode, MODES),
      ('awp.decay_at', config.awp.decay_at, DECAY_AT),
      ('statistics', config.statistics, STATISTICS),
      ('select_on', config.select_on, SELECT_ON)):
    checks.one_of(name, value, allowed)
  if config.select_on == 'validation' and not config.num_validation:
    raise ValueError(
        "select_on='validation' needs num_validation > 0 images to hold out "
        f'from the training images, got {config.num_validation}.')
  if config.dataset == 'npz' and not config.npz_path:
    raise ValueError("dataset='npz' needs npz_path, the path of the archive.")
  if 'float64' in (config.model.dtype, config.model.param_dtype):
    if not getattr(jax.config, 'jax_enable_x64', False):
      raise ValueError(
          "model.dtype='float64' needs 64-bit arrays: set JAX_ENABLE_X64=1.")


def _check_numbers(config: ml_collections.ConfigDict) -> None:
  for name in (
      'threat.epsilon', 'attack.step_size', 'optimizer.learning_rate',
      'optimizer.decay_factor', 'eval.step_size'):
    checks.positive(name, _field(config, name))
  for name in ('beta', 'awp.gamma', 'optimizer.weight_decay'):
    checks.not_negative(name, _field(config, name))
  for name in (
      'epochs', 'batch_size', 'attack.num_steps', 'attack.restarts',
      'awp.num_steps', 'awp.alternations', 'eval.every_epochs',
      'eval.batch_size', 'eval.num_steps', 'eval.num_train', 'model.width',
      'log_every_steps'):
    checks.count(name, _field(config, name))
  for name in (
      'seed', 'num_train', 'num_test', 'num_validation', 'augmentation.pad',
      'awp.warmup_epochs', 'checkpoint_every_steps'):
    checks.count(name, _field(config, name), minimum=0)
  if not 0 <= config.optimizer.momentum < 1:
    raise ValueError(
        'optimizer.momentum must be in [0, 1), got '
        f'{config.optimizer.momentum!r}.')
  fractions = config.optimizer.decay_at
  if list(fractions) != sorted(fractions) or not all(
      0 < f <= 1 for f in fractions):
    raise ValueError(
        'optimizer.decay_at must be rising fractions of the run in (0, 1], got '
        f'{fractions!r}.')


def _field(config: ml_collections.ConfigDict, dotted: str) -> Any:
  value = config
  for name in dotted.split('.'):
    value = value[name]
  return value


def check_devices(batch_size: int, num_devices: int, name: str) -> None:
  """Raises ValueError unless `num_devices` divide the batch."""
  if batch_size % num_devices:
    lower = batch_size // num_devices * num_devices
    raise ValueError(
        f'{name}={batch_size} does not divide among {num_devices} devices; '
        f'{" or ".join(str(b) for b in (lower, lower + num_devices) if b)} '
        'would.')


def build_model(
    config: ml_collections.ConfigDict, dataset: data.Dataset) -> nn.Module:
  """The network of `config.model` for the images and classes of `dataset`."""
  make: Any = {
      'preact_resnet': models.PreActResNet,
      'wide_resnet': models.WideResNet}[config.model.name]
  dtype = jnp.dtype(config.model.dtype)
  return make(
      num_classes=dataset.num_classes, depth=config.model.depth,
      width=config.model.width, mean=tuple(dataset.mean),
      std=tuple(dataset.std), activation=config.model.activation, dtype=dtype,
      param_dtype=jnp.dtype(config.model.param_dtype))


def build_schedule(
    config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate of step k, counted from 0.

  As in the paper's code, step k has the rate of time (k + 1) / steps: it drops
  by `decay_factor` as soon as that reaches each fraction of the run.
  """
  optimizer = config.optimizer
  total = config.epochs * steps_per_epoch

  def schedule(count: Any) -> Any:
    passed = sum(
        jnp.asarray(count + 1 >= f * total, jnp.float32)
        for f in optimizer.decay_at)
    return optimizer.learning_rate * optimizer.decay_factor ** passed

  return schedule


def build_optimizer(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.GradientTransformation:
  """SGD with momentum, decaying every parameter: g + wd w enters the momentum."""
  optimizer = config.optimizer
  return optax.chain(
      optax.add_decayed_weights(optimizer.weight_decay),
      optax.sgd(
          build_schedule(config, steps_per_epoch), optimizer.momentum or None))
