"""The weight loss landscape of finished runs: numbers, and the paper's figure.

For the best and the last checkpoint: natural and robust loss and accuracy along
random directions and along the weight adversary's, on training and on test
images, and over the plane of the first two random directions on training
images. What is measured is on disk point by point, so a process killed at any
moment and started again goes on behind the last point, and asking for more
directions measures the new ones only.
"""

from collections.abc import Callable, Sequence
import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import awp_jax
from awp_jax import landscape
from awp_jax.core import checks, loops
from experiments.data import batches, datasets
from experiments.evaluation import landscape_records, probe
from experiments.reports import page, panels, tables
from experiments.runs import precision, restore, workdirs
from experiments.runs import run as run_lib
from experiments.util import atomic, console, digests
from experiments.util.errors import UserError, user_errors


@user_errors()
def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Raises ValueError for what cannot be measured, before data are read."""
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
        f'{settings.num_directions}; plane_points=0 leaves the plane out.')
  if not (workdir / 'checkpoints').is_dir():
    raise ValueError(
        f'{str(workdir)!r} holds no checkpoints: train there first.')


@functools.lru_cache
def _measure(
    model: Any, threat: awp_jax.ThreatModel, step_size: float,
    num_steps: int) -> landscape.Measure:
  """One object for equal networks, so that AT and AT-AWP compile once."""
  measure = landscape.robust_measure(
      functools.partial(precision.logits, model), threat, step_size=step_size,
      num_steps=num_steps)

  def of_pixels(variables: Any, batch: Any, key: Any) -> dict[str, Any]:
    images, labels = batch
    pixels = batches.to_pixels(images, jnp.dtype(jnp.float32))
    return measure(variables, (pixels, labels), key)

  return of_pixels


class _Subject(NamedTuple):
  """A checkpoint, the images, and how they are measured."""

  run: run_lib.Run
  variables: dict[str, Any]
  images: dict[str, tuple[np.ndarray, np.ndarray]]
  batch_size: int
  key: Any

  def directions(self, name: str) -> list[Any]:
    """The directions of a series: of the parameters, zero elsewhere."""
    if name == 'adversarial':
      return [self._complete(self._adversarial())]
    numbers = [0, 1] if name == 'plane' else [int(name.partition('-')[2])]
    return [
        self._complete(landscape.random_direction(
            jax.random.fold_in(self.key, number), self.variables['params']))
        for number in numbers]

  def _complete(self, direction: Any) -> dict[str, Any]:
    zeros = jax.tree.map(jnp.zeros_like, self.variables)
    return {**zeros, 'params': direction}

  def _adversarial(self) -> Any:
    config = self.run.config
    gradient = probe.robust_gradient(
        self.key, precision.network(self.run.model), self.variables,
        *self.images['train'],
        self.run.setup.threat, step_size=config.attack.step_size,
        num_steps=config.landscape.num_steps, batch_size=self.batch_size)
    return landscape.filter_normalize(
        gradient, self.variables['params'], norm='layer')

  def measure(
      self, series: landscape_records.Series, points: list[list[float]],
      progress: Callable[[int, dict[str, float]], None]) -> None:
    """Measures points of a series."""
    config = self.run.config
    measure = _measure(
        precision.network(self.run.model), self.run.setup.threat,
        config.attack.step_size, config.landscape.num_steps)
    devices = jax.devices() if jax.device_count() > 1 else None
    landscape.evaluate_points(
        self.key, measure, self.variables, self.directions(series.name),
        points, self.images[series.split], batch_size=self.batch_size,
        devices=devices, progress=progress)


def _spread(count: int, wanted: int) -> np.ndarray:
  """`wanted` evenly spaced rows of `count`; all of them for 0."""
  wanted = min(wanted, count) or count
  return np.linspace(0, count - 1, wanted).astype(int)


def _images(run: run_lib.Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  dataset, settings = run.dataset, run.config.landscape
  train = _spread(len(dataset.y_train), settings.num_train)
  test = _spread(len(dataset.y_test), settings.num_test)
  return {'train': (dataset.x_train[train], dataset.y_train[train]),
          'test': (dataset.x_test[test], dataset.y_test[test])}


def _batch_size(run: run_lib.Run, largest: int) -> int:
  size = run.config.landscape.batch_size or (64 if loops.unrolls() else 512)
  size = min(size, largest)
  return -(-size // run.num_devices) * run.num_devices


def _facts(
    run: run_lib.Run, variables: Any, images: Any, batch_size: int
) -> dict[str, Any]:
  """All that the records of a checkpoint depend on beside the points."""
  return restore.network_facts(run) | {
      'weights': digests.of_arrays(variables),
      'threat': run.config.threat.to_dict(),
      'step_size': run.config.attack.step_size,
      'num_steps': run.config.landscape.num_steps,
      'seed': run.config.landscape.seed, 'batch_size': batch_size,
      'images': {
          split: digests.of_arrays(part) for split, part in images.items()},
      'precision': precision.PRECISION, 'awp_jax': awp_jax.__version__}


def _measure_subject(
    subject: _Subject, records: landscape_records.Records, label: str
) -> dict[tuple[str, str], list[dict[str, float]]]:
  """The values of all series of a checkpoint, by name and split."""
  series = landscape_records.make_series(subject.run.config.landscape)
  teller = landscape_records.Teller(label, sum(len(one.points) for one in series))
  found = {}
  try:
    for one in series:
      missing = [p for p in one.points if records.find(one, p) is None]
      teller.heard(len(one.points) - len(missing))

      def progress(
          number: int, means: dict[str, float], one: landscape_records.Series = one,
          missing: list[list[float]] = missing) -> None:
        records.append(one, missing[number], means)
        teller.heard(1)

      if missing:
        subject.measure(one, missing, progress)
      values = [records.find(one, point) for point in one.points]
      found[one.name, one.split] = [v for v in values if v is not None]
      teller.finished(one, found[one.name, one.split])
  finally:
    teller.close()
  return found


def _plain(value: Any) -> Any:
  """Numbers as JSON can hold them: what is not finite becomes null."""
  if isinstance(value, list | tuple | np.ndarray):
    return [_plain(part) for part in value]
  return float(value) if math.isfinite(value) else None


def _curves(
    values: Sequence[list[dict[str, float]]], alphas: list[float]
) -> dict[str, Any]:
  """Mean, spread and single curves of each metric over directions."""
  entry: dict[str, Any] = {}
  for metric in landscape_records.METRICS:
    table = np.array([[point[metric] for point in one] for one in values])
    entry[metric] = {
        'mean': _plain(table.mean(axis=0)),
        'std': _plain(table.std(axis=0, ddof=1)) if len(table) > 1 else None,
        'directions': _plain(table)}
  rises = [
      awp_jax.mean_rise(alphas, [point['robust_loss'] for point in one])
      for one in values]
  entry['mean_rise'] = {
      'mean': _plain(float(np.mean(rises))),
      'std': _plain(float(np.std(rises, ddof=1))) if len(rises) > 1 else None,
      'directions': _plain(rises)}
  return entry


def _entry(
    found: dict[tuple[str, str], list[dict[str, float]]],
    settings: ml_collections.ConfigDict) -> dict[str, Any]:
  """A checkpoint's entry in `landscape.json`."""
  alphas = landscape_records.coordinates(settings.range, settings.points)
  random: dict[str, Any] = {'alphas': alphas}
  for split in landscape_records.SPLITS:
    random[split] = _curves(
        [found[f'direction-{number}', split]
         for number in range(settings.num_directions)], alphas)
  entry: dict[str, Any] = {'random': random}
  if settings.adversarial_range:
    alphas = landscape_records.coordinates(
        settings.adversarial_range, settings.points)
    entry['adversarial'] = {'alphas': alphas} | {
        split: _curves([found['adversarial', split]], alphas)
        for split in landscape_records.SPLITS}
  if settings.plane_points:
    side = settings.plane_points
    entry['plane'] = {
        'alphas': landscape_records.coordinates(settings.range, side), 'train': {
            metric: _plain(np.reshape(
                [point[metric] for point in found['plane', 'train']],
                (side, side))) for metric in landscape_records.METRICS}}
  return entry


