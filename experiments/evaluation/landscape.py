"""The loss around the weights of a checkpoint, along directions and on a plane.

Natural and robust loss and accuracy along random directions and along the
weight adversary's direction, on training and on test images, and over the plane
of the first two random directions on training images.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import awp_jax
from awp_jax import landscape as landscape_lib
from awp_jax.core import loops
from experiments.data import batches
from experiments.evaluation import landscape_records, probe
from experiments.parallel import placement, processes
from experiments.runs import precision, restore
from experiments.runs import run as run_lib
from experiments.util import digests

#: (name of a series, split) -> the metrics at each of its points.
Values = dict[tuple[str, str], list[dict[str, float]]]


@functools.lru_cache
def _measure(
    model: Any, threat: awp_jax.ThreatModel, step_size: float,
    num_steps: int) -> landscape_lib.Measure:
  """Cached, so that AT and AT-AWP share one compiled function."""
  measure = landscape_lib.robust_measure(
      functools.partial(precision.logits, model), threat, step_size=step_size,
      num_steps=num_steps)

  def of_pixels(variables: Any, batch: Any, key: Any) -> dict[str, Any]:
    images, labels = batch
    pixels = batches.to_pixels(images, jnp.dtype(jnp.float32))
    return measure(variables, (pixels, labels), key)

  return of_pixels


class Checkpoint(NamedTuple):
  """A checkpoint, and the images and settings to measure it with.

  Attributes:
    run: the run.
    variables: parameters and running statistics, in float32.
    images: split -> images [N, H, W, C] and labels [N].
    batch_size: over the devices of a process.
    key: a PRNG key.
  """

  run: run_lib.Run
  variables: dict[str, Any]
  images: dict[str, tuple[np.ndarray, np.ndarray]]
  batch_size: int
  key: Any

  def directions(self, name: str) -> list[Any]:
    """The directions of a series, zero in the running statistics."""
    if name == 'adversarial':
      return [self._complete(self._adversarial())]
    numbers = [0, 1] if name == 'plane' else [int(name.partition('-')[2])]
    return [
        self._complete(landscape_lib.random_direction(
            jax.random.fold_in(self.key, number), self.variables['params'],
            filter_axis=getattr(self.run.model, 'filter_axis', -1)))
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
    return landscape_lib.filter_normalize(
        gradient, self.variables['params'], norm='layer')

  def measure(
      self, series: landscape_records.Series, points: list[list[float]],
      progress: Callable[[int, dict[str, float]], None]) -> None:
    """Measures points of a series; calls `progress` after each."""
    config = self.run.config
    measure = _measure(
        precision.network(self.run.model), self.run.setup.threat,
        config.attack.step_size, config.landscape.num_steps)
    landscape_lib.evaluate_points(
        self.key, measure, self.variables, self.directions(series.name),
        points, self.images[series.split], batch_size=self.batch_size,
        devices=placement.own_devices(), progress=progress)


def _spread(available: int, count: int) -> np.ndarray:
  """`count` evenly spaced indices below `available`; all of them for 0."""
  count = min(count, available) or available
  return np.linspace(0, available - 1, count).astype(int)


def select_images(
    run: run_lib.Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Evenly spaced training and test images with their labels, by split."""
  dataset, settings = run.dataset, run.config.landscape
  train = _spread(len(dataset.y_train), settings.num_train)
  test = _spread(len(dataset.y_test), settings.num_test)
  return {'train': (dataset.x_train[train], dataset.y_train[train]),
          'test': (dataset.x_test[test], dataset.y_test[test])}


def choose_batch_size(run: run_lib.Run, largest: int) -> int:
  """Images per batch of a process; `largest` is the largest split."""
  size = run.config.landscape.batch_size or (64 if loops.unrolls() else 512)
  return placement.rounded(min(size, largest))


def record_facts(
    run: run_lib.Run, variables: Any, images: Any, batch_size: int
) -> dict[str, Any]:
  """Everything but the points that the records of a checkpoint depend on."""
  return restore.network_facts(run) | {
      'weights': digests.of_arrays(variables),
      'threat': run.config.threat.to_dict(),
      'step_size': run.config.attack.step_size,
      'num_steps': run.config.landscape.num_steps,
      'seed': run.config.landscape.seed, 'batch_size': batch_size,
      'images': {
          split: digests.of_arrays(part) for split, part in images.items()},
      'precision': precision.PRECISION, 'awp_jax': awp_jax.__version__}


def measure_checkpoint(
    checkpoint: Checkpoint, records: landscape_records.Records, label: str
) -> Values:
  """Measures all series of a checkpoint; recorded points are not repeated.

  Several processes divide the points.

  Args:
    checkpoint: what to measure.
    records: of the checkpoint; new points are added.
    label: for the progress bar.

  Returns:
    The metrics of all points, by series and split.
  """
  series = landscape_records.make_series(checkpoint.run.config.landscape)
  bar = landscape_records.Progress(
      label, sum(len(one.points) for one in series))
  found = {}
  try:
    for one in series:
      missing = [p for p in one.points if records.find(one, p) is None]
      bar.add(len(one.points) - len(missing))
      missing = missing[processes.index()::processes.count()]

      def progress(
          number: int, means: dict[str, float],
          one: landscape_records.Series = one,
          missing: list[list[float]] = missing) -> None:
        records.append(one, missing[number], means)
        bar.add(1)

      if missing:
        checkpoint.measure(one, missing, progress)
      if processes.count() > 1:
        records.exchange()
      found[one.name, one.split] = records.all_of(one)
      bar.finish_series(one, found[one.name, one.split])
  finally:
    bar.close()
  return found


def _plain(value: Any) -> Any:
  """Numbers as JSON; non-finite ones become null."""
  if isinstance(value, list | tuple | np.ndarray):
    return [_plain(part) for part in value]
  return float(value) if math.isfinite(value) else None


def _curves(
    values: Sequence[list[dict[str, float]]], alphas: list[float]
) -> dict[str, Any]:
  """Per metric: mean and standard deviation over directions, and each curve."""
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


def summarize(
    found: Values, settings: ml_collections.ConfigDict) -> dict[str, Any]:
  """A checkpoint's entry in `landscape.json`.

  Args:
    found: from `measure_checkpoint`.
    settings: the config's group `landscape`.

  Returns:
    'random', and if they were measured 'adversarial' and 'plane'.
  """
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
        'alphas': landscape_records.coordinates(settings.range, side),
        'train': {
            metric: _plain(np.reshape(
                [point[metric] for point in found['plane', 'train']],
                (side, side))) for metric in landscape_records.METRICS}}
  return entry
