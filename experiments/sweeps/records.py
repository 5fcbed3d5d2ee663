"""Reads the runs of a sweep and groups them for the table."""

from collections.abc import Sequence
import importlib
import json
import pathlib
from typing import Any, NamedTuple

from experiments.config import schema
from experiments.reports import comparison
from experiments.runs import metrics, reading, workdirs
from experiments.sweeps import flags, jobs, published, runner
from experiments.util import atomic, paths
from experiments.util.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


class Record(NamedTuple):
  """One run of the table.

  Attributes:
    name: of its folder.
    label: of its config.
    seed: of the run.
    state: its state.
    config: its fields by dotted name; empty if it never started.
    lines: of its `metrics.jsonl`.
    measured: from `measure`; empty before the first evaluation.
    left_out: why its AutoAttack result is not in the table, or ''.
    varied: fields that distinguish it from other runs of the config.
  """

  name: str
  label: str
  seed: int
  state: runner.State
  config: dict[str, Any]
  lines: list[dict[str, Any]]
  measured: dict[str, float]
  left_out: str = ''
  varied: jobs.Varied = ()

  @property
  def row(self) -> str:
    """The name of its row in the table."""
    return jobs.row_name(self.label, self.varied)


def read(workdir: paths.Path, name: str) -> Record:
  """Reads a run, which may be unfinished.

  Args:
    workdir: of the table.
    name: of the run's folder in it.

  Returns:
    The record.

  Raises:
    UserError: if the name is not that of a run, or names another seed or other
      values than the run's config.
  """
  parsed = jobs.parse_name(name)
  if parsed is None:
    raise UserError(f'{name!r} is not the name of a run, such as "x_at-seed0".')
  config = workdirs.read_fields(workdir / name)
  if config:
    config = workdirs.with_defaults(config)
    if config['seed'] != parsed.seed:
      raise UserError(
          f'{workdir / name} must hold a run of seed {parsed.seed}, as its '
          f'name says, got seed {config["seed"]!r}: rename it, or train with '
          f'--config.seed={parsed.seed}.')
    for field, value in flags.parse_flags(
        flags.flags_of(parsed.varied)).items():
      if not flags.is_same(field, value, config.get(field)):
        raise UserError(
            f'{workdir / name} must hold a run with {field}={value!r}, as its '
            f'name says, got {config.get(field)!r}: rename it.')
  lines = metrics.read_metrics(workdir / name)
  state = runner.state_of(workdir, name)
  changed_lines = metrics.changed_epochs(
      lines, atomic.read_json(workdir / name / 'summary.json'))
  if changed_lines:
    state = runner.State(
        'failed', state.epochs, 'metrics.jsonl was damaged, in the lines of '
        f'epochs {", ".join(map(str, changed_lines))}')
  return Record(
      name, parsed.label, parsed.seed, state, config, lines,
      {} if changed_lines else measure(lines, config, workdir / name),
      read_autoattack(workdir / name)[1], parsed.varied)


def measure(
    lines: Sequence[dict[str, Any]], config: dict[str, Any],
    folder: paths.Path) -> dict[str, float]:
  """Computes the table's values of a run, which may be unfinished.

  Args:
    lines: of its `metrics.jsonl`.
    config: its fields by dotted name.
    folder: its folder, which may contain an `evaluation.json`.

  Returns:
    'best', 'final' (at the last evaluation), 'fall' (from best to final, unless
    all evaluations are suspected of a collapse), 'last' (the mean of the last
    six evaluations), 'natural' (at the best epoch), 'gap' and, if evaluated,
    'autoattack', in percent; 'seconds_per_step' and 'seconds_per_epoch' of
    training. Empty before the first evaluation.
  """
  if not metrics.evaluated(lines):
    return {}
  values = metrics.accuracies(lines, config['select_on'])
  best, last = values['best'], values['last']
  seconds = sum(line['seconds_training'] for line in lines)
  steps = metrics.num_steps(lines, config['batch_size'])
  measured = {
      'best': 100 * best['robust_accuracy'],
      'final': 100 * last['robust_accuracy'],
      'last': 100 * last['mean_of_last_6'],
      'natural': 100 * best['natural_accuracy'],
      'gap': 100 * values['robust_generalisation_gap'],
      'seconds_per_step': seconds / steps,
      'seconds_per_epoch': seconds / len(lines)}
  if not all(line.get('suspicious') for line in metrics.evaluated(lines)):
    measured['fall'] = measured['best'] - measured['final']
  autoattack, _ = read_autoattack(folder)
  return measured | ({} if autoattack is None else {'autoattack': autoattack})