def measure(run: run_lib.Run) -> dict[str, Any]:
  """Measures the landscape of a run's checkpoints; writes `landscape.json`.

  Args:
    run: of `runs.reopen`, whose workdir holds checkpoints. It may be training.

  Returns:
    The contents of `landscape.json`: per checkpoint, for 'random' (mean,
    standard deviation and the single directions) and 'adversarial', the metrics
    on training and test images at `alphas`, `mean_rise` of the robust loss (see
    `awp_jax.mean_rise`), the 'plane' as rows of the first direction's
    coordinate, and the precision, devices and versions that judged. Numbers
    that are not finite are null.

  Raises:
    ValueError: for a checkpoint that cannot be read.
  """
  settings, images = run.config.landscape, _images(run)
  counts = {split: len(labels) for split, (_, labels) in images.items()}
  batch_size = _batch_size(run, max(counts.values()))
  subjects: dict[str, Any] = {}
  for kind, step, variables in restore.load_variables(run):
    digest = digests.of_values(_facts(run, variables, images, batch_size))
    records = landscape_records.Records(
        run.workdir / 'landscape' / f'step-{step}-{digest}.jsonl')
    subject = _Subject(
        run, variables, images, batch_size, jax.random.key(settings.seed))
    found = _measure_subject(subject, records, f'{run.workdir.name} {kind}')
    subjects[kind] = {'step': step} | _entry(found, settings) | {
        'judged_by': records.judged_by}
    share = max(
        point['nonfinite'] for points in found.values() for point in points)
    if share:
      print(f'{run.workdir.name} {kind}: up to {100 * share:.2f} % of a '
            "point's images had logits or gradients that are not finite. The "
            'attack is weaker there, so the robust loss is too low.',
            flush=True)
  values = {
      'threat': run.config.threat.to_dict(),
      'attack': {'step_size': run.config.attack.step_size,
                 'num_steps': settings.num_steps},
      'images': counts, 'settings': settings.to_dict(),
      'dataset': datasets.describe(run.dataset), 'subjects': subjects}
  atomic.write_json(run.workdir / 'landscape.json', values)
  return values


