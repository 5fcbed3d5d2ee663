"""Checks the plain values of a config and builds the objects of a run."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

import awp_jax
from awp_jax.attacks.pgd import STARTS
from awp_jax.core import checks
from awp_jax.perturbation.base import UPDATE_AT
from awp_jax.threat import NORMS
from awp_jax.training.train_step import MODES, STATISTICS
from experiments.config import networks, optimizers, schema
from experiments.configs import base
from experiments.data import augmentation, datasets
from experiments.util import named
from experiments.util.errors import UserError, user_errors

OBJECTIVES = ('AT', 'TRADES', 'MART', 'natural')
ATTACKS = ('pgd',)
DTYPES = ('float32', 'bfloat16', 'float64')
PAD_MODES = ('reflect', 'constant')
SELECT_ON = ('test', 'validation')
GUARD_ACTIONS = ('stop', 'shrink')


class Setup(NamedTuple):
  """The objects that a config describes.

  Attributes:
    objective: the losses of the attack and of training.
    threat: the ball and the box.
    attack: the attack of training.
    perturbation: the weight perturbation after its warm-up.
    alternations: number of alternations of input and weight steps.
    eval_attack: the attack of evaluation.
  """

  objective: awp_jax.Objective
  threat: awp_jax.ThreatModel
  attack: awp_jax.Attack
  perturbation: awp_jax.Method
  alternations: int
  eval_attack: awp_jax.Attack


@user_errors()
def build(config: ml_collections.ConfigDict) -> Setup:
  """Checks the values of a config and builds its objects.

  Args:
    config: a config with the fields of `experiments/configs/base.py`.

  Returns:
    A `Setup`.

  Raises:
    UserError: for the first invalid value.
  """
  _check_names(config)
  _check_numbers(config)
  _check_together(config)
  optimizers.check(config)
  networks.check_name(config)
  augmentation.check(config.augmentation.function)
  attack, awp, evaluation = config.attack, config.awp, config.eval
  return Setup(
      objective=_objective(config),
      threat=awp_jax.ThreatModel(config.threat.norm, config.threat.epsilon),
      attack=awp_jax.Attack(
          step_size=attack.step_size, num_steps=attack.num_steps,
          start=attack.start, restarts=attack.restarts, mode=attack.mode,
          algorithm=_algorithm(config)),
      perturbation=_method(config),
      alternations=awp.alternations,
      eval_attack=awp_jax.Attack(
          step_size=evaluation.step_size, num_steps=evaluation.num_steps,
          start='random'))


def _method(config: ml_collections.ConfigDict) -> awp_jax.Method:
  """The weight perturbation method of a config.

  Raises:
    UserError: for an unknown method or option, text that is not a call, or AWP
      with options but without a size.
  """
  name, options = named.parse_call(config.weight_perturbation)
  if named.is_external(name):
    for option in ('gamma', 'num_steps', 'update_at'):
      if option in options and config.awp[option] != (
          base.get_config().awp[option]):
        raise UserError(
            f'{option} is set in weight_perturbation='
            f'{config.weight_perturbation!r} and by awp.{option}='
            f'{config.awp[option]!r}.')
    return _made(config, 'weight_perturbation', awp_jax.Method, {
        'gamma': config.awp.gamma, 'num_steps': config.awp.num_steps,
        'update_at': config.awp.update_at})
  if name == 'awp':
    awp = config.awp
    if options and 'gamma' not in options and not awp.gamma:
      raise UserError(
          f'weight_perturbation={config.weight_perturbation!r} would perturb '
          'nothing, since awp.gamma is 0 in this config; set a size, as in '
          "'awp(gamma=0.01)'.")
    options = {
        'gamma': awp.gamma, 'num_steps': awp.num_steps,
        'update_at': awp.update_at} | options
  return awp_jax.methods.make(name, **options)


def _made(
    config: ml_collections.ConfigDict, field: str, kind: type,
    offered: Mapping[str, Any]) -> Any:
  """The part of another package that a field names.

  Args:
    config: the config.
    field: dotted name of the field.
    kind: what the part must return.
    offered: values of other fields, passed if the part takes them.

  Returns:
    What the part returns for its options.

  Raises:
    UserError: if it cannot be imported, fails, or returns something else.
  """
  text = schema.flatten(config)[field]
  name, options = named.parse_call(text, field)
  found = named.load(field, name)
  made = named.call(
      field, found, name, options=options, offered={
          **offered, 'config': ml_collections.FrozenConfigDict(config)})
  if not isinstance(made, kind):
    raise UserError(
        f'{field}={text!r} must return an awp_jax.{kind.__name__}, got '
        f'{type(made).__name__}.')
  return made


def _refuse_unused(
    config: ml_collections.ConfigDict, field: str, unused: tuple[str, ...]
) -> None:
  """Raises UserError if a field was changed that an external part ignores."""
  text = schema.flatten(config)[field]
  name, _ = named.parse_call(text, field)
  found = named.load(field, name)
  defaults, given = map(schema.flatten, (base.get_config(), config))
  for other in unused:
    argument = other.rpartition('.')[2]
    if given[other] != defaults[other] and not named.takes(found, argument):
      raise UserError(
          f'{other}={given[other]!r} has no effect: {name!r} has no argument '
          f'{argument}.')


def _algorithm(config: ml_collections.ConfigDict) -> Any:
  """The attack's algorithm of another package; None for PGD."""
  text = config.attack.name
  if not named.is_external(text):
    checks.one_of('attack.name', text, ATTACKS)
    return None
  name, options = named.parse_call(text, 'attack.name')
  return named.bound('attack.name', name, options, awp_jax.pgd_with_state)


