"""A checkpoint in a bucket, written by a process that is killed."""

import pytest

from experiments.runs import mirrors
from experiments.util import paths
from tests.helpers import fake_buckets


class Killed(BaseException):
  """Stands for the end of the process."""


@pytest.fixture
def system():
  with fake_buckets.served() as systems:
    yield systems['s3']


def checkpoint(mirror, step):
  folder = mirror.local / str(step)
  (folder / 'd').mkdir(parents=True)
  for name in ('a', 'd/b', mirrors.MARKER, 'z'):
    (folder / name).write_text(f'{name} of {step}')


def complete(folder):
  """The complete checkpoints in the bucket, with their files."""
  found = {}
  for step in mirrors._steps(folder):
    with mirrors.readable(folder / str(step)) as place:
      found[step] = {
          path.relative_to(place).as_posix(): path.read_text()
          for path in place.rglob('*') if path.is_file()}
  return found


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(
    system, monkeypatch):
  folder = paths.parse('s3://bucket/run')
  put, rm = system._put, system.rm
  mirror = mirrors.Mirror(folder, kept=1)
  for step in (9, 10):
    checkpoint(mirror, step)
  mirror.upload(9)
  first, left, outcomes = dict(system.objects), [0], []

  def counted(change):
    def changed(self, name, *arguments, **keywords):
      if isinstance(name, str) and keywords.get('recursive'):
        # Removes the objects one by one, in the order of their names.
        for other in sorted(self.objects):
          if other.startswith(self._strip_protocol(name) + '/'):
            changed(self, other)
        return None
      if not left[0]:
        raise Killed
      left[0] -= 1
      return change(self, name, *arguments, **keywords)
    return changed

  monkeypatch.setattr(system, '_put', counted(put))
  monkeypatch.setattr(system, 'rm', counted(rm))
  for number in range(20):
    system.objects.clear()
    system.objects.update(first)
    left[0] = number
    try:
      mirror.upload(10)
      break
    except Killed:
      found = complete(folder)
      for step, files in found.items():
        assert {n: files[n] for n in ('a', 'd/b', 'z')} == {
            name: f'{name} of {step}' for name in ('a', 'd/b', 'z')}
      outcomes.append(sorted(found))
  assert [9] in outcomes and [10] in outcomes and [] not in outcomes
  assert list(complete(folder)) == [10] and number > 6
  # The newest one is read, also if its name sorts first.
  system.objects.update(first)
  again = mirrors.Mirror(folder, kept=1)
  assert [path.name for path in again.local.iterdir()] == ['10']
  local = again.local
  again.close()
  assert not local.exists()
