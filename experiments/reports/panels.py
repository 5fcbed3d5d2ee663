"""The figures of reports, from the records of one or more runs.

For one run, colors distinguish training and test images. For several, colors
and markers distinguish the runs, and line styles the images.
"""

from typing import Any

from experiments.evaluation import probe
from experiments.reports import figures
from experiments.reports.figures import Curve, Drawn
from experiments.runs import metrics
from experiments.runs.metrics import Lines
from experiments.util import paths

#: Color and dash of a split if there is one run.
_SPLITS = {'test': (0, 0), 'train': (1, 1)}

_NAMES = {'test': 'test', 'train': 'training'}


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


def training(folder: paths.Path, records: dict[str, Lines]) -> list[Drawn]:
  """Draws accuracy, loss, the gap and the learning rate over the epochs.

  Args:
    folder: of the files.
    records: run name -> lines of `metrics.jsonl` with at least one evaluation.

  Returns:
    The figures.
  """
  drawn = []
  for kind, how in (
      ('robust', 'under the evaluation attack'),
      ('natural', 'without an attack')):
    for metric, limits in (('accuracy', (0.0, 1.02)), ('loss', None)):
      drawn.append(figures.lines(
          folder, f'{kind}_{metric}',
          _over_epochs(records, f'{kind}_{metric}'),
          title=f'{kind.capitalize()} {metric}',
          caption=f'{metric.capitalize()} {how}, on training and test images.',
          xlabel='epoch', ylabel=f'{kind} {metric}', ylim=limits))
  drawn.append(figures.lines(
      folder, 'gap', _gaps(records), title='Generalization gap',
      caption='Accuracy on training images minus accuracy on test images. A '
      'growing robust gap is robust overfitting.', xlabel='epoch',
      ylabel='train minus test accuracy', zero=True))
  rates = [
      Curve(name, [line['epoch'] for line in lines],
            [line['learning_rate'] for line in lines], number, number)
      for number, (name, lines) in enumerate(records.items())]
  drawn.append(figures.lines(
      folder, 'learning_rate', rates, title='Learning rate',
      caption='At the last step of each epoch.', xlabel='epoch',
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
      'random': f'along {number} random filter-normalized direction'
      f'{"s" if number > 1 else ""}'
      f'{" (mean and standard deviation)" if number > 1 else ""}',
      'adversarial': 'along the first-order worst direction, each layer scaled '
      'to the norm of its weights, so alpha corresponds to the gamma of AWP',
  }[direction]
  return (
      f'{values["images"][split]} {_NAMES[split]} images, {moved}; new '
      f'adversarial examples at every point (PGD-{attack["num_steps"]}, step '
      f'{attack["step_size"]:.4g}).')


def landscapes(
    folder: paths.Path, records: dict[str, dict[str, Any]]) -> list[Drawn]:
  """Draws the loss around the weights of one or more runs.

  Args:
    folder: of the files.
    records: run name -> contents of `landscape.json`.

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
    folder: paths.Path, records: dict[str, dict[str, Any]], name: str,
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
      f'{records[name]["images"]["train"]} training images. The cross marks '
      'the model.')


def attacks(
    folder: paths.Path, records: dict[str, dict[str, Any]]) -> Drawn:
  """Draws the accuracies of all evaluations with their intervals.

  Args:
    folder: of the files.
    records: run name -> contents of `evaluation.json`.

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
      title='Accuracy by attack', xlabel='accuracy in percent',
      xlim=(0, 100), caption='With 95 % Wilson intervals over the sampling of '
      'test images. They do not cover the spread between seeds.')


def epsilons(
    folder: paths.Path, records: dict[str, dict[str, Any]]) -> list[Drawn]:
  """Draws robust accuracy over epsilon, if it was evaluated.

  Args:
    folder: of the files.
    records: run name -> contents of `evaluation.json`.

  Returns:
    One figure, or none.
  """
  groups: dict[str, dict[str, tuple[float, float, float]]] = {}
  rows: list[float] = []
  attacked: list[str] = []
  for name, values in records.items():
    for kind, entry in values['subjects'].items():
      if 'curve' not in entry:
        continue
      curve = entry['curve']
      rows += curve['epsilons']
      attacked.append(', '.join(curve['attacks']))
      groups[kind if len(records) == 1 else f'{name}, {kind}'] = {
          f'{epsilon:.4g}': (100 * share, 100 * low, 100 * high)
          for epsilon, share, (low, high) in zip(
              curve['epsilons'], curve['robust_accuracy'],
              curve['interval_95'], strict=True)}
  if not groups:
    return []
  labels = [f'{epsilon:.4g}' for epsilon in sorted(set(rows))]
  return [figures.dots(
      folder, 'epsilons', labels,
      {group: [found.get(label) for label in labels]
       for group, found in groups.items()},
      title='Robust accuracy by epsilon', xlabel='accuracy in percent',
      xlim=(0, 100),
      caption=f'Under {" or ".join(dict.fromkeys(attacked))}. Images broken at '
      'one epsilon count as broken at all larger ones. With 95 % Wilson '
      'intervals over the sampling of test images.')]


def layers(
    folder: paths.Path, probed: probe.Probe, gamma: float) -> list[Drawn]:
  """Draws size and effect of the weight perturbation by layer.

  Args:
    folder: of the files.
    probed: measurements of the best checkpoint.
    gamma: of the run; 0 if it was trained without a weight adversary.

  Returns:
    The figures.
  """
  how = (
      f'One step of the weight adversary (gamma {probed.gamma:g}) at the best '
      f'checkpoint, on at most {probe.BATCH} training images, computed for '
      'this report with running statistics.')
  if not gamma:
    how += ' The run was trained without it (gamma 0).'
  names = [str(name) for name in probed.layers]
  total = float(probed.rises.sum()) or 1.0
  ratios = [(float(value),) * 3 for value in probed.ratios]
  shares = [(100 * float(value) / total,) * 3 for value in probed.rises]
  return [
      figures.dots(
          folder, 'perturbation', names, {'|v| / |w|': ratios},
          title='Size of the perturbation by layer', xlabel='|v| / |w|',
          xlim=(0, 1.25 * probed.gamma), caption=f'{how} By construction the '
          'ratio is gamma in every layer with a nonzero gradient; biases and '
          'normalization layers are not perturbed.'),
      figures.dots(
          folder, 'perturbation_effect', names, {'share': shares},
          title='Effect of the perturbation by layer',
          xlabel='share of the rise in loss, percent', xlim=(0, None),
          caption=f'{how} To first order, the loss rises by '
          f'{float(probed.rises.sum()):.3g}; the figure shows the share of '
          'each layer.')]
