"""What counts as robust: judged in float32, inside the ball, never by NaN."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax import loops
from awp_jax.attacks import (
    apgd,
    arguments,
    autoattack,
    diagnostics,
    fab,
    fixed_step,
    identity,
    spsa,
)
from awp_jax.attacks.evaluation import evaluate
from awp_jax.threat import ThreatModel
from tests.attack_problem import KEY, QUIET, network, scripted, threshold

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.attacks.results.RobustnessWarning')
RADII = {'Linf': 0.04, 'L2': 0.1, 'L1': 0.25}


def kinds(result):
  return {(w.kind, w.attack): w.num_examples for w in result.warnings}


def with_nan_gradient(logits_fn):
  """The same logits; the gradient of the first entry is inf * 0 = NaN."""
  return lambda x: logits_fn(x) + jnp.sqrt(jnp.square(0 * x[:, :1]))


@pytest.mark.parametrize('norm, make', (
    ('Linf', lambda: apgd.apgd_spec('a', loss='ce', num_steps=8)),
    ('L1', lambda: apgd.apgd_spec('a', loss='ce', num_steps=8)),
    ('L2', lambda: fixed_step.pgd_spec('a', step_size=0.05, num_steps=8)),
    ('Linf', lambda: fab.fab_spec('a', targeted=True, num_steps=4))))
def test_nan_in_a_gradient_changes_no_verdict(norm, make):
  # The entry has no effect on the logits, so its gradient is 0 or NaN.
  logits_fn, images, labels = network()
  threat = ThreatModel(norm, RADII[norm])
  clean, nan = (
      evaluate(KEY, f, images, labels, threat, (make(),), options=QUIET)
      for f in (logits_fn, with_nan_gradient(logits_fn)))
  assert 0.1 < clean.robust_accuracy < 0.9
  np.testing.assert_array_equal(nan.robust, clean.robust)
  np.testing.assert_allclose(nan.adversarial, clean.adversarial, atol=1e-6)
  assert ('non-finite-gradient', 'a') not in kinds(clean)
  assert kinds(nan)['non-finite-gradient', 'a'] == len(images)
  assert nan.attacks[0].anomalies.nonfinite_gradient == len(images)


def test_spsa_survives_a_loss_that_is_not_finite():
  # Half of the pairs of points around the image meet logits of NaN.
  def cliff(x):
    low = jnp.sum(x, -1, keepdims=True) < 0.9 - 0.003
    return jnp.where(low, jnp.nan, threshold(x))

  result = spsa.spsa(
      KEY, cliff, np.full((4, 2), 0.45, np.float32), np.zeros(4, int),
      ThreatModel('Linf', 0.1), num_steps=10, num_samples=8, radius=0.002,
      step_size=0.02, options=QUIET)
  assert not result.robust.any()
  assert np.isfinite(result.adversarial).all()
  assert (result.adversarial[:, 0] > 0.5).all()
  assert result.attacks[0].anomalies.nonfinite_gradient == 4
  assert result.attacks[0].anomalies.nonfinite_logits == 0


def test_non_finite_gradients_are_counted_at_every_step():
  # Of the four runs that end as one batch, each is odd at another step.
  logits_fn = threshold
  images = np.full((2, 1), 0.3, np.float32)
  for step in range(4):
    odd = np.arange(4) == step
    spec = scripted(
        lambda examples, time: examples.images, [[0] * 4], nonfinite=[odd])
    result = evaluate(
        KEY, logits_fn, images, np.zeros(2, int), ThreatModel('Linf', 0.1),
        (spec,), options=QUIET)
    assert result.attacks[0].anomalies.nonfinite_gradient == 2, step
    assert result.robust.all()


def overflowing(x):
  """Logits that are NaN where the first input exceeds 0.55."""
  return jnp.where(x[:, :1] > 0.55, jnp.nan, threshold(x - 0.3))


def test_non_finite_logits_at_an_adversarial_example_are_broken():
  images = np.asarray([[0.5], [0.5], [0.3]], np.float32)
  result = fixed_step.cw_attack(
      KEY, overflowing, images, np.zeros(3, int), ThreatModel('Linf', 0.1),
      step_size=0.1, num_steps=3, options=QUIET)
  np.testing.assert_array_equal(result.robust, [False, False, True])
  assert result.natural.all()
  assert result.attacks[0].anomalies.nonfinite_logits == 2
  assert kinds(result)['non-finite', 'cw-3'] == 2


def test_non_finite_natural_logits_are_misclassified_and_counted():
  images = np.asarray([[0.6], [0.5], [0.7]], np.float32)
  spec = scripted(lambda examples, time: examples.images, [[0]])
  with pytest.warns(awp_jax.RobustnessWarning, match='2 natural images'):
    result = evaluate(
        KEY, overflowing, images, np.zeros(3, int), ThreatModel('Linf', 0.1),
        (spec,), options=QUIET)
  np.testing.assert_array_equal(result.natural, [False, True, False])
  np.testing.assert_array_equal(result.robust, [False, True, False])
  assert kinds(result) == {('non-finite', ''): 2}


@pytest.mark.parametrize('norm', ('Linf', 'L2', 'L1'))
def test_points_outside_of_ball_or_box_do_not_count(norm):
  # Two inputs; the second only adds to the distance or leaves the box.
  candidates = np.asarray([
      [0.55, 0.0], [0.55, 0.05], [0.61, 0.0], [0.5 + 0.1 * (1 + 1e-4), 0.0],
      [0.5 + 0.1 * (1 + 5e-6), 0.0], [0.55, -1e-3], [np.nan, 0.0],
      [0.55, np.nan]], np.float32)
  images = np.tile(np.asarray([[0.5, 0.0]], np.float32), (8, 1))
  labels = np.zeros(8, int)
  inside = np.asarray([1, 1, 0, 0, 1, 0, 0, 0], bool)
  if norm == 'L1':
    candidates[1, 1] = 0.06
    inside[1] = False
  # Which example it is stands in its targets' order only, so in a closure.
  table = jnp.asarray(candidates)

  def points(examples, time):
    return table[examples.labels // 1 + jnp.arange(8)]

  result = evaluate(
      KEY, threshold, images, labels, ThreatModel(norm, 0.1),
      (scripted(points, [[1]]),), options=QUIET)
  np.testing.assert_array_equal(result.robust, ~inside)
  assert result.attacks[0].anomalies.outside == np.sum(~inside)
  assert result.attacks[0].anomalies.refused == 0
  assert kinds(result)['outside', 'scripted'] == np.sum(~inside)
  np.testing.assert_array_equal(result.adversarial[~inside], images[~inside])


def noisy(x, key):
  noise = 0.1 * jax.random.normal(key, x.shape)
  return threshold(x + noise)


KEYED = dataclasses.replace(QUIET, takes_key=True)


def test_verdicts_of_a_randomised_model_do_not_depend_on_the_batch():
  images = np.full((40, 1), 0.45, np.float32)
  results = [
      evaluate(
          KEY, noisy, images, np.zeros(40, int), ThreatModel('Linf', 0.05),
          (scripted(lambda e, t: e.images + 0.04, [[1], [1]], runs=2),),
          options=dataclasses.replace(
              KEYED, batch_size=size, group_size=group))
      for size, group in ((4, 40), (8, 12), (40, 40))]
  assert 0.5 < results[0].natural_accuracy < 0.9
  assert 0.05 < results[0].robust_accuracy < 0.5
  for other in results[1:]:
    np.testing.assert_array_equal(other.natural, results[0].natural)
    np.testing.assert_array_equal(other.robust, results[0].robust)


@pytest.mark.parametrize('takes_key, when', ((False, 2), (True, 5)))
@pytest.mark.parametrize('chunked', (False, True))
def test_first_or_last_misclassified_iterate(
    takes_key, when, chunked, monkeypatch):
  # A deterministic model's run ends at its first; a randomised one's is judged
  # by the last before its end, step 7.
  def logits_fn(x, key=None):
    return threshold(x)

  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  steps = np.isin(np.arange(8), (2, 5))
  spec = scripted(
      lambda examples, time: examples.images + 0.01 * (
          1 + time[:, None].astype(jnp.float32)), [steps])
  result = evaluate(
      KEY, logits_fn, np.full((3, 1), 0.495, np.float32), np.zeros(3, int),
      ThreatModel('Linf', 0.1), (spec,),
      options=dataclasses.replace(QUIET, takes_key=takes_key))
  assert not result.robust.any()
  np.testing.assert_allclose(
      result.adversarial, 0.495 + 0.01 * (1 + when), atol=1e-6)
  np.testing.assert_allclose(
      result.attacks[0].largest_distance, 0.01 * (1 + when), atol=1e-6)


@pytest.mark.parametrize('chunked', (False, True))
def test_a_refused_claim_does_not_end_the_run(chunked, monkeypatch):
  # The attack claims success at every step, the model agrees from step 5 on.
  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  spec = scripted(
      lambda examples, time: examples.images + 0.01 * (
          1 + time[:, None].astype(jnp.float32)), [[1] * 8])
  images = np.asarray([[0.445], [0.455], [0.4]], np.float32)
  result = evaluate(
      KEY, threshold, images, np.zeros(3, int), ThreatModel('Linf', 0.2),
      (spec,), options=QUIET)
  np.testing.assert_array_equal(result.robust, [False, False, True])
  assert (result.adversarial[:2] > 0.5).all()
  if not chunked:
    np.testing.assert_allclose(result.adversarial[:2], 0.505, atol=1e-6)
  assert result.attacks[0].anomalies.refused == 3


@pytest.mark.parametrize('takes_key', (False, True))
def test_refused_examples_get_their_remaining_runs(takes_key):
  # Run 0 claims a point that the model classifies correctly, run 1 does not.
  def logits_fn(x, key=None):
    return threshold(x)

  def points(examples, time):
    return examples.images + jnp.where(examples.runs, 0.1, 0.02)[:, None]

  spec = scripted(points, [[0, 1]] * 2, runs=2)
  result = evaluate(
      KEY, logits_fn, np.full((20, 1), 0.45, np.float32), np.zeros(20, int),
      ThreatModel('Linf', 0.2), (spec,),
      options=dataclasses.replace(QUIET, takes_key=takes_key))
  assert not result.robust.any()
  np.testing.assert_allclose(result.adversarial, 0.55, atol=1e-6)
  assert result.attacks[0].anomalies.refused == 20


def reference_rand(rng, weights, images, labels, epsilon, steps, draws, noise):
  """The released policy of `rand` with APGD-CE on a noisy linear model.

  In NumPy and independent of ours: gradients averaged over `draws`, every run
  to its end, the last misclassified iterate judged by one fresh draw.

  Args:
    rng: of NumPy.
    weights: [D, C].
    images: [N, D].
    labels: [N].
    epsilon: the L_inf radius.
    steps: iterations.
    draws: per gradient.
    noise: standard deviation at the input.

  Returns:
    Which examples stand, [N].
  """
  rows = np.arange(len(images))

  def logits(x):
    return (x + noise * rng.normal(size=x.shape)) @ weights

  def look(x):
    gradient = np.zeros_like(x)
    for _ in range(draws):
      z = logits(x)
      z = z - z.max(-1, keepdims=True)
      p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
      loss = -np.log(p[rows, labels])
      p[rows, labels] -= 1
      gradient += p @ weights.T / draws
    return gradient, loss, z.argmax(-1) == labels

  def project(x):
    return np.clip(np.clip(x, images - epsilon, images + epsilon), 0, 1)

  natural = logits(images).argmax(-1) == labels
  start = rng.uniform(-1, 1, size=images.shape)
  start /= np.abs(start).max(-1, keepdims=True)
  x = project(images + epsilon * start)
  kept, step = images.copy(), np.full((len(images), 1), 2 * epsilon)
  gradient, best_loss, right = look(x)
  kept[~right] = x[~right]
  best, best_gradient, previous = x.copy(), gradient.copy(), x.copy()
  losses, window = [], max(int(0.22 * steps), 1)
  since, last_best, reduced = 0, best_loss.copy(), np.ones(len(x), bool)
  for t in range(steps):
    share = 0.75 if t else 1.0
    move = project(x + step * np.sign(gradient)) - x
    onward = project(x + share * move + (1 - share) * (x - previous))
    previous, x = x, onward
    gradient, loss, right = look(x)
    kept[~right] = x[~right]
    up = loss > best_loss
    best[up], best_gradient[up], best_loss[up] = x[up], gradient[up], loss[up]
    losses.append(loss)
    since += 1
    if since == window:
      recent = np.stack(losses[-window - 1:]) if t >= window else np.stack(
          [np.zeros_like(loss), *losses])
      rises = (np.diff(recent, axis=0) > 0).sum(0)
      halve = (rises <= 0.75 * window) | (~reduced & (last_best >= best_loss))
      step[halve] /= 2
      x, gradient = x.copy(), gradient.copy()
      x[halve], gradient[halve] = best[halve], best_gradient[halve]
      reduced, last_best, since = halve, best_loss.copy(), 0
      window = max(window - max(int(0.03 * steps), 1),
                   max(int(0.06 * steps), 1))
  return natural & (logits(kept).argmax(-1) == labels)


def test_rand_follows_the_policy_of_the_reference():
  rng = np.random.default_rng(0)
  count, size, noise, epsilon = 900, 8, 0.25, 0.05
  weights = rng.normal(size=(size, 3)).astype(np.float32)
  images = rng.uniform(0.2, 0.8, size=(count, size)).astype(np.float32)
  labels = (images @ weights).argmax(-1)
  arguments = images, labels, epsilon, 16, 4, noise
  expected = [
      reference_rand(np.random.default_rng(seed), weights, *arguments).mean()
      for seed in (1, 2, 3)]

  def noisy_fn(x, key):
    return (x + noise * jax.random.normal(key, x.shape)) @ weights

  spec = apgd.apgd_spec('apgd-ce', loss='ce', num_steps=16)
  ours = np.asarray([
      autoattack.auto_attack(
          jax.random.key(seed), noisy_fn, images, labels,
          ThreatModel('Linf', epsilon), version='rand', attacks=(spec,),
          options=dataclasses.replace(KEYED, batch_size=900, num_draws=4)
      ).robust.mean() for seed in (1, 2, 3)])
  assert len(set(ours)) > 1
  # Two means of 900 verdicts of probability p differ by sqrt(2 p (1 - p) / 900)
  # = 0.02 in standard deviation.
  assert np.abs(ours - expected).max() < 0.06, (ours, expected)
  assert abs(ours.mean() - np.mean(expected)) < 0.035, (ours, expected)


def test_rand_needs_a_randomised_model():
  images, labels = np.full((2, 1), 0.3, np.float32), np.zeros(2, int)
  threat = ThreatModel('Linf', 0.1)
  with pytest.raises(ValueError, match='takes_key=True'):
    autoattack.auto_attack(
        KEY, threshold, images, labels, threat, version='rand')
  # The same through the specs, as the experiments' command line calls them.
  specs = autoattack.make_specs(autoattack.VERSIONS['rand'], 'Linf', 'rand')
  with pytest.raises(ValueError, match='20 draws of a randomised model'):
    evaluate(KEY, threshold, images, labels, threat, specs)
  with pytest.raises(ValueError, match='num_draws'):
    evaluate(
        KEY, noisy, images, labels, threat, specs,
        options=dataclasses.replace(KEYED, num_draws=0))


@pytest.mark.parametrize('version', tuple(autoattack.VERSIONS))
def test_draws_of_each_version(version):
  specs = autoattack.make_specs(autoattack.ATTACKS, 'L2', version)
  wanted = 20 if version == 'rand' else None
  assert [spec.num_draws for spec in specs] == [wanted] * len(specs)


def counting(seen):
  """A model that notes the precision of each of its traces."""

  def logits_fn(x):
    seen.append(jax.config.jax_default_matmul_precision)
    return threshold(x)

  return logits_fn


@pytest.mark.parametrize('asked, inside', (
    ('float32', {'float32'}), ('bfloat16', {'float32', 'bfloat16'}),
    (None, {'float32', 'tensorfloat32'})))
def test_precision_of_verdicts_and_attacks(asked, inside):
  seen = []
  with jax.default_matmul_precision('tensorfloat32'):
    result = fixed_step.cw_attack(
        KEY, counting(seen), np.full((8, 1), 0.45, np.float32),
        np.zeros(8, int), ThreatModel('Linf', 0.1), step_size=0.1, num_steps=1,
        options=dataclasses.replace(QUIET, attack_precision=asked))
  # The first trace counts the classes.
  assert seen[0] == 'float32' and set(seen[1:]) == inside
  assert seen[1] == 'float32'
  judged = result.judged
  assert judged.matmul_precision == 'float32'
  assert judged.dtype == judged.logits_dtype == 'float32'
  assert judged.devices == (jax.devices()[0].device_kind,)
  assert judged.versions == {
      'jax': jax.__version__, 'jaxlib': judged.versions['jaxlib'],
      'awp_jax': awp_jax.__version__}


def test_half_precision_images_are_judged_in_float32():
  seen = []

  def logits_fn(x):
    seen.append(x.dtype)
    return threshold(x)

  images = jnp.asarray([[0.3], [0.45]], jnp.bfloat16)
  result = fixed_step.cw_attack(
      KEY, logits_fn, images, np.zeros(2, int), ThreatModel('Linf', 0.1),
      step_size=0.1, num_steps=1, options=QUIET)
  np.testing.assert_array_equal(result.robust, [True, False])
  assert set(seen) == {np.dtype('float32')}
  assert result.judged.dtype == 'float32'
  assert result.adversarial.dtype == np.float32


def test_warns_of_half_precision_logits():
  with pytest.warns(awp_jax.RobustnessWarning, match='bfloat16 logits'):
    result = evaluate(
        KEY, lambda x: threshold(x).astype(jnp.bfloat16),
        np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
        ThreatModel('Linf', 0.1),
        (scripted(lambda e, t: e.images, [[0]]),), options=QUIET)
  assert result.judged.logits_dtype == 'bfloat16'
  assert ('half-precision', '') in kinds(result)


def shifted(by, wrap=lambda f: f):
  offset = jnp.full((1,), by, jnp.float32)
  return wrap(lambda x: threshold(x + offset))


@pytest.mark.parametrize('wrap', (lambda f: f, jax.jit))
def test_records_of_another_evaluation_are_refused(wrap, tmp_path):
  images, labels = np.full((8, 1), 0.45, np.float32), np.zeros(8, int)
  spec = scripted(lambda e, t: e.images + 0.06, [[1]], settings={'by': 0.06})
  same = dict(
      key=KEY, logits_fn=shifted(0.01, wrap), images=images, labels=labels,
      threat=ThreatModel('Linf', 0.1), specs=(spec,))
  records = []
  whole = evaluate(
      **same, options=dataclasses.replace(
          QUIET, group_size=4, progress=records.append))
  # By way of a file, as a resumed process reads them.
  kept = []
  for number, record in enumerate(records):
    np.savez(tmp_path / f'{number}.npz', **record.to_arrays())
    with np.load(tmp_path / f'{number}.npz') as archive:
      kept.append(awp_jax.BatchResult.from_arrays(archive))
  done = dataclasses.replace(QUIET, group_size=4, done=kept)
  again = evaluate(
      **{**same, 'logits_fn': shifted(0.01, wrap)}, options=done)
  np.testing.assert_array_equal(again.adversarial, whole.adversarial)
  assert again.attacks[0].anomalies == whole.attacks[0].anomalies
  assert again.attacks[0].seconds == whole.attacks[0].seconds
  moved = images.copy()
  moved[3] += 1e-3
  for changed in (
      {'key': jax.random.key(1)}, {'logits_fn': shifted(0.02, wrap)},
      {'threat': ThreatModel('Linf', 0.2)}, {'images': moved},
      {'threat': ThreatModel('L2', 0.1)},
      {'specs': (spec._replace(settings={'by': 0.07}),)},
      {'specs': (spec._replace(num_targets=1),)}):
    with pytest.raises(ValueError, match='another evaluation'):
      evaluate(**{**same, **changed}, options=done)
  with pytest.raises(ValueError, match='another evaluation'):
    evaluate(**same, options=dataclasses.replace(
        done, attack_precision='bfloat16'))
  with pytest.raises(ValueError, match='Give its AttackSpec its `settings`'):
    evaluate(**{**same, 'specs': (spec._replace(settings=None),)}, options=done)


def margin_loss(scale):
  return lambda z, y, t: scale * (jnp.max(z, -1) - z[jnp.arange(len(y)), y])


def other_model(by):
  return lambda x: threshold(x + by)


@pytest.mark.parametrize('one,other', [
    (awp_jax.apgd_spec('a', loss='ce', num_steps=2),
     awp_jax.apgd_spec('a', loss='ce', num_steps=3)),
    (awp_jax.apgd_spec('a', loss='ce', num_steps=2),
     awp_jax.apgd_spec('a', loss='ce', num_steps=2, restarts=5)),
    (awp_jax.apgd_spec('a', loss=margin_loss(1.0)),
     awp_jax.apgd_spec('a', loss=margin_loss(2.0))),
    (awp_jax.fab_spec('a', targeted=False, num_steps=2),
     awp_jax.fab_spec('a', targeted=False, num_steps=3)),
    (awp_jax.square_spec('a', num_queries=2),
     awp_jax.square_spec('a', num_queries=2, p_init=0.5)),
    (awp_jax.spsa_spec('a', num_samples=4), awp_jax.spsa_spec('a')),
    (awp_jax.pgd_spec('a', step_size=0.1, num_steps=1),
     awp_jax.pgd_spec('a', step_size=0.2, num_steps=1)),
    tuple(awp_jax.pgd_spec(
        'a', step_size=0.1, num_steps=1, source_fn=other_model(by))
          for by in (0.0, 0.1))])
def test_identity_knows_every_setting_of_an_attack(one, other):
  images = np.full((2, 1), 0.3, np.float32)
  traced = arguments.trace_model(threshold, images, False)

  def identity_of(spec):
    return identity.identify(
        KEY, traced, images, np.zeros(2, int), ThreatModel('Linf', 0.1),
        (spec,), {})

  assert identity_of(one) == identity_of(one) != ''
  assert identity_of(one) != identity_of(other)
  assert identity_of(one) != identity_of(one._replace(num_draws=20))


def test_warns_of_products_in_half_precision():
  weights = jnp.ones((1, 2), jnp.float32)

  def low(x):
    return jnp.dot(
        x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    ).astype(jnp.float32)

  def asked(x):
    return jax.jit(lambda x: jnp.dot(x, weights, precision='bfloat16'))(x)

  def full(x):
    return x @ weights

  for logits_fn, product in (
      (low, 'bfloat16'), (asked, 'DEFAULT'), (full, 'float32')):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      result = evaluate(
          KEY, logits_fn, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
          ThreatModel('Linf', 0.1),
          (scripted(lambda e, t: e.images, [[0]]),), options=QUIET)
    assert result.judged.product_dtype == product
    assert result.judged.logits_dtype == 'float32'
    assert (('half-precision', '') in kinds(result)) == (product != 'float32')
    assert bool(caught) == (product != 'float32')


@pytest.mark.parametrize('shape, warns', (
    ((3, 32, 32), True), ((1, 28, 28), True), ((3, 5, 5), True),
    ((3, 32, 4), False), ((32, 32, 3), False), ((28, 28, 1), False),
    ((2, 32, 32), False), ((4, 9, 8), False)))
def test_warns_of_channels_first(shape, warns):
  specs = (awp_jax.square_spec(num_queries=2), scripted(None, [[0]]))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    found = diagnostics.check_layout(specs, shape)
  assert [(w.kind, w.attack) for w in found] == [('layout', 'square')] * warns
  assert [w.category for w in caught] == [awp_jax.RobustnessWarning] * warns
  if warns:
    assert f'{shape} as [H, W, C], channels last' in found[0].message


def test_layout_is_in_the_result():
  with pytest.warns(awp_jax.RobustnessWarning, match='channels last'):
    result = evaluate(
        KEY, lambda x: x.reshape(x.shape[0], -1)[:, :2],
        np.full((2, 3, 6, 6), 0.5, np.float32), np.zeros(2, int),
        ThreatModel('Linf', 0.1), (awp_jax.square_spec(num_queries=1),),
        options=dataclasses.replace(QUIET, check_model=True))
  assert ('layout', 'square') in kinds(result)


def test_an_attack_of_no_runs_is_an_error():
  spec = scripted(lambda e, t: e.images, [[0]])
  empty = spec._replace(
      build=lambda m, t: spec.build(m, t)._replace(num_runs=0))
  with pytest.raises(ValueError, match=r"num_runs of attack 'scripted'.*got 0"):
    evaluate(KEY, threshold, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
             ThreatModel('Linf', 0.1), (empty,), options=QUIET)


@pytest.mark.parametrize('count', [1, 2])
def test_attacks_share_a_model_over_devices_in_a_compiled_loop(count):
  # As on accelerators, where the step of an attack is traced inside a loop.
  logits_fn, images, labels = network(count=8)
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [awp_jax.apgd_spec(name, loss=name, num_steps=3)
           for name in ('ce', 'margin')]
  found = []
  for where, devices in (('cpu', None), ('gpu', jax.devices()[:count])):
    with loops.platform(where):
      found.append(evaluate(
          KEY, logits_fn, images, labels, threat, specs,
          options=dataclasses.replace(QUIET, batch_size=8, devices=devices)))
  np.testing.assert_array_equal(found[0].robust, found[1].robust)
  assert 0 < found[0].robust_accuracy < 1


def test_a_loss_of_ones_own():
  logits_fn, images, labels = network()
  threat = ThreatModel('Linf', RADII['Linf'])
  seen = []

  def cross_entropy(logits, labels, targets):
    seen.append(targets.shape)
    return -jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]

  name, results = 'apgd-ce', []
  for loss in ('ce', cross_entropy):
    spec = awp_jax.apgd_spec(name, loss=loss, num_steps=8)
    results.append(awp_jax.evaluate(
        KEY, logits_fn, images, labels, threat, (spec,), options=QUIET))
  np.testing.assert_array_equal(results[0].robust, results[1].robust)
  assert seen and 0.1 < results[0].robust_accuracy < 0.9


def test_a_targeted_loss_of_ones_own_gets_the_likeliest_wrong_classes():
  logits_fn, images, labels = network(count=8)
  seen = set()

  def note(targets):
    seen.update(np.asarray(targets).tolist())

  def difference(logits, labels, targets):
    jax.debug.callback(note, targets)
    return jnp.sum(logits * (
        jax.nn.one_hot(targets, 4) - jax.nn.one_hot(labels, 4)), -1)

  one = np.repeat(images[:1], 8, 0)
  natural = np.asarray(logits_fn(one))[0]
  ranked = np.argsort(-natural)
  assert ranked[0] == labels[0]
  for targeted, num_targets, wanted in (
      (True, 2, ranked[1:3]), (None, 9, ranked[1:2])):
    seen.clear()
    awp_jax.apgd(
        KEY, logits_fn, one, np.repeat(labels[:1], 8),
        ThreatModel('Linf', 1e-3), loss=difference, num_steps=1,
        targeted=targeted, num_targets=num_targets, options=QUIET)
    jax.effects_barrier()
    assert seen == set(wanted.tolist())


def test_bad_losses():
  with pytest.raises(ValueError, match=r'losses\s+\[B\]'):
    awp_jax.apgd(
        KEY, threshold, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
        ThreatModel('Linf', 0.1), loss=lambda z, y, t: jnp.sum(z))
  with pytest.raises(ValueError, match='targeted=True'):
    awp_jax.apgd_spec('a', loss='ce', targeted=True)


def test_public_names():
  for name in ('AttackSpec', 'evaluate', 'make_specs', 'apgd_spec', 'fab_spec',
               'square_spec', 'pgd_spec', 'spsa_spec', 'Judgement'):
    assert hasattr(awp_jax, name), name
