"""Tests the effects of every config field, changed separately."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from experiments.config import schema
from experiments.configs import base
from tests.helpers import named_parts
from tests.helpers.config_effects import effects, same
from tests.helpers.field_oracles import (
  ADV,
  BOX,
  EPS,
  EXTRA,
  KEYS,
  NATURAL,
  SERIES,
  SHRINK,
  STEP,
  cosine,
  cross_entropy,
  divergence,
  eval_key,
  landscape,
  of_steps,
  rates,
  rescheduled,
  shorter,
  shrunk,
  threats,
  updates,
)

#: Parts of another package.
PARTS = 'tests.helpers.named_parts'

#: A small `base`: 56 training images are three batches of 16 and one of 8.
SMALL = {
    'batch_size': 16, 'epochs': 4, 'eval.batch_size': 16, 'eval.num_train': 24,
    'log_every_steps': 2, 'awp.gamma': 0.01, 'model.depth': 10,
    'model.width': 2, 'guard.grace_steps': 0, 'landscape.num_train': 8,
    'landscape.num_test': 16, 'landscape.points': 3,
    'landscape.plane_points': 3,
    'evaluation.attacks': ('fgsm', 'pgd-20', 'cw-100', 'aa-standard')}


@dataclasses.dataclass
class Row:
  """The change of a field.

  Attributes:
    value: the new value.
    changes: the changed effects by name; no other effect may change.
    given: other fields, set before and after the change.
  """

  value: Any
  changes: dict[str, Any]
  given: dict[str, Any] = dataclasses.field(default_factory=dict)


#: Field -> its change.
TABLE = {
    'seed': Row(
        3, {'keys': KEYS, 'judged.key': ([0, 3],) * 4,
            **{f'{split}_key': eval_key(3, 5, number) for number, split in
               enumerate(('train', 'test', 'validation'))}},
        {'num_validation': 8}),
    'data_seed': Row(
        3, {'load.seed': 3, 'validation': [(8, 3)]}, {'num_validation': 8}),
    'dataset': Row('digits', {'load.name': 'digits'}),
    'data_dir': Row('d', {'load.data_dir': 'd'}),
    'npz_path': Row('a.npz', {'load.npz_path': 'a.npz'}),
    'num_train': Row(48, {'load.num_train': 48}),
    'num_test': Row(24, {'load.num_test': 24}),
    'image_size': Row(4, {'load.image_size': 4}),
    'num_validation': Row(8, shorter(
        12, 3, validation=[(8, 0)], validation_n=8, sizes=[16],
        validation_key=eval_key(0, 5, 2), updates=updates(at=rates(3)))),
    'data_on_device_gib': Row(0.0, {'streamed': True}),
    'extra.path': Row('b.npz', {'extra': [('b.npz',)]}, EXTRA),
    'extra.fraction': Row(0.25, {'mixed': [(12, 4)]}, EXTRA),
    'augmentation.pad': Row(2, {'policy.pad': 2}),
    'augmentation.pad_mode': Row('constant', {'policy.pad_mode': 'constant'}),
    'augmentation.flip': Row(False, {'policy.flip': False}),
    'augmentation.rotation': Row(15.0, {'policy.rotation': 15.0}),
    'augmentation.cutout': Row(3, {'policy.cutout': 3}),
    'augmentation.mixup': Row(1.0, {'policy.mixup': 1.0, 'labels': (2, 4)}),
    'augmentation.function': Row(
        f'{PARTS}:darken', {'policy.function': f'{PARTS}:darken'}),
    'model.name': Row(
        'wide_resnet', {
            'model': 'WideResNet', 'model.dropout_rate': 0.0,
            'model.shortcut': None, 'model.final_norm': None}),
    'model.depth': Row(18, {'model.depth': 18}),
    'model.width': Row(3, {'model.width': 3}),
    'model.activation': Row('silu', {'model.activation': 'silu'}),
    'model.normalize': Row(
        False, {'model.mean': (0.0,), 'model.std': (1.0,)}),
    # Accuracies are still computed in float32.
    'model.dtype': Row('bfloat16', {'model.dtype': np.dtype('bfloat16')}),
    'model.param_dtype': Row(
        'bfloat16', {'model.param_dtype': np.dtype('bfloat16')}),
    'model.sync_batch_norm': Row(True, {'model.axis_name': 'batch'}),
    'model.remat': Row(True, {'model.remat': True}),
    'init_from': Row('w.pt', {'init_from': [('w.pt',)]}),
    'objective': Row('TRADES', {
        'objective.name': 'TRADES', 'objective.attack_mode': 'eval',
        'objective.passes': ('adversarial', 'natural'),
        'objective.reference_passes': ('adversarial', 'natural', 'natural'),
        'attack_loss': divergence(),
        'train_loss': cross_entropy(NATURAL) + 6 * divergence()}),
    'beta': Row(
        5.0, {'train_loss': cross_entropy(NATURAL) + 5 * divergence()},
        {'objective': 'TRADES'}),
    'label_smoothing': Row(0.1, {'train_loss': cross_entropy(ADV, 0.1)}),
    'threat.norm': Row('L2', {
        'threat.norm': 'L2', 'eval.threat.norm': 'L2',
        **threats({'norm': 'L2', 'epsilon': EPS, **BOX})}),
    'threat.epsilon': Row(0.05, {
        'threat.epsilon': 0.05, 'eval.threat.epsilon': 0.05,
        **threats({'norm': 'Linf', 'epsilon': 0.05, **BOX}),
        'judged.steps': [0.05, STEP, STEP]}),
    'attack.name': Row(
        f'{PARTS}:attack', {'attack.algorithm': named_parts.attack}),
    'attack.step_size': Row(0.02, {
        'attack.step_size': 0.02, 'landscape.step_size': 0.02,
        'landscape.gradient.step_size': [0.02, 0.02]}),
    'attack.num_steps': Row(7, {'attack.num_steps': 7}),
    'attack.start': Row('zero', {'attack.start': 'zero'}),
    'attack.restarts': Row(2, {'attack.restarts': 2}),
    'attack.mode': Row('eval', {'attack.mode': 'eval'}),
    'weight_perturbation': Row('momentum_awp', {
        'method.name': 'momentum AWP', 'method.size': 1e-3, 'memory': True,
        'method.update_at': 'natural'}),
    'awp.gamma': Row(0.02, {'method.size': 0.02}),
    'awp.num_steps': Row(2, {'method.num_steps': 2}),
    'awp.alternations': Row(2, {'alternations': 2}),
    'awp.warmup_epochs': Row(1, {
        'factors': [0.0] * 4 + [1.0] * 12, 'watch.first': 4,
        'after trouble': [0.0] * 4 + [1.0] * 3}),
    'awp.warmup_steps': Row(5, {
        'factors': [0.0] * 5 + [1.0] * 11, 'watch.first': 5,
        'after trouble': [0.0] * 5 + [1.0] * 2}),
    'awp.update_at': Row('natural', {'method.update_at': 'natural'}),
    'statistics': Row('perturbed', {'statistics': 'perturbed'}),
    'epochs': Row(3, rescheduled(
        functools.partial(rates, epochs=3), **shorter(12, 4),
        updates=updates(at=rates(4, epochs=3)))),
    'batch_size': Row(24, shorter(
        12, 3, batch=(3, 8, 8, 3), labels=(3,),
        updates=updates(at=rates(3)))),
    # 8 images, the last batch, are fewer than two on each of eight devices.
    'accumulate': Row(2, shorter(
        12, 3, accumulate=2, sizes=[16], updates=updates(at=rates(3)))),
    'optimizer.name': Row('adamw', {'updates': updates('adamw')}),
    'optimizer.learning_rate': Row(0.2, rescheduled(
        functools.partial(rates, rate=0.2),
        updates=updates(at=rates(4, rate=0.2)))),
    'optimizer.momentum': Row(0.5, {'updates': updates(momentum=0.5)}),
    'optimizer.nesterov': Row(True, {'updates': updates(nesterov=True)}),
    'optimizer.b2': Row(
        0.9, {'updates': updates('adamw', b2=0.9)},
        {'optimizer.name': 'adamw'}),
    'optimizer.weight_decay': Row(0.1, {'updates': updates(weight_decay=0.1)}),
    'optimizer.l1': Row(0.1, {'updates': updates(l1=0.1)}),
    'optimizer.decay': Row('weights', {'updates': updates(decay='weights')}),
    'optimizer.clip_norm': Row(0.5, {'updates': updates(clip_norm=0.5)}),
    'optimizer.schedule': Row('cosine', rescheduled(
        cosine, updates=updates(at=cosine(4)))),
    'optimizer.warmup_epochs': Row(1.0, {
        'updates': updates(at=[0.025, 0.05, 0.075, 0.1, *rates(4)[4:]]),
        'schedule': [0.1 / 3, 0.2 / 3, 0.1, *rates(3)[3:]]}),
    'optimizer.decay_factor': Row(
        0.5, rescheduled(
            functools.partial(rates, factor=0.5),
            updates=updates(at=rates(4, factor=0.5)))),
    'optimizer.decay_at': Row(
        (0.25,), rescheduled(
            functools.partial(rates, at=(0.25,)),
            updates=updates(at=rates(4, at=(0.25,))))),
    'ema_decay': Row(0.9, {'average': True, 'decay': [0.9]}),
    # The second epoch is the best.
    'early_stopping_epochs': Row(
        1, shorter(12, 4, rates=rates(4)[3:12:4])),
    'guard.action': Row('shrink', {'after trouble': shrunk(0.5, 5)}),
    'guard.grace_steps': Row(7, {'watch.first': 7}),
    'guard.stretch_steps': Row(30, {'watch.stretch': 30}),
    'guard.factor': Row(0.25, {'after trouble': shrunk(0.25, 5)}, SHRINK),
    'guard.most_shrinks': Row(2, {'after trouble': shrunk(0.5, 2)}, SHRINK),
    'eval.every_epochs': Row(2, {
        'evaluations': [8, 16],
        'saves': of_steps(16, 4, best=(2,))['saves']}),
    'eval.batch_size': Row(8, {'eval.batch': 8}),
    'eval.step_size': Row(
        0.03, {'eval.step_size': 0.03, 'judged.steps': [EPS, 0.03, 0.03]}),
    'eval.num_steps': Row(11, {'eval.num_steps': 11}),
    'eval.num_train': Row(10, {'train_n': 10}),
    'loggers': Row((), {'loggers': ()}),
    'evaluation.attacks': Row(('spsa',), {
        'judged.specs': (['spsa'],), 'judged.images': (24,),
        'judged.batch_size': (64,), 'judged.key': ([0, 0],),
        'judged.threat': ({'norm': 'Linf', 'epsilon': EPS, **BOX},),
        'judged.attack_types': (None,), 'judged.steps': []}),
    'evaluation.attack_dtype': Row(
        'bfloat16', {'judged.attack_types': ('bfloat16',) * 4}),
    'evaluation.epsilons': Row((0.01, 0.02), {'judged.curves': [
        ('Linf', (0.01, 0.02), ['apgd-ce', 'apgd-t'], 24)]}),
    'evaluation.curve_attacks': Row(('square', 'pgd-7'), {
        'judged.curves': [('Linf', (0.01,), ['square', 'pgd-7'], 24)],
        'judged.steps': [EPS, STEP, STEP, STEP]},
        {'evaluation.epsilons': (0.01,)}),
    'evaluation.num_examples': Row(5, {'judged.images': (5,) * 4}),
    'evaluation.batch_size': Row(4, {'judged.batch_size': (4,) * 4}),
    'evaluation.save_examples': Row(True, {'judged.saved': 4}),
    'evaluation.torch_checkpoint': Row(
        __file__, {'judged.subjects': ['torch-fields_test']}),
    'landscape.num_train': Row(24, landscape(
        images=(24, 16) * 4 + (24,), batch_size=(24,) * 9) | {
            'landscape.gradient.batch_size': [24] * 2}),
    'landscape.num_test': Row(8, landscape(
        images=(8,) * 9, batch_size=(8,) * 9) | {
            'landscape.gradient.batch_size': [8] * 2}),
    'landscape.num_directions': Row(
        2, landscape(**{name: value[2:] if name != 'images' else (
            8, 16) * 3 + (8,) for name, value in SERIES.items()})),
    'landscape.points': Row(5, landscape(points=(5,) * 8 + (9,))),
    'landscape.range': Row(
        0.5, landscape(reach=(0.5,) * 6 + (0.05,) * 2 + (0.5,))),
    'landscape.adversarial_range': Row(
        0.1, landscape(reach=(1.0,) * 6 + (0.1,) * 2 + (1.0,))),
    'landscape.plane_points': Row(5, landscape(points=(3,) * 8 + (25,))),
    'landscape.num_steps': Row(3, {
        'landscape.num_steps': 3, 'landscape.gradient.num_steps': [3] * 2}),
    'landscape.batch_size': Row(8, {
        'landscape.batch_size': (8,) * 9,
        'landscape.gradient.batch_size': [8] * 2}),
    'landscape.seed': Row(4, landscape(key=([0, 4],) * 9)),
    'select_on': Row('validation', {
        'best': 3, 'saves': of_steps(12, 3, best=(1, 2, 3))['saves']},
        {'num_validation': 8}),
    'log_every_steps': Row(3, {'looks': of_steps(16, 4, 3)['looks']}),
    'checkpoint_every_steps': Row(3, {
        name: of_steps(16, 4, checkpoint_every=3)[name]
        for name in ('looks', 'saves')}),
}


def changed(fields):
  config = base.get_config()
  config.update_from_flattened_dict(SMALL | fields)
  return config


@pytest.fixture(scope='module')
def before():
  """The effects of `SMALL` with some fields set, cached."""
  known = {}

  def find(given):
    key = tuple(sorted(given.items()))
    if key not in known:
      known[key] = effects(changed(given))
    return known[key]

  return find


def test_every_field_is_in_the_table():
  assert TABLE.keys() == schema.flatten(base.get_config()).keys()


@pytest.mark.parametrize('field', TABLE)
def test_a_field_has_its_effect_and_no_other(field, before):
  row = TABLE[field]
  old = before(row.given)
  new = effects(changed({**row.given, field: row.value}))
  differing = {
      name for name in old | new
      if name not in old or name not in new or not same(old[name], new[name])}
  assert differing == row.changes.keys()
  for name, value in row.changes.items():
    assert same(value, new.get(name)), (name, new.get(name))


def test_effects_are_repeatable_and_compared_by_value():
  assert same(effects(changed({})), effects(changed({})))
  assert not same([1.0], [1.1]) and not same({'a': 1}, {'a': 2})
