"""Whole attacks on small models: verdicts, streaming, resuming, warnings."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax import loops
from awp_jax.attacks import apgd, autoattack, fab, fixed_step, spsa, square
from awp_jax.attacks import model as models
from awp_jax.attacks.contract import Attack, AttackSpec, Report
from awp_jax.attacks.evaluation import EvalOptions, evaluate
from awp_jax.attacks.results import RobustnessWarning, confidence_interval
from awp_jax.threat import ThreatModel
from tests import attack_oracles

KEY = attack_oracles.KEY
problem = attack_oracles.network
pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.attacks.results.RobustnessWarning')
NORMS = ('Linf', 'L2', 'L1')
#: Radii at which about half of the examples of `problem` break. Compiled pieces
#: are kept per shape, batch size and threat model, so the tests share those.
RADII = {'Linf': 0.03, 'L2': 0.25, 'L1': 1.5}


def short(name, steps=12):
  """Each attack with a small budget."""
  return {
      'apgd-ce': lambda: apgd.apgd_spec(
          'apgd-ce', loss='ce', num_steps=steps, restarts=2),
      'apgd-dlr': lambda: apgd.apgd_spec(
          'apgd-dlr', loss='dlr', num_steps=steps),
      'apgd-t': lambda: apgd.apgd_spec(
          'apgd-t', loss='dlr-targeted', num_steps=steps, num_targets=3),
      'fab': lambda: fab.fab_spec(
          'fab', targeted=False, num_steps=steps, restarts=2),
      'fab-t': lambda: fab.fab_spec(
          'fab-t', targeted=True, num_steps=steps, num_targets=3),
      'square': lambda: square.square_spec(num_queries=15 * steps),
      'pgd': lambda: fixed_step.pgd_spec(
          'pgd', step_size=0.4, num_steps=steps, restarts=2),
      'spsa': lambda: spsa.spsa_spec(
          num_steps=steps, num_samples=16, step_size=0.03),
  }[name]()


SMALL = EvalOptions(batch_size=8, check_model=False)


def check_examples(result, logits_fn, images, labels, threat):
  """What every result must satisfy."""
  x_adv = result.adversarial
  changed = (x_adv != images).reshape(len(images), -1).any(-1)
  broken = result.natural & ~result.robust
  assert (changed <= broken).all()
  assert np.isfinite(x_adv).all()
  assert x_adv.min() >= -1e-6 and x_adv.max() <= 1 + 1e-6
  far = np.asarray(threat.distance(x_adv, images))
  assert far.max() <= threat.epsilon * (1 + 1e-6) + 1e-6
  wrong = np.asarray(jnp.argmax(logits_fn(x_adv), -1) != labels)
  assert wrong[broken].all()
  assert not wrong[result.robust].any()
  named = np.concatenate([a.broken for a in result.attacks])
  np.testing.assert_array_equal(np.sort(named), np.flatnonzero(broken))
  largest = max(a.largest_distance for a in result.attacks)
  np.testing.assert_allclose(largest, far.max(), rtol=1e-4)


#: Every attack, in one norm or two; the steps of each norm have tests of their
#: own.
MATRIX = (
    ('apgd-ce', 'Linf'), ('apgd-ce', 'L1'), ('apgd-dlr', 'Linf'),
    ('apgd-t', 'L2'), ('fab', 'Linf'), ('fab-t', 'L2'), ('fab-t', 'L1'),
    ('square', 'L2'), ('square', 'L1'), ('pgd', 'L1'), ('spsa', 'L2'))


@pytest.mark.parametrize('name, norm', MATRIX)
def test_each_attack_in_its_norms(name, norm):
  logits_fn, images, labels = problem()
  threat = ThreatModel(norm, RADII[norm])
  result = evaluate(
      KEY, logits_fn, images, labels, threat, (short(name),), options=SMALL)
  check_examples(result, logits_fn, images, labels, threat)
  assert result.natural_accuracy == 1
  assert result.robust_accuracy < 0.9


def test_verdicts_do_not_depend_on_the_batch():
  logits_fn, images, labels = problem()
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [short(name) for name in ('apgd-ce', 'square')]
  robust = [
      evaluate(KEY, logits_fn, images, labels, threat, (spec,),
               options=EvalOptions(batch_size=size, check_model=False)).robust
      for spec in specs for size in (8, 12)]
  for one, other in zip(robust[::2], robust[1::2], strict=True):
    np.testing.assert_array_equal(one, other)
  # Alone an attack draws what it draws in a list, so the verdicts intersect.
  together = evaluate(
      KEY, logits_fn, images, labels, threat, specs, options=SMALL)
  np.testing.assert_array_equal(
      together.robust, np.logical_and.reduce(robust[::2]))
  accuracies = [a.robust_accuracy for a in together.attacks]
  assert accuracies == sorted(accuracies, reverse=True)


@pytest.mark.parametrize('name', ('apgd-t', 'fab', 'square'))
def test_chunks_of_iterations_give_the_same_verdicts(name, monkeypatch):
  # As on accelerators: ten iterations in one compiled loop, and one batch.
  logits_fn, images, labels = problem()
  threat = ThreatModel('Linf', RADII['Linf'])
  arguments = KEY, logits_fn, images, labels, threat, (short(name),)
  one_by_one = evaluate(*arguments, options=SMALL)
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  chunked = evaluate(*arguments, options=SMALL)
  check_examples(chunked, logits_fn, images, labels, threat)
  np.testing.assert_array_equal(chunked.robust, one_by_one.robust)


def test_resumes_with_the_same_result():
  logits_fn, images, labels = problem()
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [short(name) for name in ('apgd-ce', 'square')]
  records = []

  def run(progress=None, done=(), group_size=6):
    return evaluate(
        KEY, logits_fn, images, labels, threat, specs,
        options=EvalOptions(
            batch_size=8, group_size=group_size, progress=progress, done=done,
            check_model=False))

  whole = run(records.append)
  assert len(records) > 4, records
  for kept in (1, 4):
    late = []
    again = run(late.append, done=records[:kept])
    assert len(late) == len(records) - kept
    np.testing.assert_array_equal(again.adversarial, whole.adversarial)
    np.testing.assert_array_equal(again.robust, whole.robust)
  with pytest.raises(ValueError, match='belongs to another evaluation'):
    run(done=records, group_size=5)


def test_recompiles_for_no_count():
  traces = []
  logits_fn, images, labels = problem(40)

  def counted(x):
    traces.append(x.shape[0])
    return logits_fn(x)

  evaluate(
      KEY, counted, images, labels, ThreatModel('Linf', 0.03),
      (short('apgd-ce'), short('apgd-dlr')),
      options=EvalOptions(batch_size=8, check_model=False))
  # One trace for the classes, one for logits, one for gradients.
  assert len(traces) == 3, traces


def test_memory_does_not_grow_with_the_examples():
  logits_fn, images, labels = problem(10_000, shape=(3, 3, 1))
  largest = []

  def measure(_):
    largest[-1] = max(
        largest[-1], sum(a.nbytes for a in jax.live_arrays()))

  for count in (1000, 10_000):
    largest.append(0)
    result = autoattack.auto_attack(
        KEY, logits_fn, images[:count], labels[:count],
        ThreatModel('Linf', 0.1),
        attacks=(
            apgd.apgd_spec('ce', loss='ce', num_steps=3), short('square', 1)),
        options=EvalOptions(
            batch_size=500, progress=measure, keep_images=False,
            check_model=False))
    assert result.adversarial is None
    assert result.robust.shape == (count,)
  assert largest[1] <= 1.1 * largest[0], largest


def test_quantised_inputs_are_flagged_and_broken_by_square():
  logits_fn, images, labels = problem()

  def masked(x):
    return logits_fn(jnp.round(x * 24) / 24)

  labels = np.asarray(jnp.argmax(masked(images), -1))
  threat = ThreatModel('Linf', RADII['Linf'])
  with pytest.warns(RobustnessWarning) as caught:
    result = autoattack.auto_attack(
        KEY, masked, images, labels, threat,
        attacks=(
            fixed_step.pgd_spec(
                'pgd', step_size=0.01, num_steps=10, random_start=False),
            short('square')),
        options=EvalOptions(batch_size=8))
  kinds = {w.kind for w in result.warnings}
  assert {'zero-gradients', 'square-stronger'} <= kinds
  assert len(caught) >= 2
  assert len(result.attacks[0].broken) == 0
  assert len(result.attacks[1].broken) > 4
  check_examples(result, masked, images, labels, threat)


def test_saturated_softmax_is_flagged_and_broken_by_square():
  logits_fn, images, labels = problem()

  def masked(x):
    # Probabilities of 0 and 1 in float32: no gradient anywhere.
    return jax.nn.softmax(1e4 * logits_fn(x))

  threat = ThreatModel('Linf', RADII['Linf'])
  with pytest.warns(RobustnessWarning):
    result = autoattack.auto_attack(
        KEY, masked, images, labels, threat,
        attacks=(
            # Of the margin, since rounding keeps cross-entropy's from being 0.
            fixed_step.pgd_spec(
                'cw', step_size=0.01, num_steps=10, random_start=False,
                loss='margin'),
            short('square')),
        options=EvalOptions(batch_size=8))
  kinds = {w.kind for w in result.warnings}
  assert {'probabilities', 'zero-gradients', 'square-stronger'} <= kinds
  # Next to a boundary even this softmax is not saturated.
  assert len(result.attacks[0].broken) <= 2
  assert len(result.attacks[1].broken) > 4
  check_examples(result, masked, images, labels, threat)


def warnings_of(logits_fn, images, labels, attack='apgd-ce'):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    result = evaluate(
        KEY, logits_fn, images, labels,
        ThreatModel('Linf', RADII['Linf']), (short(attack),),
        options=EvalOptions(batch_size=8))
  return {w.kind: w for w in result.warnings}


def test_no_warning_without_a_reason():
  assert warnings_of(*problem()) == {}


def test_warns_of_batch_statistics():
  logits_fn, images, labels = problem()
  assert set(warnings_of(
      lambda x: logits_fn(x - x.mean(0)), images, labels)) == {
          'batch-dependent'}


def test_warns_of_randomness():
  logits_fn, images, labels = problem()
  rng = np.random.default_rng(0)

  def frozen(x):
    return logits_fn(x + rng.normal(size=x.shape).astype(np.float32))

  def called(x):
    noise = jax.pure_callback(
        lambda: rng.normal(size=()).astype(np.float32),
        jax.ShapeDtypeStruct((), np.float32))
    return logits_fn(jax.lax.stop_gradient(noise) + x)

  assert 'randomized' in warnings_of(frozen, images, labels)
  assert 'randomized' in warnings_of(called, images, labels)


def test_warns_of_logits_that_are_not_finite():
  logits_fn, images, labels = problem()
  images[:3, 0, 0, 0], images[3:, 0, 0, 0] = 1.0, 0.0

  def broken(x):
    bad = (x[:, 0, 0, 0] == 1)[:, None]
    return jnp.where(bad, jnp.nan, logits_fn(x))

  found = warnings_of(broken, images, labels)
  assert found['non-finite'].num_examples == 3


@pytest.mark.parametrize('classes', (2, 3))
def test_few_classes(classes):
  logits_fn, images, labels = problem(classes=classes)
  threat = ThreatModel('Linf', RADII['Linf'])
  with pytest.warns(RobustnessWarning, match=f'with {classes} classes'):
    result = evaluate(
        KEY, logits_fn, images, labels, threat,
        [short(name) for name in ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab')],
        options=EvalOptions(batch_size=8))
  check_examples(result, logits_fn, images, labels, threat)
  assert result.attacks[0].robust_accuracy < 0.9
  assert any(w.kind == 'few-classes' for w in result.warnings)


def test_targeted_attacks_alone_break_few_classes():
  for classes in (2, 3):
    logits_fn, images, labels = problem(classes=classes)
    for name in ('apgd-dlr', 'apgd-t'):
      result = evaluate(
          KEY, logits_fn, images, labels,
          ThreatModel('Linf', RADII['Linf']), (short(name),), options=SMALL)
      assert result.robust_accuracy < 0.9


@pytest.mark.parametrize('shape', ((7,), (2, 3, 4, 2)))
def test_inputs_of_any_rank(shape):
  logits_fn, images, labels = problem(shape=shape)
  threat = ThreatModel('L2', 0.3)
  result = evaluate(
      KEY, logits_fn, images, labels, threat,
      (short('apgd-ce'), short('fab-t')), options=SMALL)
  check_examples(result, logits_fn, images, labels, threat)


@pytest.mark.parametrize('shape, norm', (
    ((4, 9, 1), 'L2'), ((11, 3, 2), 'L1'), ((1, 1, 3), 'Linf'),
    ((1, 2, 1), 'L2')))
def test_square_on_any_image(shape, norm):
  logits_fn, images, labels = problem(8, shape=shape)
  threat = ThreatModel(norm, 0.5)
  result = evaluate(
      KEY, logits_fn, images, labels, threat, (short('square', 4),),
      options=SMALL)
  check_examples(result, logits_fn, images, labels, threat)


def probe(look):
  """An attack that looks at its model and gives up at once."""

  def build(model, threat):
    look(model)

    def step(examples, state):
      no = examples.labels < 0
      return state, Report(examples.images, no, ~no, no)

    return Attack(1, lambda examples: examples.runs, step)

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
          batch_size=4, takes_key=True, num_draws=asked, check_model=False))
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


#: Of each version and norm: attack, loss, runs and evaluations of a run, as in
#: the published code. Square evaluates its start and then its queries; APGD in
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
      continue  # the steps are counted as for L_inf
    losses.clear()
    state = attack.init(batch)
    for time in (evaluations - 2, evaluations - 1):
      _, report = attack.step(batch, state._replace(
          time=jnp.full_like(state.time, time)))
      assert bool(report.finished.all()) == (time == evaluations - 1)
      assert not report.broken.any()
    assert losses == ([loss] * 2 if loss else [])


def bad_calls():
  logits_fn, images, labels = problem(4)
  nan = images.copy()
  nan[0, 0, 0, 0] = np.nan
  fine = dict(logits_fn=logits_fn, images=images, labels=labels)
  return {
      'label too large': (
          dict(labels=labels + 9), r'labels must lie in \[0, 5'),
      'label negative': (dict(labels=labels - 9), r'labels must lie in \[0, 5'),
      'label count': (dict(labels=labels[:2]), r'shape \(4,\)'),
      'label dtype': (dict(labels=labels * 1.0), 'must be integers'),
      'outside the box': (dict(images=images * 255), r'must lie in \[0.0, 1.0'),
      'nan': (dict(images=nan), 'hold no NaN'),
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
      'attack twice': (dict(attacks=('fab', 'fab')), 'each of its own name'),
      'no attacks': (dict(attacks=()), 'at least one'),
      'square on vectors': (
          dict(images=images.reshape(4, -1)), 'Leave it out'),
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
    # Had anything been compiled, it would have been heard.
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
     r'p_init must lie in \(0, 1\], got 0'),
    (lambda: square.square_spec(p_init=1.1), 'p_init must lie in .* got 1.1'),
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


def test_confidence_interval():
  lower, upper = confidence_interval(52, 256)
  # From the closed form, with z = 1.959964.
  np.testing.assert_allclose((lower, upper), (0.1584, 0.2566), atol=1e-4)
  assert confidence_interval(0, 10)[0] == 0
  assert confidence_interval(10, 10)[1] == 1
  with pytest.raises(ValueError, match='at most count'):
    confidence_interval(11, 10)


_DEVICES = '''
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import jax, numpy as np
import autoattack_test as t
logits_fn, images, labels = t.problem()
assert len(jax.devices()) == 2
results = [
    t.evaluate(
        t.KEY, logits_fn, images, labels, t.ThreatModel('Linf', 0.03),
        [t.short('apgd-ce')],
        options=t.EvalOptions(batch_size=8, devices=devices, check_model=False))
    for devices in (None, jax.devices())]
np.testing.assert_array_equal(results[0].robust, results[1].robust)
np.testing.assert_allclose(
    results[0].adversarial, results[1].adversarial, atol=1e-5)
print('same')
'''


def test_spreads_over_devices():
  here = pathlib.Path(__file__).parent
  script = _DEVICES.format(root=str(here.parent), tests=str(here))
  flags = ('--xla_force_host_platform_device_count=2 '
           '--xla_backend_optimization_level=0')
  done = subprocess.run(
      [sys.executable, '-c', script], capture_output=True, text=True,
      env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      check=False)
  assert done.stdout.strip() == 'same', done.stderr[-2000:]


def telling(data, norm, count):
  """Images of the fixture that say most for their time.

  Those on which the reference's attacks disagree come first, then those that
  they break, one that survives everything (those cost most), and last those
  that are misclassified without any attack.
  """
  stands = np.stack([data[f'{norm}/{name}'] for name in REFERENCE])
  logits = reference_network(data)(reference_images(data))
  natural = np.asarray(logits.argmax(-1)) == data['y']
  agree = (stands == stands[0]).all(0)
  groups = (~agree, agree & natural & ~stands[0], stands.all(0), ~natural)
  limits = (count, count, 1, count)
  rows = np.concatenate([
      np.flatnonzero(group)[:limit]
      for group, limit in zip(groups, limits, strict=True)])
  return rows[:count]


REFERENCE = ('apgd-ce', 'apgd-t', 'fab-t')


def reference_images(data):
  return data['x'].astype(np.float32).transpose(0, 2, 3, 1) / 255


def reference_network(data):
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'benchmarks'))
  try:
    import autoattack_fixture
  finally:
    sys.path.pop(0)
  return autoattack_fixture.network(data)


@pytest.mark.parametrize('norm, radius', (('Linf', 8 / 255), ('L2', 0.5)))
def test_verdicts_of_the_reference(norm, radius, load_fixture):
  data = load_fixture('autoattack')
  rows = telling(data, norm, 64)
  images, labels = reference_images(data)[rows], data['y'][rows]
  logits_fn = reference_network(data)
  threat = ThreatModel(norm, radius)
  stands = []
  for name in REFERENCE:
    result = autoattack.auto_attack(
        KEY, logits_fn, images, labels, threat, attacks=(name,),
        options=EvalOptions(batch_size=16, check_model=False))
    check_examples(result, logits_fn, images, labels, threat)
    np.testing.assert_array_equal(
        result.robust, data[f'{norm}/{name}'][rows], name)
    stands.append(result.robust)
  # Of these images Square breaks no further one in the whole of `standard`.
  np.testing.assert_array_equal(
      np.logical_and.reduce(stands), data[f'{norm}/robust'][rows])
  if norm == 'Linf':
    # Of other draws than the reference's, and of few: breaks nothing that
    # survives all of the reference, and half of what 5,000 queries break.
    result = autoattack.auto_attack(
        KEY, logits_fn, images, labels, threat,
        attacks=(square.square_spec(num_queries=200),),
        options=EvalOptions(batch_size=16, check_model=False))
    assert result.robust[data[f'{norm}/robust'][rows]].all()
    broken = result.natural & ~data[f'{norm}/square'][rows]
    assert np.sum(broken & ~result.robust) > broken.sum() / 2
