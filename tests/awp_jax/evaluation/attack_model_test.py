"""`EvalOptions.attack_fn`: attacks use one model, verdicts another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import awp_jax
from awp_jax.core import loops
from awp_jax.evaluation import diagnostics, protocol, verdicts
from awp_jax.evaluation.engine import driver, slots, threads
from awp_jax.evaluation.evaluate import EvalOptions, evaluate
from awp_jax.evaluation.model import make_model
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles
from tests.helpers.attack_oracles import RADII, SMALL, short_spec
from tests.helpers.attack_problem import (
  KEY,
  QUIET,
  kinds,
  scripted,
  threshold,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')

NAMES = ('apgd-ce', 'apgd-t', 'fab', 'fab-t', 'square', 'pgd', 'spsa')
THREAT = ThreatModel('Linf', RADII['Linf'])


def attacked(name, logits_fn, images, labels, attack_fn=None, threat=THREAT):
  return evaluate(
      KEY, logits_fn, images, labels, threat, (short_spec(name),),
      options=dataclasses.replace(SMALL, attack_fn=attack_fn))


def in_bfloat16(logits_fn):
  """Logits rounded to bfloat16 from rounded images; most margins change."""
  return lambda x: logits_fn(
      x.astype(jnp.bfloat16).astype(x.dtype)).astype(jnp.bfloat16)


@pytest.mark.parametrize('name', NAMES)
def test_the_same_function_gives_the_same_results(name):
  logits_fn, images, labels = attack_oracles.network()
  alone, both = (
      attacked(name, logits_fn, images, labels, attack_fn)
      for attack_fn in (None, lambda x: logits_fn(x)))
  assert 0 < alone.robust.sum() < len(labels)
  np.testing.assert_array_equal(both.robust, alone.robust)
  np.testing.assert_array_equal(both.adversarial, alone.adversarial)
  assert both.attacks[0].anomalies == alone.attacks[0].anomalies


@pytest.mark.parametrize('name', NAMES)
def test_lower_precision_breaks_what_float32_confirms(name):
  logits_fn, images, labels = attack_oracles.network()
  result = attacked(name, logits_fn, images, labels, in_bfloat16(logits_fn))
  attack_oracles.check_examples(result, logits_fn, images, labels, THREAT)
  exact = attacked(name, logits_fn, images, labels)
  assert result.robust.sum() < len(labels)
  assert abs(int(result.robust.sum()) - int(exact.robust.sum())) <= 2


@pytest.mark.parametrize('name', NAMES)
def test_a_model_that_is_always_broken_changes_no_verdict(name):
  # Nothing inside a tiny ball breaks, whatever the attack's model says.
  logits_fn, images, labels = attack_oracles.network()
  wrong = jnp.asarray([0.0, 1.0, 2.0, 3.0, 4.0])
  labels = np.asarray(labels)
  kept = labels < 4
  images, labels = images[kept], labels[kept]

  def always_broken(x):
    return wrong + 0 * x.reshape(len(x), -1)[:, :1]

  result = attacked(
      name, logits_fn, images, labels, always_broken,
      ThreatModel('Linf', 1e-5))
  assert result.robust.all() and result.natural.all()
  np.testing.assert_array_equal(result.adversarial, images)
  assert result.attacks[0].anomalies.refused == len(labels)


def reversed_gradient(logits_fn):
  """The same logits, with gradients of the wrong sign."""

  @jax.custom_vjp
  def function(x):
    return logits_fn(x)

  def backward(x, cotangent):
    gradient, = jax.vjp(logits_fn, x)[1](cotangent)
    return (-gradient,)

  function.defvjp(lambda x: (logits_fn(x), x), backward)
  return function


@pytest.mark.parametrize('name', ('apgd-ce', 'apgd-t', 'pgd'))
def test_wrong_gradients_weaken_an_attack_but_cannot_break_more(name):
  logits_fn, images, labels = attack_oracles.network()
  strong = attacked(name, logits_fn, images, labels)
  weak = attacked(
      name, logits_fn, images, labels, reversed_gradient(logits_fn))
  attack_oracles.check_examples(weak, logits_fn, images, labels, THREAT)
  assert (strong.robust <= weak.robust).all()
  assert weak.robust.sum() > strong.robust.sum()


@pytest.mark.parametrize('chunked', (False, True))
def test_the_best_candidate_of_a_run_is_checked_at_its_end(
    chunked, monkeypatch):
  # The attack's model misclassifies from 0.6, the model under attack from 0.5.
  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  images = np.array([[0.35], [0.45]], np.float32)
  result = evaluate(
      KEY, threshold, images, np.zeros(2, int), ThreatModel('Linf', 0.1),
      (short_spec('apgd-ce'),), options=dataclasses.replace(
          QUIET, attack_fn=lambda x: threshold(x - 0.1)))
  np.testing.assert_array_equal(result.robust, [True, False])
  assert result.attacks[0].anomalies.refused == 0
  np.testing.assert_allclose(result.adversarial[1], 0.55, atol=1e-6)


def ranked(margins, broken, steps):
  """A run of given margins, whose candidate at step t has the value t."""

  def step(examples, time):
    at = jnp.minimum(time, steps - 1)
    candidates = jnp.zeros_like(examples.images) + time[:, None]
    return time + 1, protocol.Report(
        candidates, jnp.asarray(broken)[at], time >= steps - 1,
        jnp.zeros_like(time, bool), margin=jnp.asarray(margins)[at])

  return protocol.BoundAttack(1, lambda e: jnp.zeros_like(e.labels), step)


def checked_steps(margins, broken, own_model, accepted=()):
  """The steps whose candidates are checked, and the outcome."""
  attack, seen = ranked(margins, broken, len(margins)), []

  def check(group, runs, candidates):
    del group, runs
    seen.append(int(candidates[0, 0]))
    good = np.isin(candidates[:, 0], list(accepted))
    return verdicts.Verdicts(
        good, np.zeros(1), *(np.zeros(1, bool) for _ in range(3)))

  job = driver.Job(
      attack, slots.make_advance(attack, False, own_model), KEY, (1,),
      jax.device_put, check, own_model)
  outcome = driver.attack_group(job, verdicts.Group(
      np.arange(1), np.zeros((1, 1), np.float32), np.zeros(1, np.int32),
      np.zeros((1, 1), np.int32)))
  return seen, outcome


@pytest.mark.parametrize('chunked', (False, True))
def test_checks_need_twice_the_margin_or_the_end_of_the_run(
    chunked, monkeypatch):
  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  margins = [-1.0, 0.1, 0.15, 0.2, 0.21, 0.05, 0.4, 0.41, 0.42, 0.3]
  broken = [margin > 0 for margin in margins]
  seen, outcome = checked_steps(margins, broken, True)
  # 0.1; above 0.2; none above 0.42; the best so far at the end.
  assert seen == [1, 4, 8]
  assert outcome.refused.all() and not outcome.broken.any()
  seen, outcome = checked_steps(margins, broken, True, accepted=(4,))
  assert seen == [1, 4] and outcome.broken.all()
  assert outcome.adversarial[0, 0] == 4
  # Without a success only the best is checked, and nothing was refused.
  seen, outcome = checked_steps([-3.0, -1.0, -2.0], [False] * 3, True)
  assert seen == [1] and not outcome.refused.any()
  assert checked_steps([-3.0, -1.0, -2.0], [False] * 3, False)[0] == []


def test_rising_margins_cost_few_checks():
  margins = [0.01 * 1.03 ** step for step in range(200)]
  seen, _ = checked_steps(margins, [True] * 200, True)
  # At each doubling: log2(1.03^199) = 8.5, the first and the last.
  assert len(seen) <= 10 and seen[-1] == 199


def test_a_margin_of_minus_infinity_never_counts():
  seen, outcome = checked_steps([-np.inf] * 3, [False] * 3, True)
  assert seen == [] and not outcome.broken.any()


def test_refused_examples_get_their_remaining_runs():
  # Run 0 claims a point that float32 classifies correctly, run 1 another.
  def points(examples, time):
    del time
    return examples.images + jnp.where(examples.runs > 0, 0.2, 0.05)[:, None]

  result = evaluate(
      KEY, threshold, np.full((3, 1), 0.4, np.float32), np.zeros(3, int),
      ThreatModel('Linf', 0.25),
      (scripted(points, [[True, False], [True, False]], runs=2),),
      options=dataclasses.replace(
          QUIET, attack_fn=lambda x: threshold(x + 0.1)))
  assert not result.robust.any()
  assert result.attacks[0].anomalies.refused == 3
  np.testing.assert_allclose(result.adversarial, 0.6, atol=1e-6)


@pytest.mark.parametrize('name', ['apgd-ce', 'pgd', 'spsa'])
def test_close_examples_are_attacked_again(name, monkeypatch):
  """The attacks' model has the wrong sign of a small weight."""
  sizes, attack_group = [], threads.attack_group

  def watched(job, group, *, streams):
    sizes.append(group.labels.size)
    return attack_group(job, group, streams=streams)

  def weighted(weight):
    return lambda x: threshold(x[:, :1] + weight * (x[:, 1:] - 0.5))

  monkeypatch.setattr(threads, 'attack_group', watched)
  # Margins of the largest steps: 0.102 here, 0.098 for the attacks. The first
  # example breaks at once, the second only in the second attack, the third not
  # even there; the others are far from the boundary.
  images = np.full((5, 2), 0.5, np.float32)
  images[:, 0] = [0.45, 0.4, 0.3975, 0.1, 0.2]
  result = evaluate(
      KEY, weighted(0.02), images, np.zeros(5, int), ThreatModel('Linf', 0.1),
      (short_spec(name),), options=dataclasses.replace(
          QUIET, attack_fn=weighted(-0.02)))
  np.testing.assert_array_equal(
      result.robust, [False, False, True, True, True])
  assert sizes == [5, 2]
  (report,) = result.attacks
  np.testing.assert_array_equal(report.broken, [0, 1])
  assert weighted(0.02)(result.adversarial)[1].argmax() == 1


