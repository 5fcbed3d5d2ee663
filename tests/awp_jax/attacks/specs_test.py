"""Public attacks pass every argument on to the spec that runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.evaluation import evaluate
from awp_jax.evaluation.model import make_model
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles


def source_fn(x):
  return jnp.concatenate([x, 1 - x], axis=1)


APGD = {'loss': 'dlr-targeted', 'num_steps': 7, 'restarts': 2,
        'num_targets': 3, 'targeted': True, 'eps_schedule': True}
FAB = {'targeted': True, 'num_steps': 7, 'restarts': 2, 'num_targets': 3}
SQUARE = {'num_queries': 7, 'p_init': 1.0, 'restarts': 2, 'rescale': True}
SPSA = {'num_steps': 7, 'num_samples': 6, 'radius': 0.02, 'step_size': 0.03}
CW = {'step_size': 0.03, 'num_steps': 7, 'restarts': 2}
TRANSFER = {'step_size': 0.03, 'num_steps': 7, 'loss': 'margin'}


def call(attack, *models, **arguments):
  return attack(
      jax.random.key(0), *models, source_fn, np.full((2, 1), 0.25, np.float32),
      np.zeros(2, int), ThreatModel('Linf', 0.1), **arguments)


@pytest.mark.parametrize('attack, models, arguments, expected, white_box', [
    (awp_jax.apgd, (), APGD, APGD | {'attack': 'apgd'}, True),
    (awp_jax.fab, (), FAB, FAB | {'attack': 'fab'}, True),
    (awp_jax.square, (), SQUARE, SQUARE | {'attack': 'square'}, False),
    (awp_jax.spsa, (), SPSA, SPSA | {'attack': 'spsa'}, False),
    (awp_jax.cw_attack, (), CW, CW | {
        'attack': 'pgd', 'loss': 'margin', 'random_start': True,
        'source_fn': None}, True),
    (awp_jax.transfer_attack, (source_fn,), TRANSFER, TRANSFER | {
        'attack': 'pgd', 'restarts': 1, 'random_start': True,
        'source_fn': source_fn}, False)])
def test_arguments_reach_the_spec(
    attack, models, arguments, expected, white_box, monkeypatch):
  seen = []

  def stub(key, logits_fn, images, labels, threat, specs, *, options):
    del key, logits_fn, images, labels, threat
    seen.extend([*specs, options])

  monkeypatch.setattr(evaluate, 'evaluate', stub)
  options = awp_jax.EvalOptions(batch_size=1)
  call(attack, *models, options=options, **arguments)
  spec, used = seen
  assert spec.settings == expected and used is options
  assert spec.white_box is white_box
  assert spec.num_targets == (3 if arguments.get('targeted') else 0)
  assert spec.needs_images is (attack is awp_jax.square)


@pytest.mark.parametrize('targeted, name', [(True, 'fab-t'), (False, 'fab')])
def test_names_of_fab(targeted, name, monkeypatch):
  seen = []
  monkeypatch.setattr(
      evaluate, 'evaluate',
      lambda *arguments, options: seen.extend(arguments[-1]))
  call(awp_jax.fab, targeted=targeted)
  assert [spec.name for spec in seen] == [name]
  assert seen[0].settings['num_steps'] == 100
  assert seen[0].num_targets == (9 if targeted else 0)


@pytest.mark.parametrize('spec, expected', [
    (awp_jax.apgd_spec('a', loss='ce'), {
        'num_steps': 100, 'restarts': 1, 'num_targets': 9, 'targeted': False,
        'eps_schedule': False}),
    (awp_jax.fab_spec('a', targeted=True), {
        'num_steps': 100, 'restarts': 1, 'num_targets': 9}),
    (awp_jax.square_spec(), {
        'num_queries': 5000, 'p_init': 0.8, 'restarts': 1, 'rescale': False}),
    (awp_jax.spsa_spec(), {
        'num_steps': 100, 'num_samples': 256, 'radius': 0.001,
        'step_size': 0.01}),
    (awp_jax.pgd_spec('a', step_size=0.1, num_steps=3), {
        'loss': 'ce', 'restarts': 1, 'random_start': True, 'source_fn': None})])
def test_default_settings_of_specs(spec, expected):
  assert spec.settings.items() >= expected.items()


@pytest.mark.parametrize('attack, models, arguments, expected', [
    (awp_jax.apgd, (), {}, {
        'loss': 'ce', 'num_steps': 100, 'restarts': 1, 'num_targets': 9,
        'eps_schedule': False}),
    (awp_jax.fab, (), {}, {
        'targeted': False, 'num_steps': 100, 'restarts': 1, 'num_targets': 9}),
    (awp_jax.square, (), {}, {
        'num_queries': 5000, 'p_init': 0.8, 'restarts': 1, 'rescale': False}),
    (awp_jax.spsa, (), {}, {
        'num_steps': 100, 'num_samples': 256, 'radius': 0.001,
        'step_size': 0.01}),
    (awp_jax.cw_attack, (), {'step_size': 0.1}, {
        'num_steps': 100, 'restarts': 1}),
    (awp_jax.transfer_attack, (source_fn,), {'step_size': 0.1}, {
        'num_steps': 20, 'loss': 'ce'})])
def test_default_settings_of_attacks(
    attack, models, arguments, expected, monkeypatch):
  seen = []
  monkeypatch.setattr(
      evaluate, 'evaluate',
      lambda *arguments, options: seen.extend(arguments[-1]))
  call(attack, *models, **arguments)
  assert seen[0].settings.items() >= expected.items()


@pytest.mark.parametrize('num_samples, evaluations', [(2, 3), (6, 7), (7, 7)])
def test_spsa_evaluates_pairs_of_samples(num_samples, evaluations):
  calls = []

  def logits(images, keys):
    calls.append(images.shape)
    return source_fn(images)

  spec = awp_jax.spsa_spec(num_samples=num_samples, num_steps=3)
  batch = attack_oracles.examples(np.full((2, 1), 0.25, np.float32))
  model = make_model(source_fn, 2)._replace(logits=logits)
  attack = spec.build(model, ThreatModel('Linf', 0.1))
  after, _ = attack.step(batch, attack.init(batch))
  assert len(calls) == evaluations  # the iterate, and two for each direction
  assert attack.num_runs == 1
  # The margin 1 - 2 x has slope -2 along either sign; Adam takes a tenth of it.
  np.testing.assert_allclose(after.mean, -0.2, rtol=1e-3)


@pytest.mark.parametrize('arguments, message', [
    ({'num_samples': 1}, '^num_samples .* >= 2, got 1'),
    ({'num_steps': 0}, '^num_steps .* >= 1, got 0'),
    ({'radius': 0.0}, '^radius .* > 0, got 0'),
    ({'step_size': -0.1}, '^step_size .* > 0, got -0.1')])
def test_bad_settings_of_spsa(arguments, message):
  with pytest.raises(ValueError, match=message):
    awp_jax.spsa_spec(**arguments)


@pytest.mark.parametrize('attack, arguments, name', [
    (awp_jax.spsa, {}, 'spsa'), (awp_jax.apgd, {'loss': 'dlr'}, 'apgd-dlr'),
    (awp_jax.apgd, {'loss': lambda z, y, t: z[:, 0]}, 'apgd-own')])
def test_names_of_other_attacks(attack, arguments, name, monkeypatch):
  seen = []
  monkeypatch.setattr(
      evaluate, 'evaluate',
      lambda *arguments, options: seen.extend(arguments[-1]))
  call(attack, **arguments)
  assert [spec.name for spec in seen] == [name]
