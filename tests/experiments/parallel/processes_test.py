"""Flags of several processes, and the watch over them with a fake service."""

import signal

import jax
import pytest

from experiments.parallel import processes
from experiments.util.errors import UserError


@pytest.mark.parametrize('given, automatic, says', [
    (('host:1', None, 0), False, "must be set together, got 'host:1', None"),
    ((None, 2, None), False, 'must be set together, got None, 2 and None'),
    (('host', 2, 0), False, "must be 'host:port' of process 0"),
    (('host:x', 2, 0), False, "such as '10.0.0.2:8476', got 'host:x'"),
    (('host:0', 2, 0), False, "got 'host:0'"),
    (('host:65536', 2, 0), False, "got 'host:65536'"),
    (('host:1', 2, 2), False, 'must be in [0, num_processes), got 2 of 2'),
    (('host:1', 2, -1), False, 'got -1 of 2'),
    (('host:1', 0, 0), False, 'got 0 of 0'),
    (('host:1', 2, 0), True, 'omit --coordinator, --num_processes')])
def test_wrong_flags_are_one_clear_error(given, automatic, says):
  with pytest.raises(UserError) as caught:
    processes.start(*given, automatic=automatic)
  assert says in str(caught.value)


def test_one_process_agrees_with_itself():
  called = []
  assert processes.is_main() and processes.count() == 1
  assert processes.gather({'a': 1}) == [{'a': 1}]
  assert processes.from_main(lambda: (1, 2)) == [1, 2]
  processes.on_main(lambda: called.append(1))
  with processes.together():
    called.append(2)
  assert called == [1, 2]


def test_an_error_of_one_process_is_raised_as_it_is():
  with pytest.raises(ZeroDivisionError), processes.together():
    _ = 1 / 0
  processes.fail('returns', 1)


def test_a_laptop_has_no_cluster(monkeypatch):
  def initialize(*given):
    del given
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(UserError, match='no cluster was found; set --coord'):
    processes.start(None, None, None, automatic=True)


@pytest.mark.parametrize('catches', [True, False])
def test_sigterm_ends_a_process_that_does_not_train(catches, monkeypatch):
  for owner, name, value in (
      (jax.distributed, 'initialize', lambda *_: None),
      (processes.watch, 'start', lambda *_: None),
      (processes, 'count', lambda: 2)):
    monkeypatch.setattr(owner, name, value)

  def handler(*_):
    pass

  usual = signal.signal(signal.SIGTERM, handler)
  try:
    processes.start('host:1', 2, 0, catches_sigterm=catches)
    assert signal.getsignal(signal.SIGTERM) == (
        handler if catches else signal.SIG_DFL)
  finally:
    signal.signal(signal.SIGTERM, usual)
