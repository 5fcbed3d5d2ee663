"""Signals to one of several processes."""

import signal

from jax.experimental import multihost_utils
import pytest

from experiments.parallel import processes
from experiments.training import signals


@pytest.fixture
def two(monkeypatch):
  monkeypatch.setattr(processes, 'count', lambda: 2)


def test_an_interrupt_is_passed_to_all_as_sigterm(two):
  came = []
  usual = {
      number: signal.signal(number, lambda n, _: came.append(n))
      for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    with signals.StopRequest() as stop:
      signal.raise_signal(signal.SIGTERM)  # JAX catches it
      assert came == [signal.SIGTERM] and stop.name is None
      signal.raise_signal(signal.SIGINT)
      assert came == [signal.SIGTERM] * 2 and stop.name is None
      signal.raise_signal(signal.SIGINT)
      assert came[2:] == [signal.SIGINT]
    signal.raise_signal(signal.SIGINT)
    assert came[3:] == [signal.SIGINT]
  finally:
    for number, handler in usual.items():
      signal.signal(number, handler)


def test_all_stop_at_the_step_that_jax_names(two, monkeypatch):
  asked = []

  def reached(step):
    asked.append(step)
    return step == 3

  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', reached)
  stop, names = signals.StopRequest(), []
  for _ in range(3):
    stop.agree()
    names.append(stop.name)
  assert names == [None, None, 'SIGTERM'] and asked == [1, 2, 3]
