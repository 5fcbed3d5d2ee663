"""Learning curves of one or more runs as PNG."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
import numpy as np

import awp_jax
from experiments.runs.metrics import Lines, evaluated
from experiments.util import atomic, paths

#: Okabe and Ito's colors, which color-blind readers can distinguish. The line
#: style is redundant, for grayscale print.
TRAIN_STYLE = {'color': '#D55E00', 'linestyle': '--'}
TEST_STYLE = {'color': '#0072B2', 'linestyle': '-'}
RUN_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
#: One more than there are colors, so that 42 runs look different.
RUN_MARKERS = ('o', '^', 's', 'v', 'D', 'P', 'X')


def _save(figure: Any, path: paths.Path) -> None:
  """Writes a figure in the format of the path's suffix, and closes it."""
  with atomic.replacing(path) as file:
    figure.savefig(file, dpi=120, format=path.suffix[1:] or None)
  plt.close(figure)


def plot_curves(
    lines: Sequence[dict[str, Any]], path: paths.Path, title: str) -> None:
  """Plots robust and natural accuracy and robust loss over the epochs.

  Args:
    lines: of `metrics.jsonl`.
    path: of the PNG to write.
    title: of the figure.
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
  _save(figure, path)


def over_epochs(
    runs: Sequence[Lines], metric: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
  """Mean and standard deviation of a metric over runs.

  Args:
    runs: lines of `metrics.jsonl` of each.
    metric: a key of evaluated lines.

  Returns:
    The epochs that any run evaluated, and means and standard deviations over
    the runs that did; deviations of a single run are 0.
  """
  by_epoch: dict[int, list[float]] = {}
  for lines in runs:
    for line in evaluated(lines):
      by_epoch.setdefault(line['epoch'], []).append(line[metric])
  epochs = sorted(by_epoch)
  return epochs, np.array([np.mean(by_epoch[epoch]) for epoch in epochs]), (
      np.array([np.std(by_epoch[epoch], ddof=1) if len(by_epoch[epoch]) > 1
                else 0.0 for epoch in epochs]))


def plot_comparison(
    groups: Mapping[str, Sequence[Lines]], path: paths.Path) -> None:
  """Plots robust and natural accuracy of several runs over the epochs.

  Args:
    groups: by name, lines of `metrics.jsonl` of one or more runs, of which at
      least one has an evaluation. Of several the mean is drawn, with a band of
      one standard deviation.
    path: of the PNG to write.
  """
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  for number, (name, runs) in enumerate(groups.items()):
    color = RUN_COLORS[number % len(RUN_COLORS)]
    for axis, metric in zip(axes, ('robust', 'natural'), strict=True):
      for split, style in (('test', '-'), ('train', '--')):
        epochs, means, spreads = over_epochs(
            runs, f'{split}_{metric}_accuracy')
        if len(runs) > 1:
          axis.fill_between(
              epochs, means - spreads, means + spreads, color=color, alpha=0.15,
              linewidth=0)
        axis.plot(
            epochs, means, color=color, linestyle=style,
            label=f'{name}, {split}',
            linewidth=2 if split == 'test' else 1.2,
            marker=RUN_MARKERS[number % len(RUN_MARKERS)], markersize=5,
            markevery=(number % 8 / 80, 0.1))
  for axis, metric in zip(axes, ('robust', 'natural'), strict=True):
    axis.set(xlabel='epoch', ylabel=f'{metric} accuracy', ylim=(0, 1.01))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  if len(groups) > 3:  # inside, the legend would cover the curves
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False,
        loc='outside right upper')
  else:
    axes[0].legend(frameon=False, loc='best')
  _save(figure, path)


def plot_varied(
    field: str,
    series: Mapping[str, Mapping[Any, Mapping[str, Sequence[float]]]],
    path: paths.Path) -> None:
  """Plots robust accuracy and its gap over the values of a field.

  Args:
    field: its dotted name, the label of the x axis.
    series: by name, value of the field -> 'best', 'final' and 'gap' -> percent,
      one for each seed. Means are drawn, with bars of one standard deviation.
      Numbers are drawn to scale, logarithmic if they span a factor of 8; other
      values at equal distances.
    path: of the PNG to write.
  """
  values = list(dict.fromkeys(v for points in series.values() for v in points))
  numeric = all(type(value) in (int, float) for value in values)
  places = {v: v if numeric else i for i, v in enumerate(values)}
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  panels = (('robust accuracy, %', (('best', 'best', '-'),
                                    ('final', 'last', '--'))),
            ('robust generalization gap, points', (('gap', '', '-'),)))
  for axis, (label, drawn) in zip(axes, panels, strict=True):
    for number, (name, points) in enumerate(series.items()):
      for key, heading, style in drawn:
        shown = [value for value in points if key in points[value]]
        axis.errorbar(
            [places[value] for value in shown],
            [np.mean(points[value][key]) for value in shown],
            [np.std(points[value][key], ddof=1)
             if len(points[value][key]) > 1 else 0.0 for value in shown],
            color=RUN_COLORS[number % len(RUN_COLORS)],
            marker=RUN_MARKERS[number % len(RUN_MARKERS)], capsize=3,
            linestyle=style if numeric else '',
            fillstyle='none' if style == '--' else 'full',
            label=', '.join(filter(None, [name, heading])))
    axis.set(xlabel=field, ylabel=label)
    _scale(axis, places, numeric)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].legend(frameon=False)
  _save(figure, path)


def _scale(axis: Any, places: Mapping[Any, float], numeric: bool) -> None:
  """Sets the scale and ticks of an x axis with these values."""
  positive = [place for place in places.values() if place > 0]
  if numeric and positive and max(positive) >= 8 * min(positive):
    axis.set_xscale('symlog', linthresh=min(positive), linscale=0.5)
  axis.set_xticks(
      list(places.values()), [str(value) for value in places],
      **({} if numeric else {'rotation': 20, 'ha': 'right'}))
  axis.set_xticks([], minor=True)


def plot_epsilons(
    curve: awp_jax.RobustCurve, norm: str, path: paths.Path) -> None:
  """Plots robust accuracy over epsilon with its 95 % intervals.

  Args:
    curve: from `awp_jax.robust_curve`.
    norm: of the ball.
    path: of the PNG to write.
  """
  figure, axis = plt.subplots(figsize=(5.5, 4.2), layout='constrained')
  epsilons = np.concatenate([[0.0], curve.epsilons])
  natural = curve.natural.mean()
  interval = awp_jax.confidence_interval(
      int(curve.natural.sum()), len(curve.natural))
  low, high = np.concatenate([[interval], curve.intervals]).T
  axis.fill_between(
      epsilons, low, high, alpha=0.2, color=RUN_COLORS[0], linewidth=0)
  axis.plot(
      epsilons, [natural, *curve.robust_accuracy], color=RUN_COLORS[0],
      marker='o')
  axis.set(
      xlabel=f'epsilon, {norm}', ylabel='robust accuracy', ylim=(0, 1.01))
  axis.grid(alpha=0.3)
  axis.spines[['top', 'right']].set_visible(False)
  _save(figure, path)
