"""Whole attacks on small models: verdicts, batches, resuming, devices."""

import concurrent.futures
import threading

import jax
import numpy as np
import pytest

from awp_jax.attacks import apgd, autoattack
from awp_jax.core import loops
from awp_jax.evaluation.evaluate import EvalOptions, evaluate
from awp_jax.evaluation.results import RobustnessWarning, Share
from awp_jax.threat import ThreatModel
from tests.helpers.attack_oracles import (
  KEY,
  RADII,
  SMALL,
  check_examples,
  network,
  short_spec,
)

pytestmark = pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')

#: Every attack, in one or two norms; other tests cover the steps of each norm.
MATRIX = (
    ('apgd-ce', 'Linf'), ('apgd-ce', 'L1'), ('apgd-dlr', 'Linf'),
    ('apgd-t', 'L2'), ('fab', 'Linf'), ('fab-t', 'L2'), ('fab-t', 'L1'),
    ('square', 'L2'), ('square', 'L1'), ('pgd', 'L1'), ('spsa', 'L2'))


@pytest.mark.parametrize('name, norm', MATRIX)
def test_each_attack_in_its_norms(name, norm):
  logits_fn, images, labels = network()
  threat = ThreatModel(norm, RADII[norm])
  result = evaluate(
      KEY, logits_fn, images, labels, threat, (short_spec(name),),
      options=SMALL)
  check_examples(result, logits_fn, images, labels, threat)
  assert result.natural_accuracy == 1
  assert result.robust_accuracy < 0.9


def test_verdicts_do_not_depend_on_the_batch():
  logits_fn, images, labels = network()
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [short_spec(name) for name in ('apgd-ce', 'square')]
  robust = [
      evaluate(KEY, logits_fn, images, labels, threat, (spec,),
               options=EvalOptions(batch_size=size, check_model=False)).robust
      for spec in specs for size in (8, 12)]
  for one, other in zip(robust[::2], robust[1::2], strict=True):
    np.testing.assert_array_equal(one, other)
  # An attack draws the same alone and in a list, so the verdicts intersect.
  together = evaluate(
      KEY, logits_fn, images, labels, threat, specs, options=SMALL)
  np.testing.assert_array_equal(
      together.robust, np.logical_and.reduce(robust[::2]))
  accuracies = [a.robust_accuracy for a in together.attacks]
  assert accuracies == sorted(accuracies, reverse=True)


@pytest.mark.parametrize('name', ('apgd-t', 'fab', 'square'))
def test_chunks_of_iterations_give_the_same_verdicts(name, monkeypatch):
  # As on accelerators: many iterations in one compiled loop, and one batch.
  logits_fn, images, labels = network()
  threat = ThreatModel('Linf', RADII['Linf'])
  arguments = KEY, logits_fn, images, labels, threat, (short_spec(name),)
  one_by_one = evaluate(*arguments, options=SMALL)
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  chunked = evaluate(*arguments, options=SMALL)
  check_examples(chunked, logits_fn, images, labels, threat)
  np.testing.assert_array_equal(chunked.robust, one_by_one.robust)


def test_resumes_with_the_same_result():
  logits_fn, images, labels = network()
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [short_spec(name) for name in ('apgd-ce', 'square')]
  records = []

  def run(progress=None, done=(), group_size=6):
    return evaluate(
        KEY, logits_fn, images, labels, threat, specs,
        options=EvalOptions(
            batch_size=8, group_size=group_size, progress=progress, done=done,
            check_model=False))

  whole = run(records.append)
  assert len(records) > 4, records
  for kept in (records[:1], records[4:0:-1]):
    late = []
    again = run(late.append, done=kept)
    assert len(late) == len(records) - len(kept)
    np.testing.assert_array_equal(again.adversarial, whole.adversarial)
    np.testing.assert_array_equal(again.robust, whole.robust)
  # Other groups: verdicts are the same, up to rounding.
  again = run(done=records[:2], group_size=5)
  np.testing.assert_array_equal(again.robust, whole.robust)


def test_processes_that_divide_the_examples_get_the_same_result():
  logits_fn, images, labels = network()
  threat = ThreatModel('Linf', RADII['Linf'])
  specs = [short_spec(name) for name in ('apgd-ce', 'square')]
  waiting, made, latest = threading.Barrier(3), [], []

  def exchange(own):
    waiting.wait()
    made.extend(own)
    latest.extend(own)
    waiting.wait()
    found = tuple(latest)
    waiting.wait()
    latest.clear()
    return found

  def run(share, progress=None):
    return evaluate(
        KEY, logits_fn, images, labels, threat, specs, options=EvalOptions(
            batch_size=8, group_size=4, share=share, progress=progress,
            check_model=False))

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    parts = list(pool.map(
        lambda k: run(Share(k, 3, exchange)), range(3)))
  own = []
  whole = run(None, own.append)
  for part in parts:
    np.testing.assert_array_equal(part.robust, whole.robust)
    np.testing.assert_array_equal(part.adversarial, parts[0].adversarial)
    assert [list(attack.broken) for attack in part.attacks] == [
        list(attack.broken) for attack in parts[0].attacks]
  for name in ('apgd-ce', 'square'):
    attacked = np.concatenate([r.indices for r in made if r.attack == name])
    assert sorted(attacked) == sorted(
        np.concatenate([r.indices for r in own if r.attack == name]))


