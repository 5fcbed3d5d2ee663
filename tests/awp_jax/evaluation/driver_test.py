"""The queue of an attack, its loop, and programs without constants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awp_jax.attacks import fixed_step
from awp_jax.core import loops
from awp_jax.evaluation import protocol
from awp_jax.evaluation.engine import compilation, slots
from awp_jax.evaluation.engine.slots import Places
from awp_jax.evaluation.evaluate import EvalOptions, evaluate
from awp_jax.threat import ThreatModel
from tests.helpers.attack_problem import KEY, QUIET, scripted, threshold

THREAT = ThreatModel('Linf', 0.1)


def test_tasks_are_ordered_by_run_and_leave_out_what_broke():
  broken = np.zeros(3, bool)
  queue = slots.tasks(3, 2, broken)
  assert [next(queue) for _ in range(2)] == [(0, 0), (1, 0)]
  broken[[1, 2]] = True
  assert list(queue) == [(0, 1)]


def test_fill_keeps_busy_places_and_takes_tasks_in_order():
  filled = slots.fill(
      Places(np.array([5, -1, 7, -1]), np.array([1, 0, 2, 0])),
      iter([(8, 0), (9, 3), (10, 0)]), (4, 2), may_shrink=True)
  np.testing.assert_array_equal(filled.places.example, [5, 8, 7, 9])
  np.testing.assert_array_equal(filled.places.run, [1, 0, 2, 3])
  np.testing.assert_array_equal(filled.fresh, [False, True, False, True])
  np.testing.assert_array_equal(filled.rows, range(4))


@pytest.mark.parametrize('busy, may_shrink, size', (
    (3, True, 4), (2, True, 2), (1, True, 2), (2, False, 8), (5, True, 8)))
def test_fill_shrinks_to_the_smallest_size_that_holds_what_is_busy(
    busy, may_shrink, size):
  example = np.full(8, -1)
  example[-busy:] = np.arange(busy)
  filled = slots.fill(
      Places(example, np.zeros(8, int)), iter(()), (8, 4, 2), may_shrink)
  assert filled.rows.size == size
  assert not filled.fresh.any()
  if size < 8:
    np.testing.assert_array_equal(
        filled.places.example[:busy], np.arange(busy))
    np.testing.assert_array_equal(filled.rows[:busy], np.arange(8 - busy, 8))
  np.testing.assert_array_equal(filled.places.example, example[filled.rows])


def test_batch_sizes(monkeypatch):
  assert slots.batch_sizes(32, 1) == (32, 24, 16, 12, 8)
  assert slots.batch_sizes(4, 1) == (4,)
  assert slots.batch_sizes(48, 4) == (48, 36, 24, 12)
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  assert slots.batch_sizes(512, 8) == (512, 128, 32)


@pytest.mark.parametrize('tasks, size', [
    (100, 64), (64, 64), (52, 64), (51, 52), (40, 48), (38, 40), (35, 36),
    (33, 36), (1, 4)])
def test_first_size_leaves_few_places_idle(tasks, size, monkeypatch):
  sizes = slots.batch_sizes(64, 1)
  assert slots.first_size(sizes, tasks) == size
  assert slots.first_size((60, 45, 30, 20), 22) == 25  # of five devices
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  on_ladder = min((s for s in sizes if s >= tasks), default=64)
  assert slots.first_size(sizes, tasks) == on_ladder


def nothing(images):
  """What runs have found before their first step."""
  no = jnp.zeros(len(images), bool)
  low = jnp.full(len(images), -jnp.inf)
  return slots.Found(images, no, no, no, no, no, low, low)


def script(reports):
  """A report per step from rows (broken, finished, flat, nonfinite)."""
  return [
      protocol.Report(jnp.full((1, 1), float(time)), *(
          jnp.asarray([flag], bool) for flag in row))
      for time, row in enumerate(reports)]


@pytest.mark.parametrize('to_end, candidate, over', (
    (False, 1.0, (0, 1, 1, 1, 1)), (True, 2.0, (0, 0, 0, 1, 1))))
def test_what_a_run_finds(to_end, candidate, over):
  reports = script([
      (0, 0, 1, 0), (1, 0, 0, 0), (1, 0, 0, 1), (0, 1, 0, 0), (1, 1, 0, 0)])
  found = nothing(jnp.full((1, 1), -1.0))
  for report, expected in zip(reports, over, strict=True):
    found, done = slots.note(found, report, to_end, False)
    assert bool(done[0]) == bool(expected)
  assert float(found.candidates[0, 0]) == candidate
  assert found.broken[0] and found.finished[0] and found.zero_gradient[0]
  # Behind the first success, which ended the run, nothing is counted.
  assert bool(found.nonfinite[0]) == to_end


def test_the_last_step_of_a_run_counts():
  found = nothing(jnp.full((1, 1), -1.0))
  for report in script([(1, 0, 0, 0), (1, 1, 0, 1)]):
    found, _ = slots.note(found, report, True, False)
  assert float(found.candidates[0, 0]) == 1 and found.nonfinite[0]


@pytest.mark.parametrize('chunked', (False, True))
@pytest.mark.parametrize('count', (3, 21))
def test_every_run_of_every_example_is_made(chunked, count, monkeypatch):
  # Example i breaks in run i mod 4 alone; run 4 does not exist.
  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  wins = np.arange(count) % 4
  table = jnp.asarray(wins)

  def build(model, threat):
    def step(examples, time):
      index = jnp.round(examples.images[:, 0] * 1000).astype(int) - 400
      won = (examples.runs == table[index]) & (time == examples.runs + 1)
      moved = examples.images + jnp.where(won, 0.2, 0)[:, None]
      return time + 1, protocol.Report(
          moved, won, time >= 4, jnp.zeros_like(won))
    return protocol.BoundAttack(3, lambda e: jnp.zeros_like(e.labels), step)

  images = (0.4 + np.arange(count)[:, None] / 1000).astype(np.float32)
  result = evaluate(
      KEY, threshold, images, np.zeros(count, int), ThreatModel('Linf', 0.25),
      (protocol.AttackSpec('by-run', build),), options=QUIET)
  np.testing.assert_array_equal(result.robust, wins == 3)
  np.testing.assert_array_equal(
      result.adversarial > 0.5, (wins < 3)[:, None])


def test_a_loop_is_compiled_once_for_all_groups(monkeypatch):
  # As on accelerators, where the loop is a program of its own.
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  traces = []

  def points(examples, time):
    traces.append(1)
    return examples.images

  counts = []
  for group_size in (24, 8):
    traces.clear()
    evaluate(
        KEY, threshold, np.full((24, 1), 0.3, np.float32), np.zeros(24, int),
        THREAT, (scripted(points, [[0] * 3]),),
        options=dataclasses.replace(QUIET, group_size=group_size))
    counts.append(len(traces))
  assert counts[0] == counts[1], counts


def test_a_loop_off_the_cpu_ends_when_enough_places_are_free(monkeypatch):
  monkeypatch.setattr(loops, 'unrolls', lambda: False)

  def step(examples, time):
    none = jnp.zeros_like(time, bool)
    # Example i ends at step 3 i + 2.
    over = time >= 3 * jnp.arange(time.size) + 2
    return time + 1, protocol.Report(examples.images, none, over, none)

  attack = protocol.BoundAttack(1, lambda e: jnp.zeros_like(e.labels), step)
  images, labels = jnp.zeros((4, 1)), jnp.zeros(4, int)
  begin = slots.Carry(
      protocol.Examples(images, labels, labels[:, None], labels, labels),
      labels, nothing(images))
  advance = slots.make_advance(attack, False)
  busy = np.ones(4, bool)
  for patience, made in ((1, 3), (2, 6), (4, 12)):
    carry, over, steps = advance(begin, busy, patience, 100)
    assert steps == made and over.sum() == patience
    np.testing.assert_array_equal(carry.state, made)
  # Idle places are not waited for.
  _, over, steps = advance(begin, np.array([False, False, True, True]), 1, 100)
  assert steps == 9
  # The host looks now and then, whatever the patience.
  for limit in (1, 7, 100):
    assert advance(begin, busy, 5, limit)[2] == limit


@pytest.mark.parametrize('limit, made, seconds, following', [
    (1, 1, 0.1, 2), (64, 64, 0.1, 100), (100, 100, 0.1, 100),
    (8, 3, 0.1, 8),     # it ended early, so it says little
    (8, 8, 0.6, 8), (8, 8, 1.1, 4), (1, 1, 60.0, 1)])
def test_calls_last_about_a_second(limit, made, seconds, following):
  assert slots.next_limit(limit, made, seconds) == following


def test_groups_are_smaller_off_the_cpu(monkeypatch):
  sizes = []
  for unrolls in (True, False):
    monkeypatch.setattr(loops, 'unrolls', lambda unrolls=unrolls: unrolls)
    records = []
    evaluate(
        KEY, threshold, np.full((40, 1), 0.3, np.float32), np.zeros(40, int),
        THREAT, (scripted(lambda e, t: e.images, [[0]]),),
        options=EvalOptions(
            batch_size=4, check_model=False, progress=records.append))
    sizes.append([len(record.indices) for record in records])
  assert sizes == [[32, 8], [8] * 5]


def test_constants_become_arguments():
  weights = jnp.arange(12.0).reshape(3, 4)
  traces = []

  def affine(x):
    traces.append(x.shape)
    return {'y': x @ weights, 'z': (jnp.sum(weights),)}

  compiled = compilation.constants_as_arguments(affine)
  for rows in (2, 5, 2):
    x = jnp.ones((rows, 3))
    out = compiled(x)
    np.testing.assert_allclose(out['y'], x @ weights)
    assert float(out['z'][0]) == 66
  assert traces == [(2, 3), (5, 3)]
  # Inside another program they stay arguments of the inner one.
  outer = jax.make_jaxpr(lambda x: compiled(x)['y'])(jnp.ones((2, 3)))
  assert [c.shape for c in outer.consts] == [(3, 4)]
  assert compiled(jnp.ones((2, 3), jnp.float16))['y'].dtype == jnp.float32


def test_unwraps_compiled_functions_only():
  def plain(x):
    return x

  def decorated(x):
    return x
  decorated.__wrapped__ = plain
  assert compilation.unwrap(jax.jit(plain)) is plain
  assert compilation.unwrap(decorated) is decorated


@pytest.mark.parametrize('wrap', (lambda f: f, jax.jit))
@pytest.mark.parametrize('chunked', (False, True))
def test_programs_hold_no_weights(wrap, chunked, monkeypatch):
  # Every program that is compiled, by the constants in its text.
  monkeypatch.setattr(loops, 'unrolls', lambda: not chunked)
  weights = jnp.asarray(
      np.random.default_rng(0).normal(size=(1, 3000)), jnp.float32)

  def logits_fn(x):
    hidden = jnp.tanh(x @ weights)
    return threshold(x) + 0 * jnp.mean(hidden, -1, keepdims=True)

  texts = []
  lowered = jax.stages.Traced.lower

  def jit(function, **settings):
    compiled = plain_jit(function, **settings)
    if settings:
      return compiled

    def call(*arguments):
      if not any(isinstance(leaf, jax.core.Tracer)
                 for leaf in jax.tree.leaves(arguments)):
        texts.append(lowered(compiled.trace(*arguments)).as_text())
      return compiled(*arguments)

    return call

  plain_jit = jax.jit
  wrapped = wrap(logits_fn)
  monkeypatch.setattr(jax, 'jit', jit)
  result = fixed_step.cw_attack(
      KEY, wrapped, np.full((8, 1), 0.45, np.float32), np.zeros(8, int),
      THREAT, step_size=0.1, num_steps=2, options=QUIET)
  assert not result.robust.any()
  assert texts and any('3000' in text for text in texts)
  # 3,000 floats are 24,000 hexadecimal digits.
  longest = max(
      len(word) for text in texts for word in text.split())
  assert longest < 1000, longest


def test_keys_differ_by_example_and_run_whatever_the_batch():
  indices, runs = np.array([0, 0, 1, 1, 7, 2]), np.array([0, 1, 0, 1, 2, 7])

  def keys_of(rows):
    return np.asarray(jax.random.key_data(
        protocol.run_keys(KEY, indices[rows], runs[rows])))

  keys = keys_of(np.arange(6))
  assert len(np.unique(keys, axis=0)) == 6
  for rows in ([3], [5, 3, 0]):
    np.testing.assert_array_equal(keys_of(rows), keys[rows])


@pytest.mark.filterwarnings(
    'ignore::awp_jax.evaluation.results.RobustnessWarning')
def test_a_restart_starts_elsewhere():
  # Flat logits, so only the start counts: half of the ball is class 1.
  def flat_fn(x):
    return jax.lax.stop_gradient(jnp.sign(threshold(x)))

  images = np.full((16, 1), 0.499, np.float32)
  stands = [
      evaluate(
          KEY, flat_fn, images, np.zeros(16, int), THREAT,
          (fixed_step.pgd_spec(
              'pgd', step_size=0.1, num_steps=1, restarts=restarts),),
          options=QUIET).robust
      for restarts in (1, 2)]
  # The first run is the same; the second breaks others.
  assert not (stands[1] & ~stands[0]).any()
  assert 2 <= stands[1].sum() <= stands[0].sum() - 2