def test_spread_of_natural_logits():
  logits = jnp.array([[0.0, 4.0], [1.0, 2.0], [0.0, np.inf], [3.0, 0.0]])
  model = make_model(lambda x: logits[x[:, 0].astype(int)], 2)
  settings = verdicts.VerdictSettings(
      model, ThreatModel('Linf', 0.1), KEY, 4, 4, jax.device_put)
  natural = verdicts.classify_natural(
      settings, np.arange(4.0, dtype=np.float32)[:, None], np.zeros(4, int), 1)
  assert natural.spread == 3.0


def test_note_keeps_the_best_margin():
  no, low = jnp.zeros(1, bool), jnp.full(1, -jnp.inf)
  found = slots.Found(jnp.full((1, 1), -1.0), no, no, no, no, no, low, low)
  for time, margin in enumerate((-2.0, -1.0, -3.0)):
    found, over = slots.note(found, protocol.Report(
        jnp.full((1, 1), float(time)), no, no, no,
        margin=jnp.asarray([margin])), False, True)
  assert found.candidates[0, 0] == 1 and found.margin[0] == -1
  assert found.pending[0] and not found.broken[0] and not over[0]


@pytest.mark.parametrize('attack_fn, message', (
    (lambda x: jnp.zeros((len(x), 3)), 'same classes, got 3 and 2'),
    (lambda x: x[:, 0], 'attack_fn must map images'),
    (lambda x: x[:, :1], 'attack_fn must return logits of at least 2')))
