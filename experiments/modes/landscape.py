"""Measures the weight loss landscape of finished runs and draws it.

For the best and the last checkpoint; see `experiments.evaluation.landscape`.
Measured points are on disk. A process that was killed resumes after the last
one, and a larger number of directions measures only the new ones.
"""

from collections.abc import Sequence
import functools
import os
from typing import Any

import jax
import ml_collections

from awp_jax.core import checks
from experiments.data import datasets
from experiments.evaluation import landscape, landscape_records
from experiments.parallel import processes
from experiments.reports import flatness, page, panels, tables
from experiments.runs import restore, workdirs
from experiments.runs import run as run_lib
from experiments.util import atomic, console, digests, paths
from experiments.util.errors import UserError, user_errors


@user_errors()
def check(config: ml_collections.ConfigDict, workdir: paths.Path) -> None:
  """Raises ValueError if the landscape cannot be measured; reads no data."""
  settings = config.landscape
  for name in ('num_directions', 'num_steps'):
    checks.count(f'landscape.{name}', settings[name])
  for name in ('num_train', 'num_test', 'batch_size', 'seed'):
    checks.count(f'landscape.{name}', settings[name], minimum=0)
  checks.positive('landscape.range', settings.range)
  checks.not_negative(
      'landscape.adversarial_range', settings.adversarial_range)
  for name, least in (('points', 3), ('plane_points', 0)):
    value = settings[name]
    checks.count(f'landscape.{name}', value, minimum=least)
    if value and (value < 3 or value % 2 == 0):
      raise ValueError(
          f'landscape.{name} must be an odd number >= 3, so that the model '
          f'itself is one of the points, got {value}.')
  if settings.plane_points and settings.num_directions < 2:
    raise ValueError(
        'landscape.plane_points needs landscape.num_directions >= 2, got '
        f'{settings.num_directions}; plane_points=0 skips the plane.')
  if not (workdir / 'checkpoints').is_dir():
    raise ValueError(
        f'{str(workdir)!r} holds no checkpoints: train there first.')


def measure(run: run_lib.Run) -> dict[str, Any]:
  """Measures the landscape of a run's checkpoints; writes `landscape.json`.

  Args:
    run: from `run.reopen`. Its workdir holds checkpoints; the run may still be
      training.

  Returns:
    The contents of `landscape.json`: per checkpoint, for 'random' (mean,
    standard deviation and each direction) and 'adversarial', the metrics on
    training and test images at `alphas`; `mean_rise` of the robust loss (see
    `awp_jax.mean_rise`); the 'plane', one row per coordinate along the first
    direction; and the precision, devices and versions used. Non-finite numbers
    are null.

  Raises:
    ValueError: for a checkpoint that cannot be read.
  """
  settings, images = run.config.landscape, landscape.select_images(run)
  counts = {split: len(labels) for split, (_, labels) in images.items()}
  batch_size = landscape.choose_batch_size(run, max(counts.values()))
  subjects: dict[str, Any] = {}
  for kind, step, variables in restore.load_variables(run):
    digest = digests.of_values(
        landscape.record_facts(run, variables, images, batch_size))
    processes.check_equal(
        f'the {kind} checkpoint', {'step': step, 'digest': digest})
    records = landscape_records.Records(
        run.workdir / 'landscape' / f'step-{step}-{digest}.jsonl')
    checkpoint = landscape.Checkpoint(
        run, variables, images, batch_size, jax.random.key(settings.seed))
    label = f'{run.workdir.name} {kind}'
    found = landscape.measure_checkpoint(checkpoint, records, label)
    subjects[kind] = {'step': step} | landscape.summarize(found, settings) | {
        'judged_by': records.judged_by}
    share = max(
        point['nonfinite'] for points in found.values() for point in points)
    if share:
      print(f'{label}: up to {100 * share:.2f} % of the images at a point had '
            'non-finite logits or gradients. The attack is weaker there, so '
            'the robust loss is too low.', flush=True)
  values = {
      'threat': run.config.threat.to_dict(),
      'attack': {'step_size': run.config.attack.step_size,
                 'num_steps': settings.num_steps},
      'images': counts, 'settings': settings.to_dict(),
      'dataset': datasets.describe(run.dataset), 'subjects': subjects}
  processes.on_main(
      lambda: atomic.write_json(run.workdir / 'landscape.json', values))
  return values


def run_all(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str],
    compare_to: Sequence[str], *, is_trusted: bool = False) -> None:
  """Measures the landscapes of one or more runs and prints their flatness.

  Args:
    config: of the run in `workdir`; its group `landscape` applies to all runs.
    workdir: the run's folder.
    compare_to: folders of other runs, which hold their own configs.
    is_trusted: whether these may name parts of other packages that `config`
      does not name.

  Raises:
    ValueError: for wrong settings or folders, before anything is measured.
  """
  folders = [paths.parse(path) for path in (workdir, *compare_to)]
  if len({paths.absolute(folder) for folder in folders}) < len(folders):
    raise UserError('--compare_to contains a workdir twice.')
  configs = [config]
  for folder in folders:
    check(config, folder)
  for folder in folders[1:]:
    configs.append(workdirs.stored_config(
        folder, config, is_trusted=is_trusted))
  landscapes = {}
  for folder, run_config in zip(folders, configs, strict=True):
    run = run_lib.reopen(run_config, folder)
    name = folder.name if folder.name not in landscapes else str(folder)
    landscapes[name] = measure(run)
    processes.on_main(functools.partial(page.write_or_warn, run, 'landscape'))
  print(f'\n{console.table(tables.flatness(landscapes))}\n')
  if len({flatness.problem(values) for values in landscapes.values()}) > 1:
    print('The runs differ in threat model, attack or data, so their curves '
          'are not comparable.\n')
  if len(landscapes) > 1:
    together = folders[0] / 'figures' / 'landscapes'
    processes.on_main(lambda: panels.landscapes(together, landscapes))
    print(f'all runs in one figure: {together}')
  print(f'results: {folders[0] / "landscape.json"} and report.html')
