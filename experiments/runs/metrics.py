"""The metrics of a run: lines by epoch and by step, the summary."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import json
import math
from typing import Any
import zlib

from experiments.parallel import processes
from experiments.runs import writers
from experiments.util import atomic, environment, paths

#: Fields of a metrics line that may differ between identical runs.
TIMING_FIELDS = (
    'seconds_training', 'seconds_evaluating', 'images_per_second')

#: Lines of `metrics.jsonl`.
Lines = Sequence[dict[str, Any]]


class MetricsLog:
  """Writes `metrics.jsonl`, a line per epoch, and `steps.jsonl`.

  Both go to the run's writers as well. Of several processes the main one
  writes, and all hold the lines of epochs.

  Attributes:
    lines: the lines of epochs.
    lost: completed epochs whose line is missing or was changed since the last
      checkpoint, which has checksums of them.
    lost_steps: whether lines of `steps.jsonl` are missing or were changed.
  """

  def __init__(
      self, workdir: paths.Path, completed_epochs: int,
      completed_steps: int = 0, names: Sequence[str] = writers.DEFAULT,
      config: Mapping[str, Any] | None = None,
      checksums: Mapping[str, Any] | None = None,
      best: Mapping[str, Any] | None = None) -> None:
    """Opens the log and removes lines after the restored state.

    Args:
      workdir: the run's folder.
      completed_epochs: number of completed epochs of the restored state. A
        process killed between a line and its checkpoint leaves an extra line.
      completed_steps: number of its completed steps.
      names: of writers, as in `writers.open_all`.
      config: the run's fields by dotted name, for the writers.
      checksums: from `checksums` when the restored state was saved.
      best: the line that the best checkpoint holds, which replaces a lost one.
    """
    self._path, self._steps = workdir / 'metrics.jsonl', workdir / 'steps.jsonl'
    found = [
        line for line in processes.from_main(lambda: read_metrics(workdir))
        if line['epoch'] <= completed_epochs]
    checksums = checksums or {}
    self.lines, self.lost = _recovered(
        found, checksums.get('epochs'), completed_epochs, best or {})
    self.lost_steps = False
    self._of_steps = [0, 0]
    self._is_main = processes.is_main()
    self._writers: list[writers.Writer] = []
    if self._is_main:
      _rewrite(self._path, self.lines)
      steps = [line for line in read_lines(self._steps, 'step')
               if line['step'] <= completed_steps]
      if steps or self._steps.exists():
        _rewrite(self._steps, steps)
      for line in steps:
        self._add_to_checksum(line)
      self.lost_steps = checksums.get('steps', self._of_steps) != self._of_steps
      self._writers = writers.open_all(
          names, workdir, config or {}, completed_epochs, completed_steps)
      # A process that ended between the best checkpoint and its line.
      known = {line['epoch'] for line in found}
      if self.lines and self.lines[-1]['epoch'] not in known:
        for writer in self._writers:
          writer.epoch(self.lines[-1])

  def checksums(self) -> dict[str, Any]:
    """Checksums of each epoch's line and of all lines of steps.

    They are stored with a checkpoint. Those of steps are the main process's.
    """
    return {
        'epochs': _checksums(self.lines),
        'steps': list(self._of_steps)}

  def _add_to_checksum(self, line: dict[str, Any]) -> None:
    number, checksum = self._of_steps
    self._of_steps = [
        number + 1, zlib.crc32(json.dumps(line).encode(), checksum)]

  def append(self, line: dict[str, Any]) -> None:
    """Adds the line of an epoch; on disk before this returns."""
    self.lines.append(line)
    if self._is_main:
      atomic.append_text(self._path, json.dumps(line) + '\n')
    for writer in self._writers:
      writer.epoch(line)

  def append_step(self, line: dict[str, Any]) -> None:
    """Adds a line of means over the steps since the previous one."""
    if self._is_main:
      atomic.append_text(self._steps, json.dumps(line) + '\n')
      self._add_to_checksum(line)
    for writer in self._writers:
      writer.step(line)

  def exclude_lost(self, kept: int, present: int, select_on: str) -> bool:
    """Excludes epochs from `best_line` whose state was lost.

    Args:
      kept: the epoch of the best checkpoint on the disk; 0 without one.
      present: the epoch at whose end the restored state is; 0 within an epoch.
      select_on: as in `best_line`.

    Returns:
      Whether the state of the best epoch was lost, and so were others.
    """
    best = best_line(self.lines, select_on)
    if best is None or not _is_candidate(best) or best['epoch'] <= kept:
      return False
    self.lines = [
        line | {'lost': 1} if line['epoch'] > kept and (
            line['epoch'] != present) else line
        for line in self.lines]
    if self._is_main:
      _rewrite(self._path, self.lines)
    return True

  def close(self) -> None:
    """Closes the writers, all of them if one fails."""
    with contextlib.ExitStack() as stack:
      for writer in self._writers:
        stack.callback(writer.close)


def _checksums(lines: Lines) -> dict[str, int]:
  return {str(line['epoch']): _checksum(line) for line in lines}


def _checksum(line: Mapping[str, Any]) -> int:
  # `exclude_lost` may add this field later.
  values = {name: value for name, value in line.items() if name != 'lost'}
  return zlib.crc32(json.dumps(values).encode())


def _recovered(
    lines: Lines, checksums: Mapping[str, int] | None, completed: int,
    best: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
  """Separates the lines that are as they were written from lost ones.

  Args:
    lines: as read, of completed epochs.
    checksums: by epoch; None for a run of a version without them.
    completed: number of completed epochs. Only the line of the last one may be
      newer than the checkpoint, and have no checksum.
    best: the line in the best checkpoint, which has a digest of its own.

  Returns:
    The lines, and the epochs of those that were lost.
  """
  known = {int(epoch): value for epoch, value in (checksums or {}).items()}
  good = {}
  for line in lines:
    epoch = line['epoch']
    is_covered = checksums is not None and epoch != completed
    if epoch >= 1 and (known.get(epoch) == _checksum(line) or (
        epoch not in known and not is_covered)):
      good[epoch] = line
  if best and 1 <= best.get('epoch', 0) <= completed:
    good.setdefault(best['epoch'], dict(best))
  return ([good[epoch] for epoch in sorted(good)],
          sorted(known.keys() - good.keys()))


def _rewrite(path: paths.Path, lines: Lines) -> None:
  atomic.write_text(path, ''.join(json.dumps(x) + '\n' for x in lines))


def read_metrics(workdir: paths.Path) -> list[dict[str, Any]]:
  """The lines of `metrics.jsonl`; none if there is no such file.

  Lines that are not of an epoch are dropped: the partial last one of a killed
  process, and damaged ones.
  """
  return read_lines(workdir / 'metrics.jsonl', 'epoch')


def read_lines(path: paths.Path, number: str) -> list[dict[str, Any]]:
  """The lines of a file of JSON lines, as `read_metrics`.

  Args:
    path: the file, which need not exist.
    number: the field by which lines are numbered, 'epoch' or 'step'.

  Returns:
    The lines.
  """
  if not path.exists():
    return []
  lines = []
  for text in path.read_bytes().splitlines():
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):  # also for bytes that are not UTF-8
      continue
    if isinstance(line, dict) and type(line.get(number)) is int:
      lines.append(line)
  return lines


def num_steps(lines: Lines, batch_size: int) -> int:
  """The training steps of the epochs of some lines."""
  return sum(math.ceil(line['images'] / batch_size) for line in lines)


def evaluated(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The lines of the evaluated epochs."""
  return [line for line in lines if 'test_robust_accuracy' in line]


