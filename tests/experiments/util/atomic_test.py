"""Tests of atomic file writes."""

import json
import subprocess
import sys
import threading

import pytest

from experiments.util import atomic


def test_replaces_and_leaves_nothing_behind(tmp_path):
  path = tmp_path / 'a.json'
  atomic.write_text(path, 'é one')
  atomic.write_text(path, 'two')
  assert path.read_text() == 'two'
  assert list(tmp_path.iterdir()) == [path]
  # Has the permissions of any new file, not those of a private one.
  (tmp_path / 'usual').write_text('')
  assert path.stat().st_mode == (tmp_path / 'usual').stat().st_mode


def test_failure_keeps_the_old_file(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('old')
  with pytest.raises(KeyError), atomic.replacing(path) as file:
    file.write(b'half')
    file.flush()
    assert path.read_text() == 'old'
    raise KeyError
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_do_not_collide(tmp_path):
  path = tmp_path / 'a.json'
  first, second = atomic.replacing(path), atomic.replacing(path)
  with first as one:
    with second as two:
      one.write(b'one')
      two.write(b'second')
    assert path.read_bytes() == b'second'
  assert path.read_bytes() == b'one'
  assert list(tmp_path.iterdir()) == [path]


def test_json_of_many_threads_is_one_of_theirs(tmp_path):
  path, failed = tmp_path / 'a.json', []

  def write(number):
    try:
      for _ in range(20):
        atomic.write_json(path, [number] * (200 * number))
    except Exception as error:
      failed.append(error)

  threads = [threading.Thread(target=write, args=(n,)) for n in range(1, 6)]
  for thread in threads:
    thread.start()
  while any(thread.is_alive() for thread in threads):
    if path.exists():
      values = json.loads(path.read_text())
      assert len(values) == 200 * values[0]
  for thread in threads:
    thread.join()
  assert not failed
  assert list(tmp_path.iterdir()) == [path]


def test_killed_writer_leaves_a_leftover_only(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('old')
  subprocess.run([sys.executable, '-c', (
      'import os, pathlib, signal\n'
      'from experiments.util import atomic\n'
      f'with atomic.replacing(pathlib.Path({str(path)!r})) as file:\n'
      '  file.write(b"half")\n'
      '  os.kill(os.getpid(), signal.SIGKILL)\n')], timeout=60, check=False)
  assert path.read_text() == 'old'
  left = [p for p in tmp_path.iterdir() if p != path]
  assert len(left) == 1 and atomic.is_leftover(left[0])
  assert not atomic.is_leftover(path)
