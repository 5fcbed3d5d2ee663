"""Evaluates a finished run, or a PyTorch checkpoint, with strong attacks.

Every evaluation in the config's list starts from all test images; see
`experiments.evaluation.attacks`. A process that was killed resumes after the
last finished group of examples and gets the same result.
"""

import math
import pathlib
from typing import Any

import ml_collections

from awp_jax.core import checks
from experiments.data import datasets
from experiments.evaluation import attacks
from experiments.parallel import processes
from experiments.runs import precision, restore
from experiments.runs import run as run_lib
from experiments.util import atomic, console, named, paths
from experiments.util.errors import user_errors


@user_errors()
def check(config: ml_collections.ConfigDict, workdir: paths.Path) -> None:
  """Raises ValueError if the evaluation cannot run; reads no data."""
  settings = config.evaluation
  attacks.check_names(settings.attacks)
  for name in settings.attacks:
    if named.is_external(name):  # before hours of other attacks
      attacks.make_specs(name, config)
  checks.count('evaluation.num_examples', settings.num_examples, minimum=0)
  checks.count('evaluation.batch_size', settings.batch_size, minimum=0)
  checks.one_of('evaluation.attack_dtype', settings.attack_dtype,
                precision.ATTACK_DTYPES)
  _check_curve(settings, workdir)
  path = settings.torch_checkpoint
  if path and not pathlib.Path(path).is_file():
    raise ValueError(
        f'evaluation.torch_checkpoint={path!r}: there is no such file.')
  if not path and not (workdir / 'checkpoints').is_dir():
    raise ValueError(
        f'{str(workdir)!r} holds no checkpoints: train there first, or pass a '
        'PyTorch file with --config.evaluation.torch_checkpoint.')
  atomic.read_json(workdir / 'evaluation.json')  # before the attacks


def _check_curve(settings: Any, workdir: paths.Path) -> None:
  """Raises ValueError if the curve over epsilon cannot be measured."""
  radii = tuple(settings.epsilons)
  if not radii:
    return
  if not all(isinstance(radius, int | float) and 0 < radius < math.inf
             for radius in radii) or sorted(set(radii)) != list(radii):
    raise ValueError(
        f'evaluation.epsilons must be rising numbers > 0, got {radii!r}.')
  attacks.check_names(settings.curve_attacks)
  if processes.count() > 1 or paths.is_bucket(workdir):
    raise ValueError(
        'evaluation.epsilons needs one process and a local workdir, got '
        f'{processes.count()} and {str(workdir)!r}.')


def evaluate(run: run_lib.Run) -> dict[str, Any]:
  """Evaluates the models of a run and writes `evaluation.json`.

  Args:
    run: from `run.reopen`. Its workdir holds checkpoints unless the config
      sets a PyTorch checkpoint. The run may still be training.

  Returns:
    The contents of `evaluation.json`: per model its natural accuracy; per
    evaluation the robust accuracy (fractions, with 95 % Wilson intervals),
    seconds, the examples that each attack broke, the largest distance,
    warnings, and the precision, devices and versions used. If the best and the
    last checkpoint have the same weights, they are attacked once. Evaluations
    of earlier calls are kept if model, images and threat model are the same.

  Raises:
    ValueError: for a checkpoint that cannot be read.
  """
  config = run.config
  test_set = attacks.load_test_set(run)
  subjects: dict[str, Any] = {}
  names: dict[str, str] = {}
  for model in restore.restore_models(run):
    processes.check_equal(f'the {model.name} model', model.facts)
    weights = model.facts['weights']
    if weights in names:
      # Best and last are the same: evaluate once, report twice.
      same = names[weights]
      subjects[model.name] = subjects[same] | {
          'origin': model.origin, 'same_weights_as': same}
      continue
    names[weights] = model.name
    subjects[model.name] = attacks.evaluate_model(run, model, test_set)
  num_examples = len(test_set[1])
  values = {
      'threat': config.threat.to_dict(), 'num_examples': num_examples,
      'dataset': datasets.describe(run.dataset), 'seed': config.seed,
      'subjects': subjects}
  processes.on_main(lambda: _write(values, run.workdir / 'evaluation.json'))
  height, width = run.dataset.x_test.shape[1:3]
  print(f'\n{run.dataset.name}, {height} x {width} pixels, '
        f'{config.threat.norm}, epsilon {config.threat.epsilon:.4f}, '
        f'{num_examples} test images, evaluated in {precision.PRECISION}\n')
  print(_table(subjects))
  return values


def _write(values: dict[str, Any], path: paths.Path) -> None:
  _keep_others(values, path)
  atomic.write_json(path, values)


def _keep_others(values: dict[str, Any], path: paths.Path) -> None:
  """Adds earlier evaluations of these and other models on the same images."""

  def facts(values: dict[str, Any]) -> dict[str, Any]:
    # The path of the images does not identify them.
    dataset = {name: value for name, value in values['dataset'].items()
               if name != 'source'}
    return {**values, 'dataset': dataset, 'subjects': None}

  before = atomic.read_json(path)
  if not before or facts(before) != facts(values):
    return
  for name, entry in values['subjects'].items():
    old = before['subjects'].get(name, {})
    if old.get('weights') == entry['weights']:
      entry['evaluations'] = {
          **old['evaluations'], **entry['evaluations']}
      if 'curve' in old:
        entry.setdefault('curve', old['curve'])
  values['subjects'] = {**before['subjects'], **values['subjects']}


def _curve_rows(
    entry: dict[str, Any]) -> list[tuple[str, dict[str, Any], float]]:
  """The curve over epsilon of a model, as rows of the table."""
  curve = entry.get('curve')
  if curve is None:
    return []
  return [(f'epsilon {epsilon:.4g}',
           {'accuracy': share, 'interval_95': interval}, seconds)
          for epsilon, share, interval, seconds in zip(
              curve['epsilons'], curve['robust_accuracy'],
              curve['interval_95'], curve['seconds'], strict=True)]


def _table(subjects: dict[str, Any]) -> str:
  rows = [['model', 'evaluation', 'accuracy', '95 % interval', 'seconds']]
  for name, entry in subjects.items():
    lines = [('natural', entry['natural'], 0.0)] + [
        (label, values['robust'], values['seconds'])
        for label, values in entry['evaluations'].items()]
    lines += _curve_rows(entry)
    for label, values, seconds in lines:
      low, high = (100 * bound for bound in values['interval_95'])
      rows.append([
          name, label, f'{100 * values["accuracy"]:.2f} %',
          f'{low:.2f} - {high:.2f}', f'{seconds:.0f}'])
  return console.table(rows)
