"""What a run leaves in its workdir: metrics, event files, curves, summary."""

from collections.abc import Iterable, Mapping, Sequence
import importlib.metadata
import json
import numbers
import os
import pathlib
import platform
from typing import Any

import jax
import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
import tensorboardX

import awp_jax
from experiments import atomic

PACKAGES = (
    'jax', 'jaxlib', 'flax', 'optax', 'chex', 'ml_collections',
    'tensorflow-datasets', 'orbax-checkpoint')

#: Okabe and Ito's colours, told apart by colour-blind readers; the line style
#: says the same once more for print in grey.
TRAIN_STYLE = {'color': '#D55E00', 'linestyle': '--'}
TEST_STYLE = {'color': '#0072B2', 'linestyle': '-'}
RUN_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
#: One more than there are colours, so that 42 runs all look different.
RUN_MARKERS = ('o', '^', 's', 'v', 'D', 'P', 'X')

#: Fields of a metrics line that two identical runs need not share.
TIMING_FIELDS = (
    'seconds_training', 'seconds_evaluating', 'images_per_second')


def write_json(path: pathlib.Path, values: Any) -> None:
  """Writes JSON at once or not at all."""
  atomic.write_text(path, json.dumps(values, indent=2) + '\n')


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that numbers depend on."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    found[name] = importlib.metadata.version(name)
  # Not of its metadata: it may be used without being installed.
  return found | {'awp_jax': awp_jax.__version__}


def devices() -> list[str]:
  """The kinds of the devices of this run, one entry a device."""
  return [device.device_kind for device in jax.devices()]


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
  """`best`, `last` and `robust_generalisation_gap`, as in `summarise`.

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


def summarise(
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
      'devices': devices(),
      'versions': versions(),
  }


def plot_curves(
    lines: Sequence[dict[str, Any]], path: pathlib.Path, title: str) -> None:
  """Natural and robust accuracy and loss over the epochs, as a picture.

  Args:
    lines: of `metrics.jsonl`.
    path: of the PNG to write.
    title: what the run is.
  """
  shown = evaluated(lines)
  epochs = [line['epoch'] for line in shown]
  marker = 'o' if len(shown) < 3 else None
  figure, axes = plt.subplots(
      1, 3, figsize=(13, 3.8), layout='constrained')
  panels = (
      ('robust accuracy', 'robust_accuracy'),
      ('natural accuracy', 'natural_accuracy'),
      ('robust cross-entropy', 'robust_loss'))
  for axis, (label, name) in zip(axes, panels, strict=True):
    for split, style in (('train', TRAIN_STYLE), ('test', TEST_STYLE)):
      values = [line[f'{split}_{name}'] for line in shown]
      axis.plot(epochs, values, label=split, marker=marker, **style)
    axis.set(xlabel='epoch', ylabel=label)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    if 'accuracy' in name:
      axis.set_ylim(0, 1)
  axes[0].legend(frameon=False)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def plot_comparison(
    runs: Mapping[str, Sequence[dict[str, Any]]], path: pathlib.Path) -> None:
  """Robust and natural accuracy of several runs over the epochs, overlaid.

  Args:
    runs: lines of `metrics.jsonl` by the run's name.
    path: of the PNG to write.
  """
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  for number, (name, lines) in enumerate(runs.items()):
    shown = evaluated(lines)
    epochs = [line['epoch'] for line in shown]
    colour = RUN_COLOURS[number % len(RUN_COLOURS)]
    for axis, metric in zip(axes, ('robust', 'natural'), strict=True):
      for split, style in (('test', '-'), ('train', '--')):
        axis.plot(
            epochs, [line[f'{split}_{metric}_accuracy'] for line in shown],
            color=colour, linestyle=style, label=f'{name}, {split}',
            linewidth=2 if split == 'test' else 1.2,
            marker=RUN_MARKERS[number % len(RUN_MARKERS)], markersize=5,
            markevery=(number % 8 / 80, 0.1))
  for axis, metric in zip(axes, ('robust', 'natural'), strict=True):
    axis.set(xlabel='epoch', ylabel=f'{metric} accuracy', ylim=(0, 1.01))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  if len(runs) > 3:  # they would cover the curves
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False,
        loc='outside right upper')
  else:
    axes[0].legend(frameon=False, loc='lower right')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def table(rows: Sequence[Sequence[str]]) -> str:
  """Text columns: the first row is the head, the first column left-aligned."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for number, row in enumerate(rows):
    cells = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
    lines.append('  '.join(cells).rstrip())
    if number == 0:
      lines.append('  '.join('-' * width for width in widths))
  return '\n'.join(lines)