def _objective(config: ml_collections.ConfigDict) -> awp_jax.Objective:
  smoothing = config.label_smoothing
  if named.is_external(config.objective):
    _refuse_unused(config, 'objective', ('beta', 'label_smoothing'))
    return _made(config, 'objective', awp_jax.Objective, {
        'beta': config.beta, 'label_smoothing': smoothing})
  if config.objective == 'AT':
    return awp_jax.adversarial(smoothing)
  if config.objective == 'natural':
    return awp_jax.natural(smoothing)
  make = {'TRADES': awp_jax.trades, 'MART': awp_jax.mart}[config.objective]
  return make(config.beta, smoothing)


def _check_names(config: ml_collections.ConfigDict) -> None:
  for name, value, allowed in (
      ('augmentation.pad_mode', config.augmentation.pad_mode, PAD_MODES),
      ('model.dtype', config.model.dtype, DTYPES),
      ('model.param_dtype', config.model.param_dtype, DTYPES),
      ('threat.norm', config.threat.norm, NORMS),
      ('attack.start', config.attack.start, STARTS),
      ('attack.mode', config.attack.mode, MODES),
      ('awp.update_at', config.awp.update_at, UPDATE_AT),
      ('statistics', config.statistics, STATISTICS),
      ('guard.action', config.guard.action, GUARD_ACTIONS),
      ('select_on', config.select_on, SELECT_ON)):
    checks.one_of(name, value, allowed)
  for name, value, names in (
      ('dataset', config.dataset, datasets.NAMES),
      ('model.name', config.model.name, networks.MODELS),
      ('objective', config.objective, OBJECTIVES)):
    if not named.is_external(value):
      checks.one_of(name, value, names)
  if config.select_on == 'validation' and not config.num_validation:
    raise UserError(
        "select_on='validation' needs num_validation > 0 images to hold out "
        f'from the training images, got {config.num_validation}.')
  if config.dataset == 'npz' and not config.npz_path:
    raise UserError("dataset='npz' needs npz_path, the path of the archive.")
  if 'float64' in (config.model.dtype, config.model.param_dtype):
    if not getattr(jax.config, 'jax_enable_x64', False):
      raise UserError(
          "model.dtype='float64' needs 64-bit arrays: set JAX_ENABLE_X64=1.")