def test_another_shape_of_logits_is_an_error(attack_fn, message):
  with pytest.raises(ValueError, match=message):
    evaluate(
        KEY, threshold, np.full((2, 1), 0.3, np.float32), np.zeros(2, int),
        THREAT, (short_spec('apgd-ce'),),
        options=dataclasses.replace(QUIET, attack_fn=attack_fn))


def test_records_belong_to_the_function_of_the_attacks():
  logits_fn, images, labels = attack_oracles.network(8)
  other, records = in_bfloat16(logits_fn), []

  def run(attack_fn, **options):
    return evaluate(
        KEY, logits_fn, images, labels, THREAT, (short_spec('apgd-ce'),),
        options=dataclasses.replace(SMALL, attack_fn=attack_fn, **options))

  run(other, progress=records.append)
  again = run(in_bfloat16(logits_fn), done=records)
  np.testing.assert_array_equal(
      np.flatnonzero(~again.robust), records[0].indices[records[0].broken])
  for attack_fn in (None, logits_fn):
    with pytest.raises(ValueError, match='belongs to another evaluation'):
      run(attack_fn, done=records)


def half(x):
  """A matrix product in bfloat16."""
  weights = jnp.asarray([[-1.0, 1.0]], jnp.bfloat16)
  return (x - 0.5).astype(jnp.bfloat16) @ weights


