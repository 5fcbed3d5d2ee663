"""The figures of reports, from the records of one run or of several.

Where one run is shown, colors tell training from test images; where several
are, colors and markers tell the runs, and line styles the images.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

from experiments.evaluation import probe
from experiments.reports import figures
from experiments.reports.figures import Curve, Drawn
from experiments.runs import metrics

#: Colour and dash of a split where there is one run.
_SPLITS = {'test': (0, 0), 'train': (1, 1)}

_NAMES = {'test': 'test', 'train': 'training'}

Lines = Sequence[dict[str, Any]]


def _over_epochs(records: dict[str, Lines], metric: str) -> list[Curve]:
  curves = []
  for number, (name, lines) in enumerate(records.items()):
    shown = metrics.evaluated(lines)
    for split, (color, dash) in _SPLITS.items():
      alone = len(records) == 1
      curves.append(Curve(
          split if alone else f'{name}, {split}',
          [line['epoch'] for line in shown],
          [line[f'{split}_{metric}'] for line in shown],
          color if alone else number, dash))
  return curves


def _gaps(records: dict[str, Lines]) -> list[Curve]:
  curves = []
  for number, (name, lines) in enumerate(records.items()):
    shown = metrics.evaluated(lines)
    for dash, kind in enumerate(('robust', 'natural')):
      alone = len(records) == 1
      curves.append(Curve(
          kind if alone else f'{name}, {kind}',
          [line['epoch'] for line in shown],
          [line[f'train_{kind}_accuracy'] - line[f'test_{kind}_accuracy']
           for line in shown],
          dash if alone else number, dash))
  return curves


def training(folder: pathlib.Path, records: dict[str, Lines]) -> list[Drawn]:
  """Accuracy, loss, the gap and the learning rate over the epochs.

  Args:
    folder: for the files.
    records: lines of `metrics.jsonl` by the run's name, evaluated at least
      once.

  Returns:
    The figures.
  """
  drawn = []
  for kind, how in (
      ('robust', 'under the attack of evaluation'),
      ('natural', 'without an attack')):
    for metric, limits in (('accuracy', (0.0, 1.02)), ('loss', None)):
      drawn.append(figures.lines(
          folder, f'{kind}_{metric}',
          _over_epochs(records, f'{kind}_{metric}'),
          title=f'{kind.capitalize()} {metric}',
          caption=f'{metric.capitalize()} {how}, on training and test images.',
          xlabel='epoch', ylabel=f'{kind} {metric}', ylim=limits))
  drawn.append(figures.lines(
      folder, 'gap', _gaps(records), title='Generalisation gap',
      caption='Accuracy on training images less that on test images. Robust '
      'overfitting is where the robust one widens.', xlabel='epoch',
      ylabel='train less test accuracy', zero=True))
  rates = [
      Curve(name, [line['epoch'] for line in lines],
            [line['learning_rate'] for line in lines], number, number)
      for number, (name, lines) in enumerate(records.items())]
  drawn.append(figures.lines(
      folder, 'learning_rate', rates, title='Learning rate',
      caption='Of the last step of each epoch.', xlabel='epoch',
      ylabel='learning rate', legend=len(rates) > 1))
  return drawn


def _landscape_curves(
    records: dict[str, dict[str, Any]], direction: str, split: str,
    metric: str) -> list[Curve]:
  curves = []
  for number, (name, values) in enumerate(records.items()):
    for dash, (kind, entry) in enumerate(values['subjects'].items()):
      if direction not in entry:
        continue
      part = entry[direction][split][metric]
      alone = len(records) == 1
      curves.append(Curve(
          kind if alone else f'{name}, {kind}', entry[direction]['alphas'],
          part['mean'], dash if alone else number, dash, part['std']))
  return curves


def _landscape_caption(
    values: dict[str, Any], direction: str, split: str) -> str:
  attack, settings = values['attack'], values['settings']
  number = settings['num_directions']
  moved = {
      'random': f'along {number} random filter-normalised direction'
      f'{"s" if number > 1 else ""}'
      f'{" (mean and standard deviation)" if number > 1 else ""}',
      'adversarial': 'along the worst direction to first order, every layer in '
      "proportion to its weights' norm: alpha is the gamma of AWP",
  }[direction]
  return (
      f'{values["images"][split]} {_NAMES[split]} images, {moved}; new '
      f'adversarial examples at every point (PGD-{attack["num_steps"]}, step '
      f'{attack["step_size"]:.4g}).')


def landscapes(
    folder: pathlib.Path, records: dict[str, dict[str, Any]]) -> list[Drawn]:
  """The loss around the weights of one run or of several.

  Args:
    folder: for the files.
    records: contents of `landscape.json` by the run's name.

  Returns:
    The figures.
  """
  drawn = []
  first = next(iter(records.values()))
  for direction, split, metric in (
      ('random', 'train', 'robust_loss'), ('random', 'test', 'robust_loss'),
      ('random', 'train', 'robust_accuracy'),
      ('random', 'train', 'natural_loss'),
      ('adversarial', 'train', 'robust_loss'),
      ('adversarial', 'test', 'robust_loss')):
    curves = _landscape_curves(records, direction, split, metric)
    if not curves:
      continue
    label = metric.replace('_', ' ')
    drawn.append(figures.lines(
        folder, f'landscape_{direction}_{split}_{metric}', curves,
        title=f'{label.capitalize()}, {direction} direction'
        f'{"s" if direction == "random" else ""}, {split}',
        caption=_landscape_caption(first, direction, split),
        xlabel='alpha (in units of |w|)', ylabel=label,
        ylim=(0, 1.02) if metric.endswith('accuracy') else None))
  for name, values in records.items():
    for kind, entry in values['subjects'].items():
      if 'plane' in entry:
        drawn.append(_plane(folder, records, name, kind, entry['plane']))
  return drawn


def _plane(
    folder: pathlib.Path, records: dict[str, dict[str, Any]], name: str,
    kind: str, plane: dict[str, Any]) -> Drawn:
  alone = len(records) == 1
  which = kind if alone else f'{name}, {kind}'
  number = list(records).index(name)
  others = [
      row for values in records.values()
      for entry in values['subjects'].values() if 'plane' in entry
      for row in entry['plane']['train']['robust_loss']]
  return figures.contour(
      folder, f'plane_{kind}' if alone else f'plane_{number}_{kind}',
      plane['alphas'], plane['train']['robust_loss'], scale=others,
      title=f'Robust loss over a plane ({which})',
      caption='Over the first two random directions, on '
      f'{records[name]["images"]["train"]} training images. The cross is the '
      'model.')


def attacks(
    folder: pathlib.Path, records: dict[str, dict[str, Any]]) -> Drawn:
  """Accuracies with intervals of what was evaluated.

  Args:
    folder: for the files.
    records: contents of `evaluation.json` by the run's name.

  Returns:
    The figure.
  """
  labels = ['natural']
  groups: dict[str, dict[str, tuple[float, float, float]]] = {}
  for name, values in records.items():
    for kind, entry in values['subjects'].items():
      rows = {'natural': entry['natural']} | {
          label: evaluation['robust']
          for label, evaluation in entry['evaluations'].items()}
      labels += [label for label in rows if label not in labels]
      groups[kind if len(records) == 1 else f'{name}, {kind}'] = {
          label: (100 * row['accuracy'], *(100 * x for x in row['interval_95']))
          for label, row in rows.items()}
  return figures.dots(
      folder, 'attacks', labels,
      {group: [rows.get(label) for label in labels]
       for group, rows in groups.items()},
      title='Accuracy by attack', xlabel='accuracy in per cent',
      xlim=(0, 100), caption='With 95 % Wilson intervals of the sampling of '
      'test images; they say nothing of the spread between seeds.')


def layers(folder: pathlib.Path, look: probe.Look, gamma: float) -> list[Drawn]:
  """The weight adversary's perturbation, layer by layer.

  Args:
    folder: for the files.
    look: at the best checkpoint.
    gamma: of the run.

  Returns:
    The figures.
  """
  how = (
      f'One step of the weight adversary (gamma {look.gamma:g}) at the best '
      f'checkpoint, on {probe.BATCH} training images at most, computed for '
      'this report with running statistics.')
  if not gamma:
    how += ' The run itself was trained without it (gamma 0).'
  names = [str(name) for name in look.layers]
  total = float(look.rises.sum()) or 1.0
  ratios = [(float(value),) * 3 for value in look.ratios]
  shares = [(100 * float(value) / total,) * 3 for value in look.rises]
  return [
      figures.dots(
          folder, 'perturbation', names, {'|v| / |w|': ratios},
          title='Size of the perturbation by layer', xlabel='|v| / |w|',
          xlim=(0, 1.25 * look.gamma), caption=f'{how} By construction the '
          'ratio is gamma in every layer with a gradient; biases and '
          'normalisation layers are not perturbed.'),
      figures.dots(
          folder, 'perturbation_effect', names, {'share': shares},
          title='What the perturbation of each layer costs',
          xlabel='share of the rise in loss, per cent', xlim=(0, None),
          caption=f'{how} To first order the loss rises by '
          f'{float(look.rises.sum()):.3g}; shown is the share of each layer.')]
