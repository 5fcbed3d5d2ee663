"""Learning rates and optimizers, from a config's plain values."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import awp_jax
from awp_jax.core import checks
from experiments.configs import base
from experiments.util import named
from experiments.util.errors import UserError, user_errors

OPTIMIZERS = ('sgd', 'adamw')
SCHEDULES = ('steps', 'epochs', 'cosine', 'one_cycle')
DECAYED = ('all', 'weights')

# Defaults of PyTorch's OneCycleLR: it starts at 1/25 of the largest rate and
# ends at 1/10,000 of the initial rate.
_ONE_CYCLE_START, _ONE_CYCLE_END = 25.0, 1e4


@user_errors()
def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for invalid values of `config.optimizer`."""
  optimizer = config.optimizer
  if named.is_external(optimizer.name):
    _check_external(config)
  else:
    checks.one_of('optimizer.name', optimizer.name, OPTIMIZERS)
  checks.one_of('optimizer.schedule', optimizer.schedule, SCHEDULES)
  checks.one_of('optimizer.decay', optimizer.decay, DECAYED)
  for name in ('learning_rate', 'decay_factor'):
    checks.positive(f'optimizer.{name}', optimizer[name])
  for name in ('weight_decay', 'l1', 'clip_norm', 'warmup_epochs'):
    checks.not_negative(f'optimizer.{name}', optimizer[name])
  for name in ('momentum', 'b2'):
    if not 0 <= optimizer[name] < 1:
      raise UserError(
          f'optimizer.{name} must be in [0, 1), got {optimizer[name]!r}.')
  if optimizer.nesterov and not optimizer.momentum:
    raise UserError(
        'optimizer.nesterov needs optimizer.momentum > 0, got '
        f'{optimizer.momentum!r}.')
  if optimizer.warmup_epochs >= config.epochs:
    raise UserError(
        'optimizer.warmup_epochs must leave epochs to train: below '
        f'{config.epochs}, got {optimizer.warmup_epochs!r}.')
  if optimizer.schedule == 'one_cycle' and not optimizer.warmup_epochs:
    raise UserError(
        "optimizer.schedule='one_cycle' rises for optimizer.warmup_epochs "
        f'> 0, got {optimizer.warmup_epochs!r}.')
  fractions = optimizer.decay_at
  if not all(isinstance(f, int | float) and 0 < f <= 1 for f in fractions) or (
      list(fractions) != sorted(fractions)):
    raise UserError(
        'optimizer.decay_at must be rising fractions of the run in (0, 1], got '
        f'{fractions!r}.')


