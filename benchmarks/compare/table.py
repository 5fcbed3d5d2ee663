"""Markdown of the records: times, and ratios with minimum and maximum."""

from collections.abc import Callable, Sequence
import statistics
from typing import Any

from benchmarks.compare import cases
from benchmarks.compare.cases import Case

Record = dict[str, Any]
#: Rounds of a case by implementation.
Rounds = dict[str, dict[int, Record]]

COLUMNS = (
    'task', 'width', 'batch', 'precision', 'implementation', 'median',
    'min', 'max', 'calls', 'first call', 'times awp_jax (min - max)')


def spread(values: Sequence[float], digits: int = 2) -> str:
  """Median, and minimum and maximum in parentheses."""
  shown = [f'{v:.{digits}f}' for v in (
      statistics.median(values), min(values), max(values))]
  return f'{shown[0]} ({shown[1]} - {shown[2]})'


def grouped(records: Sequence[Record]) -> dict[Case, Rounds]:
  """The last record of every round, by case and implementation."""
  found: dict[Case, Rounds] = {}
  for record in records:
    rounds = found.setdefault(Case(**record['case']), {})
    rounds.setdefault(record['implementation'], {})[record['round']] = record
  return found


def ratios(
    rounds: Rounds, rivals: Sequence[str], task: str) -> list[float]:
  """The rivals' time divided by ours, of every round that all measured.

  Args:
    rounds: of one case.
    rivals: implementations with the same opponent; the fastest one counts.
    task: of the case.

  Returns:
    A ratio of medians for every round; above 1, ours is faster.
  """
  ours = rounds.get(cases.opponent(rivals[0], task) or '', {})
  both = [n for n in sorted(ours) if 'seconds' in ours[n] and all(
      'seconds' in rounds.get(rival, {}).get(n, {}) for rival in rivals)]

  def median(record: Record) -> float:
    return statistics.median(record['seconds'][task])

  return [min(median(rounds[rival][n]) for rival in rivals) / median(ours[n])
          for n in both]


def _cells(case: Case) -> list[str]:
  return [case.task, str(case.width or '-'), str(case.batch_size),
          case.precision]


def _row(case: Case, name: str, rounds: Rounds) -> list[str] | None:
  """The cells of one implementation; None if it has no times."""
  found = [r for _, r in sorted(rounds[name].items()) if 'seconds' in r]
  if not found:
    return None
  seconds = [s for r in found for s in r['seconds'][case.task]]
  first = [r['first_call'] for r in found if 'first_call' in r]
  compared = [] if cases.opponent(name, case.task) is None else (
      ratios(rounds, [name], case.task))
  return [
      *_cells(case), cases.TITLES[name],
      *(f'{f(seconds):.3f} s' for f in (statistics.median, min, max)),
      str(len(seconds)), f'{first[0]:.1f} s' if first else '-',
      spread(compared) if compared else '-']


def _best(case: Case, rounds: Rounds) -> list[str] | None:
  """The faster of the two PyTorch steps, in every round."""
  found = ratios(rounds, (cases.TUNED, cases.COMPILED), case.task)
  if not found:
    return None
  return [*_cells(case), 'PyTorch, the faster one', *'-----', spread(found)]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [columns, ['---'] * len(columns), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _overhead(groups: dict[Case, Rounds]) -> list[list[str]]:
  rows = []
  for case, rounds in groups.items():
    found = [r['seconds'] for r in rounds.get(cases.OURS, {}).values()
             if case.task == cases.OVERHEAD and 'seconds' in r]
    if not found:
      continue
    plain, full = (
        [s for r in found for s in r[name]] for name in ('at', 'at-awp'))
    added = [100 * (b / a - 1) for a, b in zip(plain, full, strict=True)]
    # A forward pass counts 1, a gradient of inputs or of weights 1 as well.
    steps = case.num_steps or cases.SETTINGS['at'].num_steps
    rows.append([
        str(case.width), str(case.batch_size), case.precision,
        f'{statistics.median(plain):.3f} s', f'{statistics.median(full):.3f} s',
        spread(added, 1), str(len(added)), f'{300 / (2 * steps + 3):.1f}'])
  return rows


def _listed(
    records: Sequence[Record], of: Callable[[Record], str]) -> str:
  return '; '.join(sorted({of(record) for record in records} - {''}))


def _head(records: Sequence[Record]) -> list[str]:
  """Date, machine, versions, flags, commit."""
  def processor(record: Record) -> str:
    found = record['machine']
    return (f'{found["cores"]} cores of {found["cpu"]} '
            f'({", ".join(found["instructions"])})')

  def versions(record: Record) -> str:
    return ', '.join(f'{k} {v}' for k, v in record['versions'].items())

  def flags(record: Record) -> str:
    return ' '.join(f'{k}="{v}"' for k, v in record['variables'].items())

  lines = {
      'Date': _listed(records, lambda r: r['date'][:10]),
      'Machine': _listed(records, processor),
      'Versions': _listed(records, versions),
      'Commit': _listed(records, lambda r: r['revision']),
      'Load before the run': _listed(records, lambda r: f'{r["load"]:.1f}'),
      'Flags of awp_jax': _listed(records, flags)}
  return [f'* {name}: {value}' for name, value in lines.items() if value]


def markdown(
    records: Sequence[Record], skipped: Sequence[str] = ()) -> str:
  """The whole report.

  Args:
    records: of all rounds, oldest first.
    skipped: what was not measured, and why.

  Returns:
    Markdown.
  """
  groups, rows, errors = grouped(records), [], list(skipped)
  for case, rounds in groups.items():
    for name in cases.IMPLEMENTATIONS if case.task != cases.OVERHEAD else ():
      row = _row(case, name, rounds) if name in rounds else None
      rows += [row] if row else []
    best = _best(case, rounds)
    rows += [best] if best else []
    errors += [
        f'{" ".join(_cells(case))}, {cases.TITLES[name]}: {record["error"]}'
        for name, found in rounds.items() for record in found.values()
        if 'error' in record]
  parts = ['\n'.join(_head(records)), _markdown(COLUMNS, rows)] if rows else []
  robust = [
      f'{cases.TITLES[name]} {record["robust"]} of {case.batch_size}'
      for case, rounds in groups.items() for name, found in rounds.items()
      for record in found.values() if 'robust' in record]
  if robust:
    parts.append('Robust under AutoAttack `fast`: ' + '; '.join(
        dict.fromkeys(robust)) + '.')
  overhead = _overhead(groups)
  if overhead:
    parts.append('What AWP adds to AT, in turns in one process:\n\n' + (
        _markdown(('width', 'batch', 'precision', 'AT', 'AT-AWP',
                   'added, % (min - max)', 'turns', 'by counting passes, %'),
                  overhead)))
  if errors:
    parts.append('Not measured:\n\n' + '\n'.join(
        '* ' + ' '.join(text.split()) for text in errors))
  return '\n\n'.join(parts)
