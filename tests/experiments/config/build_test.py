"""Tests of the objects built from configs, and of invalid configs."""

from contextlib import nullcontext
from fractions import Fraction

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from awp_jax import models
from experiments.config import build, networks, optimizers, schema
from experiments.configs import base, cifar10_awp, digits_awp
from experiments.data import datasets
from experiments.parallel import mapping
from experiments.util import errors, named


def changed(**fields):
  """`digits_awp` with other values; `a__b` sets `a.b`."""
  config = digits_awp.get_config()
  with config.ignore_type():
    config.update_from_flattened_dict(
        {name.replace('__', '.'): value for name, value in fields.items()})
  return config


@pytest.mark.parametrize('epochs, steps', [(200, 391), (7, 3), (1, 5), (4, 1)])
def test_schedule_is_the_reference_rule(epochs, steps):
  config = changed(epochs=epochs, optimizer__learning_rate=0.1)
  schedule = optimizers.build_schedule(config, steps)
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
  schedule = optimizers.build_schedule(config, 1)
  np.testing.assert_allclose(
      [schedule(53), schedule(54)], [0.1, 0.01], rtol=1e-6)
  constant = optimizers.build_schedule(changed(optimizer__decay_at=()), 1)
  np.testing.assert_allclose(constant(10 ** 6), 0.1, rtol=1e-7)


