"""Agreement of three processes over a fake service."""

from concurrent import futures
import threading
import time

import pytest

from experiments.parallel import processes
from experiments.util.errors import UserError

LOCAL = threading.local()


class Store:
  """The key-value store of JAX's service, shared by threads."""

  def __init__(self):
    self.values, self.changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self.changed:
      assert key not in self.values, key
      self.values[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, timeout_in_ms):
    del timeout_in_ms
    with self.changed:
      assert self.changed.wait_for(lambda: key in self.values, 30), key
      return self.values[key]


class Numbers:
  """Counts the agreements of each thread."""

  def __next__(self):
    LOCAL.number += 1
    return LOCAL.number


@pytest.fixture
def in_three(monkeypatch):
  """Runs a function in three threads that take themselves for processes."""
  store = Store()
  monkeypatch.setattr(processes, '_client', lambda: store)
  monkeypatch.setattr(processes, '_NUMBERS', Numbers())
  monkeypatch.setattr(processes, 'count', lambda: 3)
  monkeypatch.setattr(processes, 'index', lambda: LOCAL.index)

  def run(fn):
    def of_process(index):
      LOCAL.index, LOCAL.number = index, 0
      return fn(index)

    with futures.ThreadPoolExecutor(3) as pool:
      return list(pool.map(of_process, range(3)))

  return run


def test_values_are_in_the_order_of_the_processes(in_three):
  def twice(index):
    return processes.gather(index), processes.gather({'of': 10 * index})

  assert in_three(twice) == [
      ([0, 1, 2], [{'of': 0}, {'of': 10}, {'of': 20}])] * 3


def test_the_main_process_alone_calls_and_the_others_wait(in_three):
  called, ended = [], []

  def slow():
    called.append(LOCAL.index)
    time.sleep(0.1)
    ended.append(True)
    return 7

  def call(index):
    del index
    return processes.from_main(slow), processes.on_main(slow), len(ended)

  assert in_three(call) == [(7, None, 2)] * 3
  assert called == [0, 0]


def test_facts_that_differ_name_the_process(in_three):
  def check(index):
    with pytest.raises(UserError) as caught:
      processes.check_equal('the training data', {'a': 1, 'b': index // 2})
    return str(caught.value)

  for message in in_three(check):
    assert 'differ in the training data: b is 0 in process 0' in message
    assert 'and 1 in process 2.' in message