def _is_candidate(line: dict[str, Any]) -> bool:
  return not line.get('suspicious') and not line.get('lost')


def best_line(
    lines: Sequence[dict[str, Any]], select_on: str) -> dict[str, Any] | None:
  """The first line with the highest robust accuracy on `select_on`.

  Epochs that ended with a suspected collapse are excluded, and those whose
  state was lost. If there are no others, returns the last evaluated line.
  """
  shown = evaluated(lines)
  candidates = [line for line in shown if _is_candidate(line)]
  if not candidates:
    return shown[-1] if shown else None
  return max(candidates, key=lambda line: line[f'{select_on}_robust_accuracy'])


def accuracies(
    lines: Sequence[dict[str, Any]], select_on: str) -> dict[str, Any]:
  """`best`, `last` and `robust_generalisation_gap`, as in `summarize`.

  Args:
    lines: lines of `metrics.jsonl`, at least one of them evaluated. The run may
      be unfinished: `last` is the last evaluation so far.
    select_on: the split that selects `best`, 'test' or 'validation'.

  Returns:
    Fractions in [0, 1].
  """
  best, last = best_line(lines, select_on), evaluated(lines)[-1]
  assert best is not None

  def entry(line: dict[str, Any]) -> dict[str, Any]:
    return {
        'epoch': line['epoch'],
        'natural_accuracy': line['test_natural_accuracy'],
        'robust_accuracy': line['test_robust_accuracy'],
        'nonfinite': line.get('test_nonfinite', 0.0)}

  tail = [line['test_robust_accuracy'] for line in evaluated(lines)[-6:]]
  return {
      'best': {**entry(best), 'selected_on': select_on},
      'last': {**entry(last), 'mean_of_last_6': sum(tail) / len(tail)},
      'robust_generalisation_gap': (
          last['train_robust_accuracy'] - last['test_robust_accuracy'])}


