"""Versions of AutoAttack: their attacks, budgets, draws and errors."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import apgd, autoattack, fab, square
from awp_jax.evaluation import model as models
from awp_jax.evaluation.evaluate import EvalOptions
from awp_jax.evaluation.protocol import AttackSpec, BoundAttack, Report
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles
from tests.helpers.attack_oracles import KEY, network

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')


def probe(look):
  """An attack that passes its model to `look` and ends at once."""

  def build(model, threat):
    look(model)

    def step(examples, state):
      no = examples.labels < 0
      return state, Report(examples.images, no, ~no, no)

    return BoundAttack(1, lambda examples: examples.runs, step)

  return AttackSpec('probe', build)


@pytest.mark.parametrize('version, asked, draws', (
    ('rand', None, 20), ('rand', 5, 5), ('standard', None, 1)))
def test_gradients_are_means_over_as_many_draws(version, asked, draws):
  count, gradients = 400, []

  def logits_fn(x, key):
    # A slope of mean 1 and standard deviation 3.
    slope = 1 + 3 * jax.random.normal(key, (len(x),))
    return jnp.stack([0 * slope, slope * x.sum(-1)], -1)

  def look(model):
    batch = attack_oracles.examples(np.full((count, 2), 0.5, np.float32))
    gradients.append(np.asarray(model.gradients(
        'difference', batch.images, batch.labels, batch.labels + 1,
        batch.keys).gradient))

  autoattack.auto_attack(
      KEY, logits_fn, np.full((4, 2), 0.5, np.float32), np.zeros(4, int),
      ThreatModel('L2', 0.1), version=version, attacks=(probe(look),),
      options=EvalOptions(
          batch_size=4, takes_key=True, eot_samples=asked, check_model=False))
  slopes = gradients[0][:, 0]
  spread = 3 / np.sqrt(draws)
  # Five standard errors.
  assert abs(slopes.mean() - 1) < 5 * spread / np.sqrt(count)
  assert abs(slopes.std() / spread - 1) < 5 / np.sqrt(2 * count)
  np.testing.assert_array_equal(gradients[0][:, 1], slopes)


def test_a_step_of_rand_takes_20_gradients():
  passes = []

  def logits_fn(x, key):
    jax.debug.callback(lambda: passes.append(1))
    return jnp.stack([1 + 0 * x[:, 0], 0 * x[:, 0]], -1)

  def run(steps):
    passes.clear()
    autoattack.auto_attack(
        KEY, logits_fn, np.full((1, 2), 0.5, np.float32), np.zeros(1, int),
        ThreatModel('L2', 0.1), version='rand',
        attacks=(apgd.apgd_spec('apgd-ce', loss='ce', num_steps=steps),),
        options=EvalOptions(batch_size=1, takes_key=True, check_model=False))
    jax.effects_barrier()
    return len(passes)

  assert run(3) - run(1) == 2 * 20


#: For each version and norm: attack, loss, runs, evaluations per run, as in the
#: published code. Square evaluates its start and then its queries; APGD in
#: three stages evaluates the start of each.
_APGD_T = ('apgd-t', 'dlr-targeted', 9, 101)
_FAB_T = ('fab-t', 'difference', 9, 100)
_SQUARE = ('square', None, 1, 5001)
BUDGETS = {
    ('standard', 'Linf'): (
        ('apgd-ce', 'ce', 1, 101), _APGD_T, _FAB_T, _SQUARE),
    ('standard', 'L2'): (
        ('apgd-ce', 'ce', 1, 101), _APGD_T, _FAB_T, _SQUARE),
    ('standard', 'L1'): (
        ('apgd-ce', 'ce', 5, 103), ('apgd-t', 'dlr-targeted', 5, 103),
        _FAB_T, _SQUARE),
    ('plus', 'Linf'): (
        ('apgd-ce', 'ce', 5, 101), ('apgd-dlr', 'dlr', 5, 101),
        ('fab', None, 5, 100), _SQUARE, _APGD_T, _FAB_T),
    ('plus', 'L1'): (
        ('apgd-ce', 'ce', 5, 101), ('apgd-dlr', 'dlr', 5, 101),
        ('fab', None, 5, 100), _SQUARE, _APGD_T, _FAB_T),
    ('rand', 'Linf'): (
        ('apgd-ce', 'ce', 1, 101), ('apgd-dlr', 'dlr', 1, 101)),
    ('fast', 'Linf'): (('apgd-ce', 'ce', 1, 101), _APGD_T),
    ('fast', 'L1'): (
        ('apgd-ce', 'ce', 5, 103), ('apgd-t', 'dlr-targeted', 5, 103)),
}


@pytest.mark.parametrize('version, norm', tuple(BUDGETS))
def test_budget_of_each_version(version, norm):
  names = autoattack.VERSIONS[version]
  specs = autoattack.make_specs(names, norm, version)
  assert len(specs) == len(BUDGETS[version, norm])
  images = np.full((2, 3, 3, 1), 0.5, np.float32)
  targets = np.tile(np.arange(1, 12), (2, 1))
  batch = attack_oracles.examples(images, targets=targets)
  losses = []

  def gradients(loss, x, *_):
    losses.append(loss)
    return attack_oracles.seen(jnp.zeros_like(x), jnp.zeros(len(x)))

  model = models.make_model(lambda x: x, 12)._replace(
      logits=lambda x, keys: jnp.zeros((len(x), 12)), gradients=gradients)
  for spec, budget in zip(specs, BUDGETS[version, norm], strict=True):
    name, loss, runs, evaluations = budget
    attack = spec.build(model, ThreatModel(norm, 0.1))
    assert (spec.name, attack.num_runs) == (name, runs)
    assert spec.num_targets == (0 if name[-2:] != '-t' else runs)
    if norm == 'L2' or (norm == 'L1' and name[:4] != 'apgd'):
      continue  # the number of steps is that of L_inf
    losses.clear()
    state = attack.init(batch)
    for time in (evaluations - 2, evaluations - 1):
      _, report = attack.step(batch, state._replace(
          time=jnp.full_like(state.time, time)))
      assert bool(report.finished.all()) == (time == evaluations - 1)
      assert not report.broken.any()
    assert losses == ([loss] * 2 if loss else [])


@pytest.mark.parametrize('version', tuple(autoattack.VERSIONS))
def test_draws_of_each_version(version):
  specs = autoattack.make_specs(autoattack.ATTACKS, 'L2', version)
  wanted = 20 if version == 'rand' else None
  assert [spec.eot_samples for spec in specs] == [wanted] * len(specs)


def bad_calls():
  logits_fn, images, labels = network(4)
  nan = images.copy()
  nan[0, 0, 0, 0] = np.nan
  fine = dict(logits_fn=logits_fn, images=images, labels=labels)
  return {
      'label too large': (
          dict(labels=labels + 9), r'labels must be in \[0, 5'),
      'label negative': (dict(labels=labels - 9), r'labels must be in \[0, 5'),
      'label count': (dict(labels=labels[:2]), r'shape \(4,\)'),
      'label dtype': (dict(labels=labels * 1.0), 'must be integers'),
      'outside the box': (dict(images=images * 255), r'must be in \[0.0, 1.0'),
      'nan': (dict(images=nan), 'without NaN'),
      'bytes': (dict(images=np.uint8(images)), 'division by 255'),
      'no examples': (
          dict(images=images[:0], labels=labels[:0]), 'at least one example'),
      'rank': (dict(images=images[:, 0, 0, 0]), 'rank >= 2'),
      'logits shape': (
          dict(logits_fn=lambda x: x), 'one array of logits'),
      'one class': (
          dict(logits_fn=lambda x: logits_fn(x)[:, :1]), 'at least 2 classes'),
      'version': (dict(version='standart'), "Did you mean 'standard'"),
      'attack': (dict(attacks=('apgd',)), "attack must be one of 'apgd-ce'"),
      'attack twice': (dict(attacks=('fab', 'fab')), 'distinct names'),
      'no attacks': (dict(attacks=()), 'at least one'),
      'square on vectors': (
          dict(images=images.reshape(4, -1)), 'Remove it from'),
      'batch size': (dict(options=EvalOptions(batch_size=0)), 'batch_size'),
  }, fine


@pytest.mark.parametrize('case', tuple(bad_calls()[0]))
def test_errors_come_before_compiling(case):
  cases, fine = bad_calls()
  changed, message = cases[case]
  arguments = {**fine, **changed}
  compiled = []

  def listen(event, *_, **__):
    if 'backend_compile' in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with pytest.raises(ValueError, match=message):
      autoattack.auto_attack(
          KEY, arguments.pop('logits_fn'), arguments.pop('images'),
          arguments.pop('labels'), ThreatModel('Linf', 0.1), **arguments)
    assert not compiled
    # The listener does see a compilation.
    jax.jit(lambda x: x + len(case))(np.float32(1))
    assert compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize('make, message', (
    (lambda: apgd.apgd_spec('a', loss='cw'), "loss must be .*got 'cw'"),
    (lambda: apgd.apgd_spec('a', loss='ce', num_steps=0),
     'num_steps must be a whole number >= 1, got 0'),
    (lambda: apgd.apgd_spec('a', loss='ce', restarts=0),
     'restarts must be a whole number >= 1, got 0'),
    (lambda: apgd.apgd_spec('a', loss='ce', num_targets=0),
     'num_targets must be a whole number >= 1, got 0'),
    (lambda: square.square_spec(p_init=0),
     r'p_init must be in \(0, 1\], got 0'),
    (lambda: square.square_spec(p_init=1.1), 'p_init must be in .* got 1.1'),
    (lambda: square.square_spec(num_queries=0),
     'num_queries must be a whole number >= 1, got 0'),
    (lambda: square.square_spec(restarts=0),
     'restarts must be a whole number >= 1, got 0'),
    (lambda: fab.fab_spec('f', targeted=True, num_targets=0),
     'num_targets must be a whole number >= 1, got 0'),
    (lambda: fab.fab_spec('f', targeted=True, num_steps=0),
     'num_steps must be a whole number >= 1, got 0'),
    (lambda: fab.fab_spec('f', targeted=True, restarts=0),
     'restarts must be a whole number >= 1, got 0'),
    (lambda: ThreatModel('L1', 0.0), 'epsilon must be .* > 0, got 0.0'),
))
def test_bad_settings(make, message):
  with pytest.raises(ValueError, match=message):
    make()
