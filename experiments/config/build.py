"""Checks the plain values of a config and builds the objects of a run."""

import ast
from collections.abc import Iterable
import difflib
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections

import awp_jax
from awp_jax import models
from awp_jax.attacks.pgd import STARTS
from awp_jax.core import checks
from awp_jax.perturbation.base import UPDATE_AT
from awp_jax.threat import NORMS
from awp_jax.training.train_step import MODES, STATISTICS
from experiments.config import optimizers
from experiments.data import datasets
from experiments.parallel import mapping
from experiments.util.errors import UserError, user_errors

MODELS = ('preact_resnet', 'wide_resnet')
OBJECTIVES = ('AT', 'TRADES', 'MART', 'natural')
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


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The values of all fields by dotted name."""
  return traverse_util.flatten_dict(config.to_dict(), sep='.')


def unknown_field(name: str, known: Iterable[str]) -> str:
  """An error message for an unknown field, with the most similar one."""

  def similarity(field: str) -> float:
    # `gama` should match `awp.gamma`: users often omit the group.
    return max(
        difflib.SequenceMatcher(None, name, candidate).ratio()
        for candidate in (field, field.rpartition('.')[2]))

  return (
      f'the config has an unknown field {name!r}. Did you mean '
      f'{max(known, key=similarity)!r}?')


def check_fields(
    config: ml_collections.ConfigDict, known: ml_collections.ConfigDict
) -> None:
  """Raises UserError unless `config` has exactly the fields of `known`."""
  wanted, given = flatten(known), flatten(config)
  for name in given:
    if name not in wanted:
      raise UserError(unknown_field(name, wanted))
  for name in wanted:
    if name not in given:
      raise UserError(f'the config lacks the field {name!r}.')


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
  attack, awp, evaluation = config.attack, config.awp, config.eval
  return Setup(
      objective=_objective(config),
      threat=awp_jax.ThreatModel(config.threat.norm, config.threat.epsilon),
      attack=awp_jax.Attack(
          step_size=attack.step_size, num_steps=attack.num_steps,
          start=attack.start, restarts=attack.restarts, mode=attack.mode),
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
  name, options = parse_call(config.weight_perturbation)
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


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
  """Parses 'sam(rho=0.1)' to ('sam', {'rho': 0.1}), and 'sam' to ('sam', {}).

  Args:
    text: a name, optionally with keywords of plain values in parentheses.

  Returns:
    The name and the options.

  Raises:
    UserError: for any other text.
  """
  try:
    node = ast.parse(text.strip(), mode='eval').body
    if isinstance(node, ast.Name):
      return node.id, {}
    if isinstance(node, ast.Call) and isinstance(
        node.func, ast.Name) and not node.args and all(
            keyword.arg for keyword in node.keywords):  # without **{...}
      return node.func.id, {
          str(keyword.arg): ast.literal_eval(keyword.value)
          for keyword in node.keywords}
  except (SyntaxError, ValueError, TypeError):
    pass
  raise UserError(
      'weight_perturbation must be the name of a method, with options in '
      f"parentheses like 'sam(rho=0.05)', got {text!r}.")


def _objective(config: ml_collections.ConfigDict) -> awp_jax.Objective:
  smoothing = config.label_smoothing
  if config.objective == 'AT':
    return awp_jax.adversarial(smoothing)
  if config.objective == 'natural':
    return awp_jax.natural(smoothing)
  make = {'TRADES': awp_jax.trades, 'MART': awp_jax.mart}[config.objective]
  return make(config.beta, smoothing)


def _check_names(config: ml_collections.ConfigDict) -> None:
  for name, value, allowed in (
      ('dataset', config.dataset, datasets.NAMES),
      ('augmentation.pad_mode', config.augmentation.pad_mode, PAD_MODES),
      ('model.name', config.model.name, MODELS),
      ('model.dtype', config.model.dtype, DTYPES),
      ('model.param_dtype', config.model.param_dtype, DTYPES),
      ('objective', config.objective, OBJECTIVES),
      ('threat.norm', config.threat.norm, NORMS),
      ('attack.start', config.attack.start, STARTS),
      ('attack.mode', config.attack.mode, MODES),
      ('awp.update_at', config.awp.update_at, UPDATE_AT),
      ('statistics', config.statistics, STATISTICS),
      ('guard.action', config.guard.action, GUARD_ACTIONS),
      ('select_on', config.select_on, SELECT_ON)):
    checks.one_of(name, value, allowed)
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
  fields = flatten(config)
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
      'seed', 'data_seed', 'num_train', 'num_test', 'num_validation',
      'image_size', 'augmentation.pad', 'augmentation.cutout',
      'awp.warmup_epochs', 'awp.warmup_steps', 'checkpoint_every_steps',
      'early_stopping_epochs', 'guard.grace_steps', 'guard.most_shrinks'):
    checks.count(name, fields[name], minimum=0)
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


def build_model(
    config: ml_collections.ConfigDict, dataset: datasets.Dataset) -> nn.Module:
  """The network of `config.model` for the images and classes of `dataset`."""
  make: Any = {
      'preact_resnet': models.PreActResNet,
      'wide_resnet': models.WideResNet}[config.model.name]
  dtype = jnp.dtype(config.model.dtype)
  scale = (dataset.mean, dataset.std) if config.model.normalize else (
      (0.0,), (1.0,))
  with user_errors():
    return make(
        num_classes=dataset.num_classes, depth=config.model.depth,
        width=config.model.width, mean=tuple(scale[0]), std=tuple(scale[1]),
        activation=config.model.activation, dtype=dtype,
        param_dtype=jnp.dtype(config.model.param_dtype),
        axis_name=mapping.AXIS if config.model.sync_batch_norm else None,
        remat=config.model.remat)
