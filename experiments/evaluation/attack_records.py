"""Records of the finished groups of one evaluation, and a progress bar.

Several processes write into one folder, and each reads the records of all.
"""

from collections.abc import Iterable, Sequence
import json
from typing import Any
import zipfile

import numpy as np
import tqdm

import awp_jax
from experiments.parallel import processes
from experiments.util import atomic, digests, paths


class Records:
  """Finished groups of examples of one evaluation on disk."""

  def __init__(
      self, folder: paths.Path, name: str, facts: dict[str, Any],
      judged_by: dict[str, Any]) -> None:
    """Reads the existing records, if any.

    Args:
      folder: the run's folder `evaluation`.
      name: of the evaluation.
      facts: plain values that the records depend on. Their digest is part of
        the folder's name, so other facts get other records.
      judged_by: precision, devices and versions of this process.
    """
    self._judged_by = json.dumps(judged_by, sort_keys=True)
    self._folder = folder / (
        f'{paths.file_name(name)}-{digests.of_values(facts)}')
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / 'identity.json'
    if processes.is_main() and not path.exists():
      atomic.write_text(path, json.dumps(facts, indent=2) + '\n')
    self._found: dict[str, tuple[awp_jax.BatchResult, str]] = {}
    self._own: list[str] = []
    names = processes.from_main(lambda: sorted(
        path.name for path in self._folder.glob('[0-9]*.npz')))
    self._next = 1 + max((int(name[:5]) for name in names), default=-1)
    self._take(names)
    # All processes start with the same records, which all could read.
    common = set.intersection(*map(set, processes.gather(list(self._found))))
    self._found = {
        name: found for name, found in self._found.items() if name in common}

  @property
  def done(self) -> list[awp_jax.BatchResult]:
    """The records so far, equal in all processes after `exchange`."""
    return [record for record, _ in self._found.values()]

  def _take(self, names: Iterable[str]) -> None:
    """Reads the records with new names; skips those that cannot be read."""
    for name in names:
      found = None if name in self._found else _read(self._folder / name)
      if found is not None:
        self._found[name] = found

  def exchange(
      self, own: Sequence[awp_jax.BatchResult]) -> list[awp_jax.BatchResult]:
    """Waits for all processes; returns their records of the last attack.

    Args:
      own: those of this process, already appended.

    Returns:
      The records of all processes since the last call.
    """
    before = len(self._found) - len(own)
    for names in processes.gather(self._own):
      self._take(names)
    self._own = []
    return self.done[before:]

  @property
  def judged_by(self) -> list[dict[str, Any]]:
    """The distinct precisions, devices and versions used."""
    return [json.loads(text) for text in dict.fromkeys(
        environment for _, environment in self._found.values())]

  def append(self, record: awp_jax.BatchResult) -> None:
    """Writes a record to disk."""
    name = f'{self._next:05d}.npz' if processes.is_main() else (
        f'{self._next:05d}-process-{processes.index()}.npz')
    with atomic.replacing(self._folder / name) as file:
      arrays: dict[str, Any] = record.to_arrays()
      np.savez(file, **arrays, judged_by=np.array(self._judged_by))
    self._next += 1
    self._own.append(name)
    self._found[name] = record, self._judged_by


def _read(path: paths.Path) -> tuple[awp_jax.BatchResult, str] | None:
  """A record and its environment; None if broken or of another version."""
  try:
    with path.open('rb') as file, np.load(
        file, allow_pickle=False) as archive:
      return (awp_jax.BatchResult.from_arrays(archive),
              str(archive['judged_by']))
  except (KeyError, TypeError, ValueError, zipfile.BadZipFile):
    return None


class Progress:
  """A progress bar in a terminal, otherwise one line per group."""

  def __init__(self, label: str, total: int, correct: int) -> None:
    """Starts with `correct` of `total` examples classified correctly."""
    self._label, self._total, self._robust = label, total, correct
    self._seconds = 0.0
    self._bar = tqdm.tqdm(
        total=None, unit='example', desc=label,
        disable=not processes.shows_progress())

  def add(self, record: awp_jax.BatchResult) -> None:
    """Shows the robust accuracy after a group."""
    self._robust -= int(record.broken.sum())
    self._seconds += record.seconds
    text = (f'{record.attack}: {self._robust} of {self._total} robust '
            f'({100 * self._robust / self._total:.2f} %), '
            f'{self._seconds:.0f} s')
    self._bar.update(len(record.indices))
    self._bar.set_postfix_str(text)
    if self._bar.disable:
      print(f'{self._label}  {text}', flush=True)

  def close(self) -> None:
    """Closes the bar and leaves it on the screen."""
    self._bar.close()