def run_all(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path,
    compare_to: Sequence[str]) -> None:
  """Measures the landscapes of a run and of others, and tells the numbers.

  Args:
    config: of the run in `workdir`; its group `landscape` goes for all.
    workdir: the run's folder.
    compare_to: folders of other runs, whose configs are read there.

  Raises:
    ValueError: for what cannot be measured, before anything is.
  """
  folders = [pathlib.Path(workdir), *map(pathlib.Path, compare_to)]
  if len({folder.resolve() for folder in folders}) < len(folders):
    raise UserError('--compare_to names a workdir twice.')
  configs = [config]
  for folder in folders:
    check(config, folder)
  for folder in folders[1:]:
    configs.append(workdirs.stored_config(folder, config))
  landscapes = {}
  for folder, its_config in zip(folders, configs, strict=True):
    run = run_lib.reopen(its_config, folder)
    name = folder.name if folder.name not in landscapes else str(folder)
    landscapes[name] = measure(run)
    page.write_or_say_why(run, 'landscape')
  print(f'\n{console.table(tables.flatness(landscapes))}\n')
  if len({json.dumps([values['threat'], values['attack']])
          for values in landscapes.values()}) > 1:
    print('The runs differ in threat model or attack: their curves do not '
          'compare.\n')
  if len(landscapes) > 1:
    together = folders[0] / 'figures' / 'landscapes'
    panels.landscapes(together, landscapes)
    print(f'all in one figure: {together}')
  print(f'everything is in {folders[0] / "landscape.json"}, and in report.html '
        'beside it')
