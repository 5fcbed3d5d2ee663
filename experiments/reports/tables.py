"""The tables of reports: rows of cells; the first row is the header."""

import json
from typing import Any

from experiments.runs import run as run_lib
from experiments.util import environment

Rows = list[list[str]]

#: Packages whose versions affect the measured numbers.
_PACKAGES = ('awp_jax', 'jax', 'jaxlib')


def _percent(value: float) -> str:
  return f'{100 * value:.2f}\N{NO-BREAK SPACE}%'


def tiles(
    summary: dict[str, Any], evaluation: dict[str, Any]
) -> list[tuple[str, str, str]]:
  """A run's key numbers as (label, value, note)."""
  found = []
  if summary:
    best, last = summary['best'], summary['last']
    found += [
        ('robust, best', _percent(best['robust_accuracy']),
         f'epoch {best["epoch"]}, natural '
         f'{_percent(best["natural_accuracy"])}'),
        ('robust, last', _percent(last['robust_accuracy']),
         f'epoch {last["epoch"]}, mean of last six '
         f'{_percent(last["mean_of_last_6"])}'),
        ('natural, last', _percent(last['natural_accuracy']), 'test images'),
        ('robust gap, last',
         f'{100 * summary["robust_generalisation_gap"]:.2f}',
         'points, training minus test')]
    if share := max(best.get('nonfinite', 0), last.get('nonfinite', 0)):
      found.append((
          'non-finite', _percent(share), 'of the test images have '
          'non-finite logits or gradients, so robust accuracy is too high'))
  for kind, entry in evaluation.get('subjects', {}).items():
    lowest = min(
        entry['evaluations'].items(),
        key=lambda item: item[1]['robust']['accuracy'])
    low, high = lowest[1]['robust']['interval_95']
    found.append((
        f'{lowest[0]}, {kind}', _percent(lowest[1]['robust']['accuracy']),
        f'lowest of all attacks; {100 * low:.1f} to {100 * high:.1f} %'))
  return found


def attacks(records: dict[str, dict[str, Any]]) -> Rows:
  """Accuracies with intervals, one row per checkpoint and evaluation."""
  rows = [['model', 'evaluation', 'accuracy', '95 % interval', 'seconds']]
  for name, values in records.items():
    for kind, entry in values.get('subjects', {}).items():
      which = kind if len(records) == 1 else f'{name}, {kind}'
      lines = [('natural', entry['natural'], None)] + [
          (label, evaluation['robust'], evaluation['seconds'])
          for label, evaluation in entry['evaluations'].items()]
      for label, result, seconds in lines:
        low, high = (100 * bound for bound in result['interval_95'])
        rows.append([
            which, label, _percent(result['accuracy']),
            f'{low:.2f} to {high:.2f}',
            '' if seconds is None else f'{seconds:.0f}'])
  return rows


def environments(values: dict[str, Any]) -> str:
  """Precision, devices and versions of an evaluation or a landscape.

  Args:
    values: the contents of `evaluation.json` or `landscape.json`.

  Returns:
    One sentence for each distinct combination.
  """
  found = {}
  for entry in values.get('subjects', {}).values():
    for part in (entry, *entry.get('evaluations', {}).values()):
      for one in part.get('judged_by', ()):
        found[json.dumps(one, sort_keys=True)] = one
  return ' '.join(
      f'Evaluated in {one["precision"]} (matrix products in '
      f'{one["matmul_precision"]}{_attacks_in(one)}) on '
      f'{_counted(one["devices"])}, with '
      + ', '.join(f'{k} {one["versions"][k]}' for k in _PACKAGES) + '.'
      for one in found.values())


def _attacks_in(environment: dict[str, Any]) -> str:
  """The type of the attacks, if they used another."""
  dtype = environment.get('attack_dtype', environment['precision'])
  return '' if dtype == environment['precision'] else f', attacks in {dtype}'


def warnings(evaluation: dict[str, Any]) -> list[str]:
  """Warnings of an evaluation, one line each."""
  return [
      f'{kind}, {label}: {warning["message"]}'
      for kind, entry in evaluation.get('subjects', {}).items()
      for label, values in entry['evaluations'].items()
      for warning in values['warnings']]


def broken_images(evaluation: dict[str, Any]) -> list[tuple[str, Rows]]:
  """Which attack broke how many images, within and between evaluations.

  Args:
    evaluation: the contents of `evaluation.json`.

  Returns:
    Headings and tables.
  """
  tables = []
  for kind, entry in evaluation.get('subjects', {}).items():
    broken = {
        label: {index for a in values['attacks'] for index in a['broken']}
        for label, values in entry['evaluations'].items()}
    for label, values in entry['evaluations'].items():
      if len(values['attacks']) > 1:
        rows = [['attack', 'broken', 'robust after', 'seconds']]
        rows += [
            [a['name'], str(len(a['broken'])),
             _percent(a['robust_accuracy_after']), f'{a["seconds"]:.0f}']
            for a in values['attacks']]
        tables.append((f'Images broken by {label} ({kind})', rows))
    if len(broken) > 1:
      rows = [['broken by', *(f'not by {other}' for other in broken), 'total']]
      rows += [
          [label, *('' if other == label else str(len(mine - theirs))
                    for other, theirs in broken.items()), str(len(mine))]
          for label, mine in broken.items()]
      tables.append((
          f'Images broken by one evaluation, not by another ({kind})', rows))
  return tables


def flatness(records: dict[str, dict[str, Any]]) -> Rows:
  """Robust loss at the weights and its mean rise around them."""
  rows = [['model', 'images', 'robust loss', 'mean rise, random',
           'mean rise, adversarial']]
  for name, values in records.items():
    for kind, entry in values.get('subjects', {}).items():
      for split in ('train', 'test'):
        part = entry['random'][split]
        losses = part['robust_loss']['mean']
        worst = entry.get('adversarial', {}).get(split, {}).get('mean_rise')
        rows.append([
            kind if len(records) == 1 else f'{name}, {kind}', split,
            _number(losses[len(losses) // 2]), _rise(part['mean_rise']),
            _rise(worst) if worst else ''])
  return rows


def _number(value: float | None) -> str:
  return 'non-finite' if value is None else f'{value:.4f}'


def _rise(values: dict[str, Any]) -> str:
  spread = values['std']
  return _number(values['mean']) + (
      '' if spread is None else f' ± {spread:.4f}')


def facts(run: run_lib.Run, summary: dict[str, Any]) -> Rows:
  """Data, devices, times and versions of a run."""
  dataset = run.dataset
  rows = [
      ['', ''],
      ['data', f'{dataset.name}: {len(dataset.y_train)} training and '
       f'{len(dataset.y_test)} test images, {dataset.num_classes} classes, '
       f'{" x ".join(map(str, dataset.x_train.shape[1:]))}'],
      ['source', dataset.source]]
  if summary:
    rows += [
        ['devices', _counted(summary['devices'])],
        ['time', f'{summary["seconds"]:.0f} s; '
         f'{summary["images_per_second"]:.0f} images/s in training'],
        ['versions', ', '.join(
            f'{k} {v}' for k, v in summary['versions'].items())]]
  else:
    rows.append(['versions (of this report)', ', '.join(
        f'{k} {v}' for k, v in environment.versions().items())])
  return rows


def _counted(kinds: list[str]) -> str:
  return ', '.join(
      f'{kinds.count(kind)} x {kind}' for kind in dict.fromkeys(kinds))
