"""The records of an evaluation in a folder, so that it can be interrupted.

`EvalOptions(store=folder)` keeps a file for every finished group of examples:

  folder/<16 digits of the identity>/about.json   what the evaluation was
  folder/<16 digits of the identity>/00000-....npz    a `BatchResult`, as arrays
  ...

The identity covers everything that a record depends on but the code of attacks:
key, model, weights, images, labels, threat model, settings, batch size and
versions. Evaluations of several models, or with other settings, share a folder
without harm. Use another folder after editing an attack of your own.
"""

from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import re
import secrets
from typing import Any
import zipfile
import zlib

import numpy as np

from awp_jax.evaluation import fingerprint
from awp_jax.evaluation.arguments import EvalOptions
from awp_jax.evaluation.protocol import AttackSpec
from awp_jax.evaluation.results import BatchResult
from awp_jax.threat import ThreatModel

_DIGITS = 16

_NAME = re.compile(r'[0-9]+-[0-9a-f]+\.npz')


class Store:
  """Reads and writes the records of one evaluation."""

  def __init__(
      self, folder: str | os.PathLike[str], identity: str,
      about: dict[str, Any]) -> None:
    """Opens the folder of the evaluation; creates it if necessary.

    Args:
      folder: the parent folder, for any number of evaluations.
      identity: of the evaluation.
      about: plain values that describe it to a reader of `about.json`.

    Raises:
      OSError: if the folder cannot be created.
    """
    self.folder = pathlib.Path(folder).expanduser() / identity[:_DIGITS]
    self._identity = identity
    self.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({'identity': identity, **about}, indent=2) + '\n'
    self._replace('about.json', text.encode())

  def read(self) -> list[BatchResult]:
    """The records, in the order of their files; broken files are skipped."""
    found = []
    for path in sorted(self._files()):
      try:
        with path.open('rb') as file, np.load(
            file, allow_pickle=False) as archive:
          record = BatchResult.from_arrays(archive)
      except (EOFError, KeyError, OSError, TypeError, ValueError,
              zipfile.BadZipFile, zlib.error):
        continue
      if record.identity == self._identity:
        found.append(record)
    return found

  def _files(self) -> list[pathlib.Path]:
    return [path for path in self.folder.glob('*.npz')
            if _NAME.fullmatch(path.name)]

  def append(self, record: BatchResult) -> None:
    """Writes a record; a crash leaves it whole or absent."""
    number = 1 + max(map(_number, self._files()), default=-1)
    # The random digits differ between processes that use one store.
    path = self.folder / f'{number:05d}-{secrets.token_hex(4)}.npz'
    with _Replacing(path) as file:
      arrays: dict[str, Any] = record.to_arrays()
      np.savez(file, **arrays)

  def _replace(self, name: str, data: bytes) -> None:
    with _Replacing(self.folder / name) as file:
      file.write(data)


def _number(path: pathlib.Path) -> int:
  return int(path.name.partition('-')[0])


class _Replacing:
  """A new file that takes its name when it is complete."""

  def __init__(self, path: pathlib.Path) -> None:
    self._path = path
    self._partial = path.with_name(
        f'.{path.name}.{secrets.token_hex(4)}.partial')

  def __enter__(self) -> Any:
    self._file = self._partial.open('wb')
    return self._file

  def __exit__(self, kind: Any, *exception: object) -> None:
    if kind is None:
      self._file.flush()
      os.fsync(self._file.fileno())
    self._file.close()
    if kind is None:
      os.replace(self._partial, self._path)
    else:
      self._partial.unlink(missing_ok=True)


class ProgressPrinter:
  """Prints a line after each group: attack, survivors, seconds."""

  def __init__(self, num_correct: int, num_examples: int) -> None:
    """Starts before the first attack.

    Args:
      num_correct: examples classified correctly without an attack.
      num_examples: all examples.
    """
    self._robust, self._total = num_correct, num_examples
    self._done: dict[str, int] = {}
    self._seconds: dict[str, float] = {}

  def __call__(self, record: BatchResult, *, stored: bool = False) -> None:
    """Counts a record, and prints a line unless it was stored before."""
    name = record.attack
    self._robust -= int(record.broken.sum())
    self._done[name] = self._done.get(name, 0) + len(record.indices)
    self._seconds[name] = self._seconds.get(name, 0.0) + record.seconds
    if not stored:
      print(
          f'{name}: {self._done[name]} attacked, {self._robust} of '
          f'{self._total} robust, {self._seconds[name]:.0f} s', flush=True)

  def take(self, records: Sequence[BatchResult]) -> None:
    """Counts stored records."""
    for record in records:
      self(record, stored=True)


def open_store(
    options: EvalOptions, identity: str, specs: Sequence[AttackSpec],
    threat: ThreatModel, num_examples: int) -> Store | None:
  """The store of an evaluation; None without `EvalOptions.store`.

  Args:
    options: of the evaluation.
    identity: of the evaluation; '' if an attack has no settings, or the model
      calls Python code.
    specs: its attacks.
    threat: its threat model.
    num_examples: N.

  Returns:
    The store.

  Raises:
    ValueError: together with `EvalOptions.share`, or without an identity.
    OSError: if the folder cannot be created.
  """
  if options.store is None:
    return None
  if not str(options.store):
    raise ValueError("store must be the path of a folder, got ''.")
  if options.share is not None:
    raise ValueError(
        'store is for one process: with share, every process needs the same '
        'EvalOptions.done, and exchanges its records.')
  if not identity:
    unknown = [spec.name for spec in specs if spec.settings is None]
    raise ValueError(
        f'store needs attacks with settings, which {", ".join(unknown)} lacks: '
        'set them in its AttackSpec.' if unknown else
        'store cannot identify a model that calls Python code, as by '
        'jax.pure_callback.')
  return Store(options.store, identity, {
      'attacks': [spec.name for spec in specs],
      'num_examples': num_examples,
      'norm': threat.norm, 'epsilon': float(threat.epsilon),
      'versions': fingerprint.versions()})


def _without_repeats(
    records: Sequence[BatchResult]) -> tuple[BatchResult, ...]:
  """The records that hold no example of an earlier one of the same attack."""
  seen: dict[str, set[int]] = {}
  kept = []
  for record in records:
    known, own = seen.setdefault(record.attack, set()), set(
        record.indices.tolist())
    if not known & own:
      known |= own
      kept.append(record)
  return tuple(kept)


def reporting(
    options: EvalOptions, stored: Store | None, correct: np.ndarray
) -> EvalOptions:
  """The options with the records of the store, and all that follow a group.

  Args:
    options: of the evaluation.
    stored: its store, if it has one.
    correct: which natural images are classified correctly, [N].

  Returns:
    Options whose `progress` writes, prints and reports.
  """
  calls: list[Callable[[BatchResult], object]] = (
      [] if stored is None else [stored.append])
  done = tuple(options.done)
  if stored is not None:
    done = _without_repeats((*done, *stored.read()))
  if options.verbose:
    lines = ProgressPrinter(int(correct.sum()), len(correct))
    lines.take(done)
    calls.append(lines)
  if options.progress is not None:
    calls.append(options.progress)

  def progress(record: BatchResult) -> None:
    for call in calls:
      call(record)

  return dataclasses.replace(
      options, done=done, progress=progress if calls else None)
