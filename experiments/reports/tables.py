"""The tables of reports: rows of cells, the first row the head."""

import json
from typing import Any

from experiments.runs import run as run_lib
from experiments.util import environment

Rows = list[list[str]]

#: The packages that compute what is judged.
_JUDGING = ('awp_jax', 'jax', 'jaxlib')


def _per_cent(value: float) -> str:
  return f'{100 * value:.2f}\N{NO-BREAK SPACE}%'


def tiles(
    summary: dict[str, Any], evaluation: dict[str, Any]
) -> list[tuple[str, str, str]]:
  """A run's key numbers: label, value, note."""
  found = []
  if summary:
    best, last = summary['best'], summary['last']
    found += [
        ('robust, best', _per_cent(best['robust_accuracy']),
         f'epoch {best["epoch"]}, natural '
         f'{_per_cent(best["natural_accuracy"])}'),
        ('robust, last', _per_cent(last['robust_accuracy']),
         f'epoch {last["epoch"]}, mean of last six '
         f'{_per_cent(last["mean_of_last_6"])}'),
        ('natural, last', _per_cent(last['natural_accuracy']), 'test images'),
        ('robust gap, last',
         f'{100 * summary["robust_generalisation_gap"]:.2f}',
         'points, training less test')]
    if share := max(best.get('nonfinite', 0), last.get('nonfinite', 0)):
      found.append((
          'not finite', _per_cent(share), 'of the test images have logits or '
          'gradients that are not finite: robust accuracy is too high'))
  for kind, entry in evaluation.get('subjects', {}).items():
    weakest = min(
        entry['evaluations'].items(),
        key=lambda item: item[1]['robust']['accuracy'])
    low, high = weakest[1]['robust']['interval_95']
    found.append((
        f'{weakest[0]}, {kind}', _per_cent(weakest[1]['robust']['accuracy']),
        f'the strongest attack here; {100 * low:.1f} to {100 * high:.1f} %'))
  return found


def attacks(records: dict[str, dict[str, Any]]) -> Rows:
  """Accuracies with intervals, a row for each evaluation and checkpoint."""
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
            which, label, _per_cent(result['accuracy']),
            f'{low:.2f} to {high:.2f}',
            '' if seconds is None else f'{seconds:.0f}'])
  return rows


def judges(values: dict[str, Any]) -> str:
  """Who judged what an evaluation or a landscape shows, in a sentence.

  Args:
    values: the contents of `evaluation.json` or `landscape.json`.

  Returns:
    Precision, devices and versions; each combination of them once.
  """
  found = {}
  for entry in values.get('subjects', {}).values():
    for part in (entry, *entry.get('evaluations', {}).values()):
      for judge in part.get('judged_by', ()):
        found[json.dumps(judge, sort_keys=True)] = judge
  return ' '.join(
      f'Judged in {judge["precision"]} (matrix products in '
      f'{judge["matmul_precision"]}) on {_counted(judge["devices"])}, with '
      + ', '.join(f'{k} {judge["versions"][k]}' for k in _JUDGING) + '.'
      for judge in found.values())


def warnings(evaluation: dict[str, Any]) -> list[str]:
  """Reasons to doubt an evaluation, in words."""
  return [
      f'{kind}, {label}: {warning["message"]}'
      for kind, entry in evaluation.get('subjects', {}).items()
      for label, values in entry['evaluations'].items()
      for warning in values['warnings']]


def who_broke_what(evaluation: dict[str, Any]) -> list[tuple[str, Rows]]:
  """A heading and a table each: inside lists of attacks, and between them."""
  tables = []
  for kind, entry in evaluation.get('subjects', {}).items():
    broken = {
        label: {index for a in values['attacks'] for index in a['broken']}
        for label, values in entry['evaluations'].items()}
    for label, values in entry['evaluations'].items():
      if len(values['attacks']) > 1:
        rows = [['attack', 'broke', 'stand after it', 'seconds']]
        rows += [
            [a['name'], str(len(a['broken'])),
             _per_cent(a['robust_accuracy_after']), f'{a["seconds"]:.0f}']
            for a in values['attacks']]
        tables.append((f'Who broke what in {label} ({kind})', rows))
    if len(broken) > 1:
      rows = [['broken by', *(f'not by {other}' for other in broken), 'in all']]
      rows += [
          [label, *('' if other == label else str(len(mine - theirs))
                    for other, theirs in broken.items()), str(len(mine))]
          for label, mine in broken.items()]
      tables.append((f'Images that one breaks and another does not ({kind})',
                     rows))
  return tables


def flatness(records: dict[str, dict[str, Any]]) -> Rows:
  """Robust loss at the model and its mean rise around it."""
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
  return 'not finite' if value is None else f'{value:.4f}'


def _rise(values: dict[str, Any]) -> str:
  spread = values['std']
  return _number(values['mean']) + (
      '' if spread is None else f' ± {spread:.4f}')


def facts(run: run_lib.Run, summary: dict[str, Any]) -> Rows:
  """Data, devices and versions of a run."""
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
    rows.append(['versions of this page', ', '.join(
        f'{k} {v}' for k, v in environment.versions().items())])
  return rows


def _counted(kinds: list[str]) -> str:
  return ', '.join(
      f'{kinds.count(kind)} x {kind}' for kind in dict.fromkeys(kinds))