def stops_early(
    lines: Sequence[dict[str, Any]], select_on: str, patience: int) -> bool:
  """Whether `patience` epochs have passed since the best; False for 0.

  A run never stops at an epoch that was not evaluated. Epochs whose state was
  lost do not count.
  """
  best = best_line(lines, select_on)
  if not patience or best is None or not evaluated(lines[-1:]):
    return False
  since = max([best['epoch'], *(
      line['epoch'] for line in lines if line.get('lost'))])
  return lines[-1]['epoch'] - since >= patience


def summarize(
    lines: Sequence[dict[str, Any]], select_on: str,
    dataset: dict[str, Any]) -> dict[str, Any]:
  """The contents of `summary.json`; accuracies are fractions in [0, 1].

  Args:
    lines: lines of `metrics.jsonl`; the last one was evaluated.
    select_on: the split that selects `best`, 'test' or 'validation'.
    dataset: from `datasets.describe`.

  Returns:
    `best` and `last`, `robust_generalisation_gap` (robust accuracy on training
    images minus that on test images, at the last epoch), speed, data, the
    precision of the evaluation, devices and versions, and checksums of the
    lines by epoch. If lines were lost, `lost_epochs` lists them, and `seconds`
    is without them.
  """
  found = {line['epoch'] for line in lines}
  lost = [epoch for epoch in range(1, max(found)) if epoch not in found]
  training = sum(line['seconds_training'] for line in lines)
  evaluating = sum(line['seconds_evaluating'] for line in lines)
  images = sum(line['images'] for line in lines)
  return {
      **accuracies(lines, select_on),
      'images_per_second': images / training if training else 0.0,
      'seconds': training + evaluating,
      **({'lost_epochs': lost} if lost else {}),
      'dataset': dataset,
      'judged_by': evaluated(lines)[-1].get('judged_by', {}),
      'devices': environment.devices(),
      'versions': environment.versions(),
      'checksums': _checksums(lines),
  }


def changed_epochs(
    lines: Lines, summary: Mapping[str, Any]) -> list[int]:
  """The epochs whose lines are not those that a run ended with.

  Args:
    lines: of `metrics.jsonl`.
    summary: the contents of `summary.json`; {} or one of an older version
      without checksums tells nothing.
  """
  now = _checksums(lines)
  return sorted(int(epoch) for epoch, value in summary.get(
      'checksums', {}).items() if now.get(epoch) != value)
