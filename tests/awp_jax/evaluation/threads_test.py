"""Batches side by side: the same verdicts, settings, errors."""

import os
import threading

import jax
import numpy as np
import pytest

from awp_jax.attacks import apgd
from awp_jax.core import loops
from awp_jax.evaluation import verdicts
from awp_jax.evaluation.engine import driver, slots
from awp_jax.evaluation.engine import threads as threads_lib
from awp_jax.evaluation.model import make_model
from awp_jax.threat import ThreatModel
from tests.helpers import attack_oracles

THREAT = ThreatModel('Linf', 0.03)


def problem(count=40):
  logits_fn, images, labels = attack_oracles.network(count)
  model = make_model(logits_fn, 5)
  attack = apgd.apgd_spec('apgd-ce', loss='ce', num_steps=12).build(
      model, THREAT)
  settings = verdicts.VerdictSettings(
      model, THREAT, jax.random.key(1), 8, 8, jax.device_put)
  job = driver.Job(
      attack, slots.make_advance(attack, False), jax.random.key(0), (8,),
      jax.device_put, verdicts.make_check(settings, 'apgd-ce'))
  return job, verdicts.Group(
      np.arange(count), images, labels, np.zeros((count, 1), np.int32))


def run(job, group, number):
  return threads_lib.attack_group(job, group, streams=number)


def with_step(job, step):
  attack = job.attack._replace(step=step)
  return job._replace(
      attack=attack, advance=slots.make_advance(attack, False))


def watched(job, look):
  """The attack, with a look at each step before it is made."""

  def step(examples, state):
    look()
    return job.attack.step(examples, state)

  return with_step(job, step)


def test_outcome_does_not_depend_on_their_number():
  job, group = problem()
  alone = run(job, group, 1)
  assert 0 < alone.broken.sum() < 40
  threads = set()
  look = watched(job, lambda: threads.add(threading.get_ident()))
  for number in (2, 3, 5):
    threads.clear()
    outcome = run(look, group, number)
    assert 1 < len(threads) <= number
    for a, b in zip(alone, outcome, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6)


def test_few_examples_need_few_threads():
  job, group = problem(15)
  threads = set()
  run(watched(job, lambda: threads.add(threading.get_ident())), group, 4)
  assert threads == {threading.get_ident()}


def test_settings_of_the_caller_hold_in_every_batch():
  job, group = problem()
  seen = []
  look = watched(job, lambda: seen.append(
      (threading.get_ident(), jax.config.jax_default_matmul_precision)))
  with jax.default_matmul_precision('float32'):
    run(look, group, 2)
  assert set(seen) == {(threading.get_ident(), 'float32')}


@pytest.mark.parametrize('in_main', [True, False])
def test_a_failure_ends_all_of_them(in_main):
  job, group = problem()
  main, steps = threading.get_ident(), []
  others_began = threading.Event()

  def look():
    steps.append(1)
    if (threading.get_ident() == main) == in_main:
      if len(steps) > 4:
        raise KeyError('no step')
    else:
      others_began.set()

  # Without a stop the other batch would go on for ever.
  endless = with_step(job, lambda examples, state: (
      lambda state, report: (
          state._replace(time=state.time * 0),
          report._replace(finished=report.finished & False)))(
              *job.attack.step(examples, state)))
  with pytest.raises(KeyError, match='no step'):
    run(watched(endless, look), group, 2)
  assert others_began.is_set()


def test_number(monkeypatch):
  monkeypatch.setattr(
      os, 'sched_getaffinity', lambda _: set(range(3)), raising=False)
  assert threads_lib.num_streams(64) == 3
  assert threads_lib.num_streams(16) == 2 and threads_lib.num_streams(1) == 1
  monkeypatch.setattr(
      os, 'sched_getaffinity', lambda _: set(range(96)), raising=False)
  assert threads_lib.num_streams(512) == 4
  monkeypatch.setattr(loops, 'unrolls', lambda: False)
  assert threads_lib.num_streams(512) == 1
