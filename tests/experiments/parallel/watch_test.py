"""The watch over processes, with a fake service and a fake clock."""

import types

import pytest

from experiments.parallel import watch


class Ended(BaseException):
  """Stands for the end of the process."""


class World:
  """A service, and a clock that the waiting of the watch advances.

  Attributes:
    now: seconds.
    values: what the service holds.
    events: time -> called then, before the watch looks.
    outage: (begin, end) in which the service cannot be reached.
  """

  def __init__(self):
    self.now, self.values, self.events, self.outage = 0.0, {}, {}, (0, 0)

  def monotonic(self):
    return self.now

  def sleep(self, seconds):
    self.now = round(self.now + seconds, 6)
    self.events.get(self.now, lambda: None)()

  def key_value_set(self, key, value, allow_overwrite=False):
    del allow_overwrite
    self.values[key] = value

  def key_value_dir_get(self, folder):
    if self.outage[0] <= self.now < self.outage[1]:
      raise RuntimeError('UNAVAILABLE')
    return [(k, v) for k, v in self.values.items() if k.startswith(folder)]


@pytest.fixture
def world(monkeypatch):
  def ended(code):
    raise Ended(code)

  found = World()
  monkeypatch.setattr(watch.os, '_exit', ended)
  monkeypatch.setattr(watch, 'time', types.SimpleNamespace(
      monotonic=found.monotonic, sleep=found.sleep))
  return found


def run(world, capsys, until=200, silent_from=1000, one=None):
  """Watches as process 0 of 2; the time of the end, and the message."""
  one = one or watch._Watch(world, 0, 2)

  def wait(seconds):
    world.sleep(seconds)
    if world.now < silent_from:
      world.values['awp_jax/watch/alive/1'] = str(world.now)
    return world.now >= until

  one._done = types.SimpleNamespace(wait=wait)
  try:
    one.run()
  except Ended as ended:
    assert ended.args == (1,)
    return world.now, capsys.readouterr().err
  return world.now, ''


@pytest.mark.parametrize('silent_from', [1, 90])
def test_a_process_may_be_silent_for_the_patience(silent_from, world, capsys):
  when, message = run(world, capsys, silent_from=silent_from)
  assert 'process 1 has been silent for 30 s' in message
  last = max(silent_from - 1, 1)  # the first look starts the clock
  assert when == last + watch.PATIENCE + 1


def test_a_process_that_reports_is_not_ended(world, capsys):
  assert run(world, capsys, until=90) == (90, '')


def test_a_stopped_watch_ends_without_a_report(world):
  stopped = watch._Watch(world, 1, 2)
  stopped.stop()
  stopped.run()
  assert not world.values


def test_a_short_outage_of_the_service_is_no_reason_to_end(world, capsys):
  world.outage = 90, 90 + watch.PATIENCE
  assert run(world, capsys) == (200, '')
  world.now, world.outage = 0, (90, 500)
  when, message = run(world, capsys)
  assert 'process 0 cannot be reached' in message
  assert when == 89 + watch.PATIENCE + 1


def test_an_error_is_named_before_silence(world, capsys):
  def suspended():
    world.now += 100
    world.values['awp_jax/watch/failed/1'] = 'no space left'

  world.events[3] = suspended
  _, message = run(world, capsys, silent_from=2)
  assert 'process 1 failed: no space left' in message


def test_a_failing_process_does_not_follow_itself_or_others(world, capsys):
  world.values['awp_jax/watch/failed/0'] = 'own'
  assert run(world, capsys, until=5) == (5, '')
  one = watch._Watch(world, 0, 2)
  one._failing.set()
  world.values['awp_jax/watch/failed/1'] = 'that of the other'
  assert run(world, capsys, until=9, one=one) == (9, '')


@pytest.mark.parametrize('readers, ends', [
    ({}, watch._GRACE), ({1.0: 0}, watch._GRACE), ({1.0: 0, 2.0: 2}, 2.0)])
def test_a_failing_process_waits_until_all_others_have_read(
    readers, ends, world):
  for when, number in readers.items():
    world.events[when] = lambda number=number: world.key_value_set(
        f'awp_jax/watch/read/{number}', '')
  with pytest.raises(Ended) as ended:
    watch._Watch(world, 1, 3).fail('no space left', 3)
  assert ended.value.args == (3,)
  assert world.now == pytest.approx(ends, abs=0.15)
  assert world.values['awp_jax/watch/failed/1'] == 'no space left'
