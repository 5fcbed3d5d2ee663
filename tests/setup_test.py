"""Tests of what configs describe, and of what they must not say."""

from fractions import Fraction

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import data, optimization, setup
from experiments.configs import base, cifar10_awp, digits_awp


def changed(**fields):
  """`digits_awp` with other values; `a__b` stands for `a.b`."""
  config = digits_awp.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict(
        {name.replace('__', '.'): value for name, value in fields.items()})
  return config


@pytest.mark.parametrize('epochs, steps', [(200, 391), (7, 3), (1, 5), (4, 1)])
def test_schedule_is_the_reference_rule(epochs, steps):
  config = changed(epochs=epochs, optimizer__learning_rate=0.1)
  schedule = optimization.build_schedule(config, steps)
  total = epochs * steps
  wanted = np.empty(total)
  for k in range(total):
    # t = epoch + (i + 1) / n, in exact arithmetic.
    t = Fraction(k // steps) + Fraction(k % steps + 1, steps)
    passed = (t >= Fraction(epochs, 2)) + (t >= Fraction(3 * epochs, 4))
    wanted[k] = 0.1 * 0.1 ** passed
  rates = schedule(jnp.arange(total))
  np.testing.assert_allclose(rates, wanted, rtol=1e-7)
  assert len(np.unique(rates)) == (3 if total > 2 else 2)


def test_schedule_at_fractions_that_floats_miss():
  # 0.55 * 100 is 55.00000000000001.
  config = changed(epochs=100, optimizer__decay_at=(0.55,))
  schedule = optimization.build_schedule(config, 1)
  np.testing.assert_allclose(
      [schedule(53), schedule(54)], [0.1, 0.01], rtol=1e-6)
  constant = optimization.build_schedule(changed(optimizer__decay_at=()), 1)
  np.testing.assert_allclose(constant(10 ** 6), 0.1, rtol=1e-7)


def test_optimizer_decays_into_momentum():
  config = changed(
      epochs=4, optimizer__learning_rate=0.2, optimizer__momentum=0.9,
      optimizer__weight_decay=0.05)
  tx = optimization.build_optimizer(config, 2)
  rng = np.random.default_rng(0)
  w = {'w': rng.normal(size=(3, 2)), 'b': rng.normal(size=2)}
  params = {name: jnp.asarray(value, jnp.float32) for name, value in w.items()}
  state = tx.init(params)
  m = {name: np.zeros_like(value) for name, value in w.items()}
  for k in range(8):
    rate = 0.2 * 0.1 ** ((k + 1 >= 4) + (k + 1 >= 6))
    g = {name: rng.normal(size=value.shape) for name, value in w.items()}
    updates, state = tx.update(
        {n: jnp.asarray(v, jnp.float32) for n, v in g.items()}, state, params)
    params = {n: params[n] + updates[n] for n in params}
    for n in w:
      m[n] = 0.9 * m[n] + g[n] + 0.05 * w[n]
      w[n] = w[n] - rate * m[n]
      np.testing.assert_allclose(params[n], w[n], rtol=2e-5, atol=1e-6)


def test_no_momentum_is_plain_descent():
  tx = optimization.build_optimizer(
      changed(optimizer__momentum=0.0, optimizer__weight_decay=0.0), 9)
  updates, _ = tx.update(
      {'w': jnp.ones(2)}, tx.init({'w': jnp.ones(2)}), {'w': jnp.ones(2)})
  np.testing.assert_allclose(updates['w'], -0.1, rtol=1e-6)


@pytest.mark.parametrize('fields, shown, allowed', [
    ({'threat__epsilon': -0.1}, 'threat.epsilon', '> 0, got -0.1'),
    ({'threat__epsilon': 0.0}, 'threat.epsilon', '> 0, got 0.0'),
    ({'threat__epsilon': float('nan')}, 'threat.epsilon', '> 0, got nan'),
    ({'threat__norm': 'Linfty'}, "'Linf', 'L2'", "got 'Linfty'"),
    ({'objective': 'TRADE'}, "'AT', 'TRADES', 'MART'", "mean 'TRADES'"),
    ({'dataset': 'cifr10'}, "'cifar10'", "Did you mean 'cifar10'"),
    ({'model__name': 'resnet'}, "'preact_resnet'", "got 'resnet'"),
    ({'model__dtype': 'float8'}, "'bfloat16'", "got 'float8'"),
    ({'model__param_dtype': 'int8'}, "'float32'", "got 'int8'"),
    ({'model__dtype': 'float64'}, 'float64', 'JAX_ENABLE_X64=1'),
    ({'model__width': 0}, 'model.width', '>= 1, got 0'),
    ({'attack__start': 'middle'}, "'random'", "got 'middle'"),
    ({'attack__mode': 'test'}, "'train', 'eval'", "got 'test'"),
    ({'attack__num_steps': 0}, 'attack.num_steps', '>= 1, got 0'),
    ({'attack__step_size': 0}, 'attack.step_size', '> 0, got 0'),
    ({'statistics': 'mine'}, "'reference'", "got 'mine'"),
    ({'select_on': 'train'}, "'validation'", "got 'train'"),
    ({'select_on': 'validation'}, 'num_validation > 0', 'got 0'),
    ({'dataset': 'npz'}, "dataset='npz'", 'npz_path'),
    ({'awp__gamma': -0.01}, 'awp.gamma', '>= 0, got -0.01'),
    ({'awp__num_steps': 0}, 'awp.num_steps', '>= 1, got 0'),
    ({'awp__decay_at': 'w'}, "'natural'", "got 'w'"),
    ({'awp__alternations': 2, 'attack__restarts': 3},
     'awp.alternations=2', 'attack.restarts=3'),
    ({'epochs': 0}, 'epochs', '>= 1, got 0'),
    ({'epochs': 1.5}, 'epochs', 'whole number >= 1, got 1.5'),
    ({'seed': -1}, 'seed', '>= 0, got -1'),
    ({'augmentation__pad_mode': 'zero'}, "'reflect'", "got 'zero'"),
    ({'optimizer__momentum': 1.0}, 'optimizer.momentum', '[0, 1), got 1.0'),
    ({'optimizer__decay_at': (0.75, 0.5)}, 'rising', '(0.75, 0.5)'),
    ({'optimizer__decay_at': (0.5, 1.5)}, '(0, 1]', '(0.5, 1.5)'),
    ({'optimizer__decay_at': (0.0,)}, '(0, 1]', '(0.0,)'),
    ({'optimizer__decay_at': ('half',)}, '(0, 1]', 'half'),
    ({'optimizer__name': 'adam'}, "'adamw'", "got 'adam'"),
    ({'optimizer__schedule': 'linear'}, "'cosine'", "got 'linear'"),
    ({'optimizer__decay': 'some'}, "'weights'", "got 'some'"),
    ({'optimizer__l1': -1.0}, 'optimizer.l1', '>= 0, got -1.0'),
    ({'optimizer__b2': 1.0}, 'optimizer.b2', '[0, 1), got 1.0'),
    ({'optimizer__nesterov': True, 'optimizer__momentum': 0.0},
     'optimizer.nesterov', 'momentum > 0'),
    ({'optimizer__schedule': 'one_cycle'}, 'warmup_epochs', '> 0, got 0.0'),
    ({'epochs': 3, 'optimizer__warmup_epochs': 3.0}, 'below 3', 'got 3.0'),
    ({'label_smoothing': 1.0}, 'label_smoothing', '[0, 1), got 1.0'),
    ({'ema_decay': 1.0}, 'ema_decay', '[0, 1), got 1.0'),
    ({'guard__action': 'wait'}, "'shrink'", "got 'wait'"),
    ({'guard__factor': 1.0}, 'guard.factor', 'below 1, got 1.0'),
    ({'awp__warmup_epochs': 1, 'awp__warmup_steps': 5},
     'awp.warmup_epochs=1', 'awp.warmup_steps=5'),
    ({'extra__fraction': 0.5}, 'extra.path', '0.5'),
    ({'extra__path': 'a.npz'}, 'extra.fraction', "'a.npz'"),
    ({'objective': 'MART', 'augmentation__mixup': 1.0},
     'augmentation.mixup', "'TRADES'"),
    ({'objective': 'PGD'}, "'natural'", "got 'PGD'"),
])
def test_bad_values(fields, shown, allowed):
  with pytest.raises(ValueError) as error:
    setup.build(changed(**fields))
  text = str(error.value)
  assert shown in text and allowed in text, text
  assert '\n' not in text


@pytest.mark.parametrize('fields, shown', [
    ({'model__depth': 12}, '6 n + 4'),
    ({'model__name': 'preact_resnet', 'model__depth': 19}, '[10, 18, 34, 50]'),
    ({'model__activation': 'rely'}, "Did you mean 'relu'"),
])
def test_bad_models(fields, shown):
  config = changed(**fields)
  setup.build(config)
  with pytest.raises(ValueError) as error:
    setup.build_model(config, data.load('digits', num_train=10))
  assert shown in str(error.value)


def test_devices_that_do_not_divide_a_batch():
  setup.check_devices(32, 8, 'batch_size')
  with pytest.raises(ValueError, match=r'batch_size=30 .* 8 devices; 24 or 32'):
    setup.check_devices(30, 8, 'batch_size')
  with pytest.raises(ValueError, match=r'8 devices; 8 would'):
    setup.check_devices(5, 8, 'batch_size')


@pytest.mark.parametrize('wrong, near', [
    ('gama', 'awp.gamma'), ('awp.gama', 'awp.gamma'), ('epoch', 'epochs'),
    ('threat.eps', 'threat.epsilon'), ('lerning_rate',
                                       'optimizer.learning_rate')])
def test_unknown_field_names_the_nearest(wrong, near):
  known = base.get_config()
  config = cifar10_awp.get_config()
  with config.unlocked():
    config.update_from_flattened_dict({})
    owner = config
    *parents, name = wrong.split('.')
    for parent in parents:
      owner = owner[parent]
    owner[name] = 1
  with pytest.raises(ValueError) as error:
    setup.check_fields(config, known)
  assert repr(wrong) in str(error.value) and repr(near) in str(error.value)


def test_missing_field():
  config = ml_collections.ConfigDict(cifar10_awp.get_config().to_dict())
  del config.awp.gamma
  with pytest.raises(ValueError, match=r"lacks the field 'awp\.gamma'"):
    setup.check_fields(config, base.get_config())