def test_results_say_in_which_type_the_attacks_ran():
  images, labels = np.full((4, 1), 0.45, np.float32), np.zeros(4, int)
  weights = jnp.asarray([[-1.0, 1.0]])
  options = dataclasses.replace(QUIET, attack_precision='bfloat16')
  found = {}
  for attack_fn in (None, half):
    found[attack_fn] = evaluate(
        KEY, lambda x: (x - 0.5) @ weights, images, labels,
        ThreatModel('Linf', 0.1), (short_spec('apgd-ce'),),
        options=dataclasses.replace(options, attack_fn=attack_fn))
    assert not found[attack_fn].robust.any()
    # The attacks' type is no reason to doubt the verdicts.
    assert ('half-precision', '') not in kinds(found[attack_fn])
  for attack_fn, dtype in ((None, 'float32'), (half, 'bfloat16')):
    judged = found[attack_fn].judged
    assert judged.product_dtype == 'float32'
    assert judged.attack_product_dtype == dtype
    assert judged.attack_matmul_precision == 'bfloat16'


def test_warns_of_a_model_with_other_predictions():
  logits_fn, images, labels = attack_oracles.network()
  other, _, _ = attack_oracles.network(seed=3)
  options = dataclasses.replace(SMALL, check_model=True)
  for attack_fn, warned in ((other, True), (in_bfloat16(logits_fn), False)):
    result = evaluate(
        KEY, logits_fn, images, labels, THREAT, (short_spec('pgd'),),
        options=dataclasses.replace(options, attack_fn=attack_fn))
    assert (('attack-model', '') in kinds(result)) == warned


def test_predictions_are_compared_on_distinct_images():
  """A batch is filled with its last image, here the only one that differs."""
  images = np.full((20, 1), 0.2, np.float32)
  images[-1] = 0.48
  found = evaluate(
      KEY, threshold, images, np.zeros(20, int), ThreatModel('Linf', 0.01),
      (short_spec('pgd'),), options=EvalOptions(
          batch_size=64, attack_fn=lambda x: threshold(x + 0.05)))
  assert ('attack-model', '') not in kinds(found)


@pytest.mark.parametrize('differ, count, warned', [
    (10, 100, False), (11, 100, True), (1, 5, False), (2, 5, True)])
def test_share_of_other_predictions(differ, count, warned):
  judged = np.tile([0.0, 1.0, 5.0, 5.1], (count, 1))
  attacked = judged.copy()
  attacked[:differ, 2] = 5.2
  assert bool(diagnostics.check_attack_model(attacked, judged)) == warned


def test_other_logits_with_the_same_predictions():
  """Two networks of the same data agree on most classes."""
  draw = np.random.default_rng(0)
  judged = draw.normal(size=(50, 4))
  judged[:, 2] += 10
  rounded = judged * (1 + draw.normal(size=judged.shape) * 2 ** -7)
  other = draw.normal(size=(50, 4)) * 6
  other[:, 2] += 30
  assert not diagnostics.check_attack_model(rounded, judged)
  warning, = diagnostics.check_attack_model(other, judged)
  assert warning.num_examples == 0 and '% of their range' in warning.message


def test_randomized_models():
  def noisy(x, key, scale=0.02):
    return threshold(x + scale * jax.random.normal(key, x.shape))

  options = dataclasses.replace(
      QUIET, takes_key=True, attack_fn=lambda x, key: noisy(x, key, 0.0))
  result = awp_jax.auto_attack(
      KEY, noisy, np.array([[0.2], [0.48]], np.float32), np.zeros(2, int),
      ThreatModel('Linf', 0.1), attacks=(short_spec('apgd-ce'),),
      options=options)
  np.testing.assert_array_equal(result.robust, [True, False])


def test_logits_of_the_attack_model_that_are_not_finite():
  judged = np.tile([0.0, 1.0, 5.0, 5.1], (50, 1))
  attacked = judged.copy()
  attacked[3, 1], attacked[5, 3], attacked[7, 0] = np.nan, np.inf, -np.inf
  judged[7, 2] = np.nan  # where both fail the network is to blame
  # The model without weights of image 7 has other logits by NaN too.
  judged, attacked = np.delete(judged, 7, 0), np.delete(attacked, 7, 0)
  warning, = diagnostics.check_attack_model(attacked, judged)
  assert warning.num_examples == 2 and 'for 2 of 49' in warning.message
  both = diagnostics.check_attack_model(-attacked, judged)
  assert [w.num_examples for w in both] == [2, 47]
  alone, = diagnostics.check_attack_model(attacked[3:4], judged[3:4])
  assert alone.num_examples == 1