def _steps(
    config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  optimizer = config.optimizer
  # Round first: 0.55 * 100 = 55.00000000000001 must be step 55.
  if optimizer.schedule == 'epochs':
    drops = [
        math.ceil(round(f * config.epochs, 6)) * steps_per_epoch
        for f in optimizer.decay_at]
  else:
    total = config.epochs * steps_per_epoch
    drops = [math.ceil(round(f * total, 6)) - 1 for f in optimizer.decay_at]
  return optax.join_schedules([
      optax.constant_schedule(
          optimizer.learning_rate * optimizer.decay_factor ** passed)
      for passed in range(len(drops) + 1)], drops)


def build_schedule(
    config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate of step k, counted from 0, of n in the run.

  'steps': as in the paper's code, the rate drops by `decay_factor` when
  (k + 1) / n reaches each fraction of the run.
  'epochs': as in the code of TRADES and MART, it drops before the first step of
  the epoch after each fraction.
  'cosine': rate / 2 * (1 + cos(pi k / n)). All three are multiplied by
  (k + 1) / u over the u steps of the warm-up; the cosine starts after it.
  'one_cycle': the rate rises along a cosine from 1/25 over the warm-up, then
  falls along another to almost zero.

  Args:
    config: a config with the fields of `experiments/configs/base.py`.
    steps_per_epoch: batches per epoch.

  Returns:
    A function of the number of completed steps.
  """
  optimizer = config.optimizer
  rate = optimizer.learning_rate
  total = config.epochs * steps_per_epoch
  rise = round(optimizer.warmup_epochs * steps_per_epoch)
  if optimizer.schedule == 'one_cycle':
    rise = min(max(rise, 1), total - 1)
    return optax.join_schedules([
        _cosine(rate / _ONE_CYCLE_START, rate, rise),
        _cosine(rate, rate / _ONE_CYCLE_START / _ONE_CYCLE_END, total - rise),
    ], [rise])
  schedule = _steps(config, steps_per_epoch)
  if optimizer.schedule == 'cosine':
    falling = _cosine(rate, 0.0, total - rise)
    # The cosine starts after the warm-up; until then it is at its maximum.
    schedule = optax.join_schedules(
        [optax.constant_schedule(rate), falling], [rise])
  if not rise:
    return schedule
  return lambda count: schedule(count) * jnp.minimum(1.0, (count + 1) / rise)


def _cosine(first: float, last: float, steps: int) -> optax.Schedule:
  """Half a cosine from `first` at 0 to `last` from `steps` on."""
  return optax.cosine_decay_schedule(first, max(steps, 1), alpha=last / first)


def _add_signs(l1: float) -> optax.GradientTransformation:
  """Adds the gradient of l1 * sum |w|."""

  def update(gradients: Any, params: Any) -> Any:
    return jax.tree.map(lambda g, w: g + l1 * jnp.sign(w), gradients, params)

  return optax.stateless(update)


def _check_external(config: ml_collections.ConfigDict) -> None:
  """Raises UserError if an optimizer ignores a field that has an effect."""
  optimizer, defaults = config.optimizer, base.get_config().optimizer
  name, _ = named.parse_call(optimizer.name, 'optimizer.name')
  found = named.load('optimizer.name', name)
  if not named.takes(found, 'learning_rate'):
    raise UserError(
        f'optimizer.name: {name!r} must have an argument learning_rate, a '
        'function of the step.')
  if optimizer.weight_decay and not named.takes(found, 'weight_decay'):
    raise UserError(
        f'optimizer.weight_decay={optimizer.weight_decay!r} has no effect: '
        f'{name!r} has no argument weight_decay. Set it to 0.')
  for field in ('momentum', 'nesterov', 'b2', 'decay'):
    argument = 'mask' if field == 'decay' else field
    if optimizer[field] != defaults[field] and not named.takes(
        found, argument):
      raise UserError(
          f'optimizer.{field}={optimizer[field]!r} has no effect: {name!r} has '
          f'no argument {argument}.')


def _external(
    config: ml_collections.ConfigDict, rate: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
  """The optimizer of another package that the config names."""
  text, optimizer = config.optimizer.name, config.optimizer
  name, options = named.parse_call(text, 'optimizer.name')
  defaults = base.get_config().optimizer
  # Unless they were changed, those of the optimizer itself apply.
  changed = {field: optimizer[field] for field in ('momentum', 'nesterov', 'b2')
             if optimizer[field] != defaults[field]}
  made = named.call(
      'optimizer.name', named.load('optimizer.name', name), name,
      options=options, offered={
          'learning_rate': rate, 'weight_decay': optimizer.weight_decay,
          'mask': mask, 'config': ml_collections.FrozenConfigDict(config),
          **changed})
  if not (hasattr(made, 'init') and hasattr(made, 'update')):
    raise UserError(
        f'optimizer.name={text!r} must return an optax optimizer, got '
        f'{type(made).__name__}.')
  return made


def build_optimizer(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.GradientTransformation:
  """SGD with momentum, AdamW, or any other, with clipping, L1, weight decay.

  Clipping is applied to the gradient of the loss. Then l1 sign(w) is added for
  weights and, for SGD, wd w. AdamW's decay is decoupled: rate * wd w. All are
  computed at the parameters set by `awp.update_at`. An optimizer of another
  package gets the schedule, those of `weight_decay` and `mask` that it takes,
  and of `momentum`, `nesterov` and `b2` those that the config changes.

  Args:
    config: a config with the fields of `experiments/configs/base.py`.
    steps_per_epoch: batches per epoch.

  Returns:
    The optimizer.
  """
  optimizer = config.optimizer
  rate = build_schedule(config, steps_per_epoch)
  mask = awp_jax.weight_mask if optimizer.decay == 'weights' else None
  parts = []
  if optimizer.clip_norm:
    parts.append(optax.clip_by_global_norm(optimizer.clip_norm))
  if optimizer.l1:
    parts.append(optax.masked(_add_signs(optimizer.l1), awp_jax.weight_mask))
  if named.is_external(optimizer.name):
    return optax.chain(*parts, _external(config, rate, mask))
  if optimizer.name == 'adamw':
    return optax.chain(*parts, optax.adamw(
        rate, optimizer.momentum, optimizer.b2,
        weight_decay=optimizer.weight_decay, mask=mask,
        nesterov=optimizer.nesterov))
  return optax.chain(
      *parts, optax.add_decayed_weights(optimizer.weight_decay, mask),
      optax.sgd(rate, optimizer.momentum or None, optimizer.nesterov))