def test_optimizer_decays_into_momentum():
  config = changed(
      epochs=4, optimizer__learning_rate=0.2, optimizer__momentum=0.9,
      optimizer__weight_decay=0.05)
  tx = optimizers.build_optimizer(config, 2)
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
  tx = optimizers.build_optimizer(
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
    ({'model__name': 'resnet18'}, "'preact_resnet'", "got 'resnet18'"),
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
    ({'awp__update_at': 'w'}, "'natural'", "got 'w'"),
    ({'awp__alternations': 2, 'attack__restarts': 3},
     'awp.alternations=2', 'attack.restarts=3'),
    ({'epochs': 0}, 'epochs', '>= 1, got 0'),
    ({'accumulate': 0}, 'accumulate', '>= 1, got 0'),
    ({'epochs': 1.5}, 'epochs', 'whole number >= 1, got 1.5'),
    ({'seed': -1}, 'seed', '[0, 2^32), got -1'),
    ({'seed': 2**32}, 'seed', 'got 4294967296'),
    ({'seed': True}, 'seed', 'whole number >= 0, got True'),
    ({'data_seed': True}, 'data_seed', 'whole number >= 0, got True'),
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
    build.build(changed(**fields))
  text = str(error.value)
  assert shown in text and allowed in text, text
  # It begins with a field, or with another of its group.
  assert text.startswith(tuple(name.split('__')[0] for name in fields)), text
  assert '\n' not in text


#: Group of fields -> smallest valid value, largest invalid value.
EDGES = {
    ('threat.epsilon', 'attack.step_size', 'eval.step_size'): (1e-30, 0.0),
    ('beta', 'awp.gamma', 'augmentation.rotation', 'augmentation.mixup',
     'data_on_device_gib'): (0.0, -1e-9),
    ('epochs', 'batch_size', 'attack.num_steps', 'attack.restarts',
     'awp.num_steps', 'awp.alternations', 'eval.every_epochs',
     'eval.batch_size', 'eval.num_steps', 'eval.num_train', 'model.width',
     'log_every_steps', 'guard.stretch_steps'): (1, 0),
    ('seed', 'data_seed', 'num_train', 'num_test', 'num_validation',
     'image_size', 'augmentation.pad', 'augmentation.cutout',
     'awp.warmup_epochs', 'awp.warmup_steps', 'checkpoint_every_steps',
     'early_stopping_epochs', 'guard.grace_steps',
     'guard.most_shrinks'): (0, -1),
    ('ema_decay', 'label_smoothing'): (0.0, -1e-9)}


@pytest.mark.parametrize('field, least, greatest', [
    (field, *edge) for fields, edge in EDGES.items() for field in fields])
def test_edges(field, least, greatest):
  build.build(changed(**{field: least}))
  with pytest.raises(errors.UserError) as error:
    build.build(changed(**{field: greatest}))
  assert str(error.value).startswith(f'{field} must be ')
  assert str(error.value).endswith(f'got {greatest!r}.')


@pytest.mark.parametrize('fields, allowed', [
    ({'guard.factor': 0.999}, True), ({'guard.factor': 0.0}, False),
    ({'guard.factor': 1.5}, False), ({'ema_decay': 0.999}, True),
    ({'ema_decay': 1.5}, False), ({'label_smoothing': 0.999}, True),
    ({'extra.fraction': 0.999, 'extra.path': 'a'}, True),
    ({'extra.fraction': 1.0, 'extra.path': 'a'}, False),
    ({'extra.fraction': -0.1, 'extra.path': 'a'}, False),
    ({'extra.fraction': 0.0, 'extra.path': 'a'}, False),
    ({'extra.fraction': 0.1, 'extra.path': ''}, False),
    ({'extra.fraction': float('nan'), 'extra.path': 'a'}, False),
    ({'awp.alternations': 2}, True), ({'attack.restarts': 2}, True),
    ({'awp.alternations': 2, 'attack.restarts': 2}, False),
    ({'awp.warmup_epochs': 3}, True), ({'awp.warmup_steps': 3}, True),
    ({'awp.warmup_epochs': 1, 'awp.warmup_steps': 1}, False),
    ({'objective': 'MART', 'augmentation.mixup': 0.0}, True),
    ({'objective': 'MART', 'augmentation.mixup': 1e-3}, False),
    ({'objective': 'TRADES', 'augmentation.mixup': 1.0}, True),
    ({'objective': 'natural', 'augmentation.mixup': 1.0}, True),
    ({'select_on': 'validation', 'num_validation': 1}, True),
    ({'select_on': 'validation', 'num_validation': 0}, False),
    ({'select_on': 'test', 'num_validation': 1}, True),
    ({'dataset': 'npz', 'npz_path': 'a.npz'}, True),
    ({'dataset': 'npz', 'npz_path': ''}, False),
    ({'model.param_dtype': 'float64'}, False),
    ({'model.dtype': 'bfloat16', 'model.param_dtype': 'bfloat16'}, True),
    ({'weight_perturbation': 'awp(gamma=0.1)', 'awp.gamma': 0.0}, True),
    ({'weight_perturbation': 'awp(every=2)', 'awp.gamma': 0.0}, False),
    ({'weight_perturbation': 'awp(every=2)', 'awp.gamma': 0.1}, True),
    ({'weight_perturbation': 'awp', 'awp.gamma': 0.0}, True),
    ({'weight_perturbation': 'awp()', 'awp.gamma': 0.0}, True),
    ({'weight_perturbation': ' sam '}, True),
    ({'weight_perturbation': 'sam.x'}, False),
    ({'weight_perturbation': 'sam(0.1, rho=0.1)'}, False),
    ({'weight_perturbation': 'a.sam(rho=0.1)'}, False),
    ({'weight_perturbation': 'sam(**{})'}, False),
    ({'weight_perturbation': 'sam('}, False),
], ids=str)
def test_values_together(fields, allowed):
  if allowed:
    build.build(changed(**fields))
    return
  with pytest.raises(errors.UserError) as error:
    build.build(changed(**fields))
  # The error shows the invalid value.
  assert any(
      repr(value) in str(error.value) or str(value) in str(error.value)
      for value in fields.values() if value != ''), error.value
  assert '\n' not in str(error.value)


def test_float64_needs_64_bit_arrays(x64):
  build.build(changed(**{
      'model.dtype': 'float64', 'model.param_dtype': 'float64'}))


def test_objects_are_what_the_config_says():
  built = build.build(changed(**{
      'objective': 'MART', 'threat.norm': 'L2', 'threat.epsilon': 0.5,
      'attack.step_size': 0.1, 'attack.num_steps': 3, 'attack.restarts': 2,
      'attack.start': 'gaussian', 'attack.mode': 'train',
      'eval.step_size': 0.2, 'eval.num_steps': 7}))
  assert built.objective.name == 'MART'
  assert (built.threat.norm, built.threat.epsilon) == ('L2', 0.5)
  assert built.attack == (0.1, 3, 'gaussian', 2, 'train', None)
  assert built.eval_attack == (0.2, 7, 'random', 1, None, None)


@pytest.mark.parametrize('name', build.OBJECTIVES)
def test_objectives_take_their_options(name):
  logits = jnp.asarray([[1.0, 0.0, -1.0], [0.0, 2.0, 0.5]])
  labels = jnp.asarray([0, 2])
  losses = {}
  for beta, smoothing in ((1.0, 0.0), (2.0, 0.0), (1.0, 0.3)):
    objective = build.build(changed(
        objective=name, beta=beta, label_smoothing=smoothing)).objective
    losses[beta, smoothing] = np.asarray(
        objective.train_loss(logits, 0.5 * logits, labels))
  assert objective.name == name
  plain = losses[1.0, 0.0]
  assert (losses[2.0, 0.0] != plain).any() == (name in ('TRADES', 'MART'))
  assert (losses[1.0, 0.3] != plain).all()


def test_the_network_is_what_the_config_says():
  dataset = datasets.load('digits', num_train=10)
  wide = networks.build(changed(**{
      'model.depth': 16, 'model.width': 2, 'model.activation': 'silu',
      'model.dtype': 'bfloat16'}), dataset)
  assert (type(wide), wide.depth, wide.width, wide.activation) == (
      models.WideResNet, 16, 2, 'silu')
  assert (wide.num_classes, wide.mean, wide.std) == (
      10, dataset.mean, dataset.std)
  assert (wide.dtype, wide.param_dtype) == (jnp.bfloat16, jnp.float32)
  assert wide.axis_name is None
  plain = networks.build(changed(**{
      'model.name': 'preact_resnet', 'model.depth': 10,
      'model.normalize': False, 'model.param_dtype': 'bfloat16',
      'model.sync_batch_norm': True}), dataset)
  assert (type(plain), plain.mean, plain.std) == (
      models.PreActResNet, (0.0,), (1.0,))
  assert (plain.dtype, plain.param_dtype) == (jnp.float32, jnp.bfloat16)
  assert plain.axis_name == mapping.AXIS


@pytest.mark.parametrize('text, call', [
    ('sam', ('sam', {})), ('sam()', ('sam', {})),
    ('sam(rho=0.1)', ('sam', {'rho': 0.1})),
    (' rwp(gamma=1e-2, c_min=None) ', ('rwp', {'gamma': 0.01, 'c_min': None})),
    ("awp(update_at='natural', every=2)",
     ('awp', {'update_at': 'natural', 'every': 2}))])
def test_calls(text, call):
  assert named.parse_call(text) == call


def test_options_of_a_call_go_before_those_of_the_group():
  config = changed(**{
      'awp.gamma': 0.5, 'awp.num_steps': 2, 'awp.update_at': 'natural'})
  method = build.build(config).perturbation
  assert (method.ball.size, method.num_steps, method.update_at) == (
      0.5, 2, 'natural')
  config.weight_perturbation = 'awp(gamma=0.25, num_steps=3)'
  method = build.build(config).perturbation
  assert (method.ball.size, method.num_steps, method.update_at) == (
      0.25, 3, 'natural')
  config.weight_perturbation = 'sam(rho=0.125)'
  method = build.build(config).perturbation
  assert (method.name, method.ball.size, method.num_steps) == ('SAM', 0.125, 1)


@pytest.mark.parametrize('fields, shown', [
    ({'model__depth': 12}, '6 n + 4'),
    ({'model__name': 'preact_resnet', 'model__depth': 19}, '[10, 18, 34, 50]'),
    ({'model__activation': 'rely'}, "Did you mean 'relu'"),
])
def test_bad_models(fields, shown):
  config = changed(**fields)
  build.build(config)
  with pytest.raises(ValueError) as error:
    networks.build(config, datasets.load('digits', num_train=10))
  assert shown in str(error.value)


@pytest.mark.parametrize('sizes, error', [
    ((32, 8), ''), ((8, 8), ''), ((3, 1), ''), ((48, 4, 3), ''),
    ((30, 8), r'field=30 .* 8 devices; 24 or 32 would\.'),
    ((5, 8), r'8 devices; 8 would\.'), ((17, 8), '; 16 or 24 would'),
    ((32, 4, 3), '4 devices, times accumulate=3 parts; 24 or 36 would')])
def test_devices_and_parts_that_divide_a_batch(sizes, error):
  with pytest.raises(errors.UserError, match=error) if error else nullcontext():
    build.check_devices(*sizes[:2], 'field', *sizes[2:])


@pytest.mark.parametrize('wrong, near', [
    ('gama', 'awp.gamma'), ('awp.gama', 'awp.gamma'), ('epoch', 'epochs'),
    ('threat.eps', 'threat.epsilon'), ('lerning_rate',
                                       'optimizer.learning_rate')])
def test_unknown_field_names_the_nearest(wrong, near):
  known = base.get_config()
  config = cifar10_awp.get_config()
  with config.unlocked():
    owner = config
    *parents, name = wrong.split('.')
    for parent in parents:
      owner = owner[parent]
    owner[name] = 1
  with pytest.raises(ValueError) as error:
    schema.check(config, known)
  assert repr(wrong) in str(error.value) and repr(near) in str(error.value)


def test_missing_field():
  config = ml_collections.ConfigDict(cifar10_awp.get_config().to_dict())
  del config.awp.gamma
  with pytest.raises(ValueError, match=r"lacks the field 'awp\.gamma'"):
    schema.check(config, base.get_config())
