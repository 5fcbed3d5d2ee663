"""A data set: images with stripes in four directions."""

from typing import Any

import numpy as np

SIDE = 12

#: Steps to the right and down in which the brightness does not change.
DIRECTIONS = ((1, 0), (0, 1), (1, 1), (1, -1))


def _part(num: int, noise: float, rng: np.random.Generator) -> tuple[Any, Any]:
  labels = np.arange(num) % len(DIRECTIONS)
  right, down = np.array(DIRECTIONS)[labels].T[..., None, None]
  rows, columns = np.mgrid[:SIDE, :SIDE]
  phases = rng.uniform(0, 2 * np.pi, (num, 1, 1))
  waves = np.sin(np.pi / 2 * (right * rows - down * columns) + phases)
  images = 0.5 + 0.25 * waves + noise * rng.normal(size=waves.shape)
  return np.clip(images, 0, 1).astype(np.float32)[..., None], labels


def stripes(
    noise: float, num_train: int = 800, num_test: int = 400, seed: int = 0
) -> dict[str, Any]:
  """Images [N, 12, 12, 1] in [0, 1] and labels [N] in 0..3.

  Args:
    noise: standard deviation of the pixels.
    num_train: number of training images.
    num_test: number of test images.
    seed: of the random numbers. It is not the seed of a run, so all runs have
      the same images.

  Returns:
    Arrays by name. The keys 'num_classes', 'mean' and 'std' may be added; by
    default they are computed from the training images.
  """
  rng = np.random.default_rng(seed)
  x_train, y_train = _part(num_train, noise, rng)
  x_test, y_test = _part(num_test, noise, rng)
  return {'x_train': x_train, 'y_train': y_train,
          'x_test': x_test, 'y_test': y_test}
