"""The metrics of a run: `metrics.jsonl`, TensorBoard events, the summary."""

from collections.abc import Iterable, Mapping, Sequence
import importlib.metadata
import json
import numbers
import os
import pathlib
import platform
from typing import Any

import jax

import tensorboardX

import awp_jax
from experiments.util import atomic, environment


#: Fields of a metrics line that two identical runs need not share.
TIMING_FIELDS = (
    'seconds_training', 'seconds_evaluating', 'images_per_second')


class MetricsLog:
  """`metrics.jsonl`, a line an epoch, and the same values for TensorBoard."""

  def __init__(self, workdir: pathlib.Path, completed_epochs: int) -> None:
    """Opens the log; lines behind `completed_epochs` are taken back.

    Args:
      workdir: the run's folder.
      completed_epochs: how many epochs the state that the run goes on from has
        behind it. A process killed between a line and its checkpoint leaves a
        line too many.
    """
    self._path = workdir / 'metrics.jsonl'
    self.lines = [
        line for line in read_metrics(workdir)
        if line['epoch'] <= completed_epochs]
    self._rewrite()
    self._writer = tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'), purge_step=completed_epochs + 1)

  def _rewrite(self) -> None:
    atomic.write_text(
        self._path, ''.join(json.dumps(x) + '\n' for x in self.lines))

  def append(self, line: dict[str, Any]) -> None:
    """Adds the line of an epoch, on disk before this returns."""
    self.lines.append(line)
    with self._path.open('a') as file:
      file.write(json.dumps(line) + '\n')
      file.flush()
      os.fsync(file.fileno())
    for name, value in line.items():
      if name != 'epoch' and isinstance(value, numbers.Real):
        self._writer.add_scalar(name, value, line['epoch'])
    self._writer.flush()

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of `metrics.jsonl`; none if there is no such file.

  A last line that a killed process left half-written is dropped.
  """
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = []
  for text in path.read_text().splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      break
  return lines


def evaluated(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The lines of those epochs that were evaluated."""
  return [line for line in lines if 'test_robust_accuracy' in line]


def best_line(
    lines: Sequence[dict[str, Any]], select_on: str) -> dict[str, Any] | None:
  """The first line with the highest robust accuracy on `select_on`.

  Not one of an epoch that ended with the network under suspicion of collapse,
  unless there is no other; then it is the last.
  """
  shown = evaluated(lines)
  candidates = [line for line in shown if not line.get('suspicious')]
  if not candidates:
    return shown[-1] if shown else None
  return max(candidates, key=lambda line: line[f'{select_on}_robust_accuracy'])


def accuracies(
    lines: Sequence[dict[str, Any]], select_on: str) -> dict[str, Any]:
  """`best`, `last` and `robust_generalisation_gap`, as in `summarize`.

  Args:
    lines: of `metrics.jsonl`, one of which at least was evaluated. The run need
      not be finished: `last` is the last evaluation so far.
    select_on: 'test' or 'validation', by which `best` was chosen.

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
  """Whether `patience` epochs have gone by since the best; never for 0.

  An epoch that was not evaluated is no end of a run.
  """
  best = best_line(lines, select_on)
  return bool(
      patience and best is not None and evaluated(lines[-1:])
      and lines[-1]['epoch'] - best['epoch'] >= patience)


def summarize(
    lines: Sequence[dict[str, Any]], select_on: str,
    dataset: dict[str, Any]) -> dict[str, Any]:
  """The contents of `summary.json`; accuracies are fractions in [0, 1].

  Args:
    lines: of `metrics.jsonl`; the last was evaluated.
    select_on: 'test' or 'validation', by which `best` was chosen.
    dataset: what `data.describe` returns.

  Returns:
    `best` and `last`, `robust_generalisation_gap` (robust accuracy on training
    images less that on test images, at the last epoch), speed, data, how the
    accuracies were judged, devices and versions.
  """
  training = sum(line['seconds_training'] for line in lines)
  evaluating = sum(line['seconds_evaluating'] for line in lines)
  images = sum(line['images'] for line in lines)
  return {
      **accuracies(lines, select_on),
      'images_per_second': images / training if training else 0.0,
      'seconds': training + evaluating,
      'dataset': dataset,
      'judged_by': evaluated(lines)[-1].get('judged_by', {}),
      'devices': environment.devices(),
      'versions': environment.versions(),
  }