def read_autoattack(folder: paths.Path) -> tuple[float | None, str]:
  """Robust accuracy of the best checkpoint under the standard AutoAttack.

  Args:
    folder: of a run.

  Returns:
    Percent on all test images, or None; and the reason why an existing
    evaluation does not count, or ''.
  """
  try:
    evaluation = atomic.read_json(folder / 'evaluation.json')
  except UserError:
    return None, 'evaluation.json is damaged'
  if not evaluation:
    return None, ''
  subject = evaluation['subjects'].get('best', {})
  evaluations = subject.get('evaluations', {})
  entry = evaluations.get('aa-standard')
  if subject.get('origin', {}).get('checkpoint') != 'best':
    return None, ''
  if entry is None:
    return None, (
        'AutoAttack attacked in bfloat16 only'
        if 'aa-standard-bfloat16' in evaluations else '')
  step = reading.Reader(folder, 'best').step()
  if step is not None and subject['origin']['step'] != step:
    return None, (
        f'AutoAttack evaluated step {subject["origin"]["step"]}, but the best '
        f'checkpoint is now step {step}')
  count, whole = evaluation['num_examples'], evaluation['dataset']['num_test']
  if count != whole:
    return None, f'AutoAttack evaluated only {count} of {whole} test images'
  return 100 * entry['robust']['accuracy'], ''


def published_for(run: Record) -> dict[str, Any] | None:
  """The published accuracies of a run's config; None for varied fields."""
  return None if run.varied else published.find(run.label)


def changed(run: Record) -> dict[str, Any]:
  """Fields in which a run differs from the current config of that name.

  Args:
    run: of a config in `experiments/configs`; for any other, the result is
      empty.

  Returns:
    The run's values of these fields, except varied fields, the seed and fields
    that do not affect results.
  """
  stem, _, argument = run.label.partition(':')
  if not (CONFIGS / f'{stem}.py').is_file():
    return {}
  module = importlib.import_module(f'experiments.configs.{stem}')
  try:
    current = module.get_config(*filter(None, [argument]))
  except (TypeError, ValueError):  # no such argument
    return {}
  fields = json.loads(json.dumps(schema.flatten(current)))
  return {
      name: value for name, value in result_fields(run.config).items()
      if name in fields and value != fields[name]
      and name not in dict(run.varied)}


def result_fields(config: dict[str, Any]) -> dict[str, Any]:
  """The fields that affect results, without the seed."""
  return {
      name: value for name, value in config.items()
      if name not in ('seed', *workdirs.FREE_FIELDS)
      and not name.startswith(workdirs.FREE_GROUPS)}


def group(records: Sequence[Record]) -> dict[str, list[Record]]:
  """Groups finished runs by config; every other run is its own group."""
  finished = [record for record in records if record.state.kind == 'finished']
  by_name = {record.name: record for record in records}
  groups = comparison.group_by_config([
      {'name': record.row, 'record': record.name,
       'config': {'': record.row, **result_fields(record.config)}}
      for record in finished])
  merged = {
      name: [by_name[run['record']] for run in runs]
      for name, runs in groups.items()}
  return merged | {
      f'{record.row}, seed {record.seed}': [record]
      for record in records if record not in finished}