def _check_numbers(config: ml_collections.ConfigDict) -> None:
  fields = schema.flatten(config)
  for name in (
      'threat.epsilon', 'attack.step_size', 'eval.step_size', 'guard.factor'):
    checks.positive(name, fields[name])
  for name in (
      'beta', 'awp.gamma', 'augmentation.rotation', 'augmentation.mixup',
      'data_on_device_gib'):
    checks.not_negative(name, fields[name])
  for name in (
      'epochs', 'batch_size', 'accumulate',
      'attack.num_steps', 'attack.restarts',
      'awp.num_steps', 'awp.alternations', 'eval.every_epochs',
      'eval.batch_size', 'eval.num_steps', 'eval.num_train', 'model.width',
      'log_every_steps', 'guard.stretch_steps'):
    checks.count(name, fields[name])
  for name in (
      'num_train', 'num_test', 'num_validation',
      'image_size', 'augmentation.pad', 'augmentation.cutout',
      'awp.warmup_epochs', 'awp.warmup_steps', 'checkpoint_every_steps',
      'early_stopping_epochs', 'guard.grace_steps', 'guard.most_shrinks'):
    checks.count(name, fields[name], minimum=0)
  if not 0 <= config.seed < 2**32:  # a key has 32 bits of a seed
    raise UserError(
        f'seed must be a whole number in [0, 2^32), got {config.seed!r}.')
  for name in ('seed', 'data_seed'):
    checks.count(name, fields[name], minimum=0, maximum=None)
  for name in ('extra.fraction', 'ema_decay', 'label_smoothing'):
    if not 0 <= fields[name] < 1:
      raise UserError(
          f'{name} must be in [0, 1), got {fields[name]!r}.')
  if config.guard.factor >= 1:
    raise UserError(
        f'guard.factor must be below 1, got {config.guard.factor!r}.')


def _check_together(config: ml_collections.ConfigDict) -> None:
  """Checks combinations of values that are valid separately."""
  if config.awp.alternations > 1 and config.attack.restarts > 1:
    raise UserError(
        f'awp.alternations={config.awp.alternations} continue one attack, but '
        f'attack.restarts={config.attack.restarts} start several. One of them '
        'must be 1.')
  if config.awp.warmup_epochs and config.awp.warmup_steps:
    raise UserError(
        f'awp.warmup_epochs={config.awp.warmup_epochs} and '
        f'awp.warmup_steps={config.awp.warmup_steps} both set the warm-up; '
        'one of them must be 0.')
  if bool(config.extra.path) != bool(config.extra.fraction):
    raise UserError(
        'extra.path and extra.fraction must be set together, got '
        f'{config.extra.path!r} and {config.extra.fraction!r}.')
  if config.objective == 'MART' and config.augmentation.mixup:
    raise UserError(
        "augmentation.mixup requires objective 'AT', 'TRADES' or 'natural': "
        'MART needs a single class per image, got '
        f'mixup={config.augmentation.mixup!r}.')


def check_devices(
    batch_size: int, num_devices: int, name: str, accumulate: int = 1) -> None:
  """Raises UserError unless a batch size divides into equal parts.

  Args:
    batch_size: the size of the global batch.
    num_devices: the number of devices.
    name: the config field of the batch size.
    accumulate: the number of parts on every device.
  """
  shares = num_devices * accumulate
  if batch_size % shares:
    lower = batch_size // shares * shares
    parts = f', times accumulate={accumulate} parts' if accumulate > 1 else ''
    raise UserError(
        f'{name}={batch_size} does not divide among {num_devices} '
        f'devices{parts}; '
        f'{" or ".join(str(b) for b in (lower, lower + shares) if b)} would.')
