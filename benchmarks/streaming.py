"""Times training steps with images on the device and streamed from the host.

  python benchmarks/streaming.py --batch_size=128 --num_extra=1000000

Both run in turn on the same random images, several rounds of steps each, and
the medians are compared. Processor time is reported next to wall-clock time,
for machines that do other work. The extra images are a memory-mapped file in a
temporary folder. Compilation is not timed.
"""

import argparse
from collections.abc import Sequence
import pathlib
import platform
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from experiments.configs import base
from experiments.parallel import placement
from experiments.runs import run as run_lib
from experiments.training import compiled
from experiments.training import step as step_lib

KINDS = {'resident': 1e9, 'streamed': 0.0}


def write_images(folder: pathlib.Path, options: argparse.Namespace) -> None:
  """Writes random training images, and extra images if any."""
  rng = np.random.default_rng(0)
  shape = (options.image_size, options.image_size, 3)

  def labels(num: int) -> np.ndarray:
    return np.arange(num) % 10

  arrays = {}
  for part, num in (('train', options.num_train), ('test', 100)):
    arrays |= {
        f'x_{part}': rng.integers(0, 256, (num, *shape), np.uint8),
        f'y_{part}': labels(num)}
  np.savez(folder / 'images.npz', **arrays)  # type: ignore[arg-type]
  if options.num_extra:
    (folder / 'extra').mkdir()
    extra = np.lib.format.open_memmap(
        folder / 'extra' / 'images.npy', 'w+', np.uint8,
        (options.num_extra, *shape))
    for start in range(0, options.num_extra, 10_000):
      part = extra[start:start + 10_000]
      part[:] = rng.integers(0, 256, part.shape, np.uint8)
    np.save(folder / 'extra' / 'labels.npy', labels(options.num_extra))


def prepare(
    folder: pathlib.Path, kind: str, options: argparse.Namespace
) -> run_lib.Run:
  """A run of AT on the images of `write_images`."""
  config = base.get_config()
  config.update_from_flattened_dict({
      'dataset': 'npz', 'npz_path': str(folder / 'images.npz'),
      'data_on_device_gib': KINDS[kind], 'model.depth': 10,
      'model.width': options.width, 'batch_size': options.batch_size,
      'attack.num_steps': options.attack_steps})
  if options.num_extra:
    config.extra.path, config.extra.fraction = str(folder / 'extra'), 0.5
  return run_lib.prepare(config, folder / kind)


class Timed:
  """The steps of a run, from the first."""

  def __init__(self, run: run_lib.Run) -> None:
    """Compiles the step and runs it once.

    Args:
      run: the run.
    """
    self._size, self._step = run.config.batch_size, 0
    # All steps have full batches: the first epoch is longer than the timing.
    self._steps = compiled.CompiledSteps(run)
    self._state, self._sums = (placement.replicate(tree) for tree in (
        run_lib.initial_state(run), step_lib.zero_sums()))
    self._program = self._steps.compile(self._size, 0.0, self._arguments())
    self.seconds(1)

  def _arguments(self) -> tuple[Any, ...]:
    return self._steps.arguments(self._state, self._sums, self._step)

  def seconds(self, count: int) -> tuple[float, float]:
    """Seconds per step of the next `count` steps, and processor seconds."""
    started, worked = time.perf_counter(), time.process_time()
    for _ in range(count):
      self._state, self._sums = self._program(*self._arguments())
      self._step += 1
    jax.block_until_ready(self._sums)
    return ((time.perf_counter() - started) / count,
            (time.process_time() - worked) / count)

  def close(self) -> None:
    """Ends the run."""
    self._steps.close()


def main(argv: Sequence[str] | None = None) -> None:
  """Runs both in turn and prints their medians."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, default in (
      ('batch_size', 128), ('image_size', 32), ('width', 8),
      ('attack_steps', 1), ('num_train', 20_000), ('num_extra', 0),
      ('steps', 10), ('rounds', 7)):
    parser.add_argument(f'--{name}', type=int, default=default)
  options = parser.parse_args(argv)
  if options.steps * options.rounds >= options.num_train // options.batch_size:
    parser.error('steps * rounds must be below num_train / batch_size')
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_images(folder, options)
    runs = {kind: Timed(prepare(folder, kind, options)) for kind in KINDS}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
      for kind, run in runs.items():
        found[kind].append(run.seconds(options.steps))
    for run in runs.values():
      run.close()
  print(f'{platform.machine()}, {jax.device_count()} x '
        f'{jax.devices()[0].device_kind}, jax {jax.__version__}; '
        f'peak memory of the host {_peak_gib():.2f} GiB')
  medians = {}
  for kind, values in found.items():
    walls, works = zip(*values, strict=True)
    wall, work = medians[kind] = (
        statistics.median(walls), statistics.median(works))
    print(f'{kind}: {1e3 * wall:.1f} ms per step '
          f'({1e3 * min(walls):.1f} to {1e3 * max(walls):.1f}), '
          f'{options.batch_size / wall:.0f} images/s; '
          f'{1e3 * work:.1f} ms of processor time')
  ratios = [streamed / resident for streamed, resident in zip(
      medians['streamed'], medians['resident'], strict=True)]
  print(f'streamed / resident: {ratios[0]:.3f}, '
        f'{ratios[1]:.3f} in processor time')


def _peak_gib() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == '__main__':
  main()