def test_a_share_must_cover_the_examples_of_this_evaluation():
  logits_fn, images, labels = network()

  def run(share, epsilon):
    return evaluate(
        KEY, logits_fn, images, labels, ThreatModel('Linf', epsilon),
        [short_spec('apgd-ce')], options=EvalOptions(
            batch_size=8, share=share, check_model=False))

  with pytest.raises(ValueError, match='no process returned a record of'):
    run(Share(0, 2, lambda own: own), 0.03)
  foreign = []
  run(Share(0, 1, lambda own: foreign.extend(own) or own), 0.5)
  with pytest.raises(ValueError, match='share belongs to another evaluation'):
    run(Share(0, 1, lambda own: foreign), 0.03)
  for index, count in ((2, 2), (-1, 2), (0, 0)):
    with pytest.raises(ValueError, match=f'got {index} of {count}'):
      Share(index, count, lambda own: own)


@pytest.mark.parametrize('wrong', [False, True])
def test_attacks_after_the_last_example_is_broken(wrong):
  logits_fn, images, labels = network()
  if wrong:  # natural accuracy 0
    labels = 1 + np.asarray(logits_fn(images)).argmax(-1)
    labels %= np.asarray(logits_fn(images)).shape[-1]
  result = evaluate(
      KEY, logits_fn, images, labels, ThreatModel('Linf', 1.0),
      [short_spec(name) for name in ('apgd-ce', 'square')],
      options=EvalOptions(batch_size=8, check_model=False))
  assert result.robust_accuracy == 0 and not result.attacks[1].broken.size
  assert result.attacks[1].seconds == 0


def test_a_lost_record_of_an_earlier_attack_changes_nothing():
  logits_fn, images, labels = network()
  records = []

  def run(**options):
    return evaluate(
        KEY, logits_fn, images, labels, ThreatModel('Linf', RADII['Linf']),
        [short_spec(name) for name in ('apgd-ce', 'square')],
        options=EvalOptions(
            batch_size=8, group_size=4, check_model=False, **options))

  whole = run(progress=records.append)
  again = run(done=records[1:])
  np.testing.assert_array_equal(again.robust, whole.robust)
  np.testing.assert_array_equal(again.adversarial, whole.adversarial)


def test_recompiles_for_no_count():
  traces = []
  logits_fn, images, labels = network(40)

  def counted(x):
    traces.append(x.shape[0])
    return logits_fn(x)

  evaluate(
      KEY, counted, images, labels, ThreatModel('Linf', 0.03),
      (short_spec('apgd-ce'), short_spec('apgd-dlr')),
      options=EvalOptions(batch_size=8, check_model=False))
  # One trace for the classes, one for logits, one for gradients.
  assert len(traces) == 3, traces


def test_memory_does_not_grow_with_the_examples():
  logits_fn, images, labels = network(10_000, shape=(3, 3, 1))
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
            apgd.apgd_spec('ce', loss='ce', num_steps=3),
            short_spec('square', 1)),
        options=EvalOptions(
            batch_size=500, progress=measure, keep_images=False,
            check_model=False))
    assert result.adversarial is None
    assert result.robust.shape == (count,)
  assert largest[1] <= 1.1 * largest[0], largest


@pytest.mark.parametrize('classes', (2, 3))
def test_few_classes(classes):
  logits_fn, images, labels = network(classes=classes)
  threat = ThreatModel('Linf', RADII['Linf'])
  with pytest.warns(RobustnessWarning, match=f'with {classes} classes'):
    result = evaluate(
        KEY, logits_fn, images, labels, threat,
        [short_spec(name)
         for name in ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab')],
        options=EvalOptions(batch_size=8))
  check_examples(result, logits_fn, images, labels, threat)
  assert result.attacks[0].robust_accuracy < 0.9
  assert any(w.kind == 'few-classes' for w in result.warnings)


def test_targeted_attacks_alone_break_few_classes():
  for classes in (2, 3):
    logits_fn, images, labels = network(classes=classes)
    for name in ('apgd-dlr', 'apgd-t'):
      result = evaluate(
          KEY, logits_fn, images, labels,
          ThreatModel('Linf', RADII['Linf']), (short_spec(name),),
          options=SMALL)
      assert result.robust_accuracy < 0.9


@pytest.mark.parametrize('shape', ((7,), (2, 3, 4, 2)))
def test_inputs_of_any_rank(shape):
  logits_fn, images, labels = network(shape=shape)
  threat = ThreatModel('L2', 0.3)
  result = evaluate(
      KEY, logits_fn, images, labels, threat,
      (short_spec('apgd-ce'), short_spec('fab-t')), options=SMALL)
  check_examples(result, logits_fn, images, labels, threat)


@pytest.mark.parametrize('shape, norm', (
    ((4, 9, 1), 'L2'), ((11, 3, 2), 'L1'), ((1, 1, 3), 'Linf'),
    ((1, 2, 1), 'L2')))
def test_square_on_any_image(shape, norm):
  logits_fn, images, labels = network(8, shape=shape)
  threat = ThreatModel(norm, 0.5)
  result = evaluate(
      KEY, logits_fn, images, labels, threat, (short_spec('square', 4),),
      options=SMALL)
  check_examples(result, logits_fn, images, labels, threat)


def test_spreads_over_devices():
  logits_fn, images, labels = network()
  two = jax.devices()[:2]
  assert len(two) == 2
  results = [
      evaluate(
          KEY, logits_fn, images, labels, ThreatModel('Linf', 0.03),
          [short_spec('apgd-ce')],
          options=EvalOptions(batch_size=8, devices=devices, check_model=False))
      for devices in (None, two)]
  np.testing.assert_array_equal(results[0].robust, results[1].robust)
  np.testing.assert_allclose(
      results[0].adversarial, results[1].adversarial, atol=1e-5)
