"""The disk is full, the workdir becomes read-only, or it is removed."""

import collections
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import subprocess

from benchmarks.soak import damage
from benchmarks.soak.commands import Counts
from benchmarks.soak.reference import Reference


def storage(reference: Reference, count: int) -> Counts:
  """Each of the three in turn; full and read-only disks need root.

  After the failure its cause is removed, and the same command must end like an
  uninterrupted one.

  Args:
    reference: the uninterrupted run.
    count: number of failures.

  Returns:
    The counts; those of failures that cannot be made here are absent.
  """
  kinds = [_removed]
  if os.geteuid() == 0:
    kinds.append(_full)
  if _can_be_immutable(reference.commands.folder):
    kinds.append(_read_only)
  counts: Counts = collections.Counter()
  for number in range(count):
    kind = kinds[number % len(kinds)]
    name = kind.__name__.strip('_').replace('_', '-')
    with _place(reference, is_small=kind is _full) as folder:
      code, out, err = kind(reference, folder)
      outcome = damage.judged(reference, code, out, err, folder)
      if kind is _removed and not code and not (
          folder / 'config.json').exists():
        outcome = 'no run left'  # removed after the last check
      counts[f'{name}: {outcome}'] += 1
      if outcome not in (*damage.GOOD, 'no run left'):
        print(f'{name}: {outcome}: {err[-1000:]!r}', flush=True)
      if kind is _full:
        _mount(folder.parent, 'remount,size=1g')
      elif kind is _removed:  # what a save under way wrote afterwards
        shutil.rmtree(folder, ignore_errors=True)
      code, out, err = reference.commands.finish(
          'main.py', *reference.commands.mode('train', folder))
      outcome = damage.judged(reference, code, out, err, folder)
      counts[f'{name}, again: {outcome}'] += 1
      if outcome != 'same end':
        print(f'{name}, again: {outcome}: {err[-1000:]!r}', flush=True)
  return counts


@contextlib.contextmanager
def _place(reference: Reference, is_small: bool) -> Iterator[pathlib.Path]:
  """A new workdir, on a disk that may be smaller than a run."""
  disk = reference.commands.folder / 'disk'
  disk.mkdir()
  try:
    if is_small:
      size = sum(path.stat().st_size for path in reference.whole.rglob('*')
                 if path.is_file())
      share = reference.random.uniform(0.02, 1.2)
      _mount(disk, f'size={round(share * size / 4096) * 4096}')
    yield disk / 'run'
  finally:
    if is_small:
      subprocess.run(['umount', '-l', str(disk)], check=True)
    shutil.rmtree(disk)


def _mount(disk: pathlib.Path, options: str) -> None:
  subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', options, 'awp_jax', str(disk)], check=True)


def _full(
    reference: Reference, folder: pathlib.Path) -> tuple[int, str, str]:
  """Trains where the disk may be too small."""
  return reference.commands.finish(
      'main.py', *reference.commands.mode('train', folder))


def _read_only(
    reference: Reference, folder: pathlib.Path) -> tuple[int, str, str]:
  """Makes the folders immutable under the run, as a failing disk becomes."""
  arguments = reference.commands.mode('train', folder)
  process = reference.commands.start('main.py', *arguments)
  if reference.wait(process, 'train'):
    _set_immutable(folder.parent, '+i')
  out, err = process.communicate(timeout=600)
  _set_immutable(folder.parent, '-i')
  return process.returncode, out, err


def _can_be_immutable(folder: pathlib.Path) -> bool:
  """Whether this user and file system have immutable folders."""
  probe = folder / 'probe'
  probe.mkdir()
  _set_immutable(probe, '+i')
  try:
    (probe / 'file').touch()
    return False
  except OSError:
    return True
  finally:
    _set_immutable(probe, '-i')
    shutil.rmtree(probe)


def _set_immutable(folder: pathlib.Path, change: str) -> None:
  """Adds or removes the attribute of all folders; they may be vanishing."""
  paths = [place for place, _, _ in os.walk(folder)]
  subprocess.run(['chattr', change, *paths], check=False, capture_output=True)


def _removed(
    reference: Reference, folder: pathlib.Path) -> tuple[int, str, str]:
  """Removes the workdir under the run."""
  arguments = reference.commands.mode('train', folder)
  process = reference.commands.start('main.py', *arguments)
  if reference.wait(process, 'train'):
    shutil.rmtree(folder, ignore_errors=True)
  out, err = process.communicate(timeout=600)
  return process.returncode, out, err
