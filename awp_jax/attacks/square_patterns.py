"""Window sizes and fill patterns of the Square Attack."""

import functools
import math
from typing import NamedTuple

import numpy as np

#: Queries after which p is halved, out of `_SCHEDULE_LENGTH`.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_SCHEDULE_LENGTH = 10000


class SquareSchedule(NamedTuple):
  """Settings of a run; hashable.

  Attributes:
    num_queries: candidates after the start.
    p_init: the share of the image that the first windows cover.
    rescale: whether to rescale the schedule of p to `num_queries`.
  """

  num_queries: int
  p_init: float
  rescale: bool


def window_share(query: int, schedule: SquareSchedule) -> float:
  """p: the share of the image that the window of a query covers."""
  if schedule.rescale:
    query = int(query / schedule.num_queries * _SCHEDULE_LENGTH)
  return schedule.p_init / 2 ** sum(query > bound for bound in _HALVINGS)


@functools.cache
def window_sides(
    schedule: SquareSchedule, height: int, width: int, odd: bool) -> np.ndarray:
  """The side of the window of each query, [num_queries].

  Args:
    schedule: settings of the run.
    height: height of the images.
    width: width of the images.
    odd: whether sides are odd and at least 3, as for L_2 and L_1.

  Returns:
    Sides in [1, min(height, width)].
  """
  sides = []
  for query in range(schedule.num_queries):
    area = window_share(query, schedule) * height * width
    side = max(round(math.sqrt(area)), 3 if odd else 1)
    side += odd and side % 2 == 0
    sides.append(min(side, height, width))
  return np.asarray(sides, np.int32)


def bump(height: int, width: int, power: int) -> np.ndarray:
  """A stepped pyramid around the center, [height, width].

  The value at Chebyshev distance r from the center is the sum of
  (k + 1)^-power over k >= r, up to the largest r in the rectangle.
  """
  middle = (height // 2, width // 2)
  rings = max(middle) + 1
  steps = 1.0 / np.arange(1, rings + 1) ** power
  tail = np.cumsum(steps[::-1])[::-1]
  down = np.abs(np.arange(height) - middle[0])[:, None]
  across = np.abs(np.arange(width) - middle[1])[None, :]
  return tail[np.maximum(down, across)]


@functools.cache
def pattern(side: int, norm: str) -> np.ndarray:
  """Two opposite bumps, one above the other, of unit norm: [side, side]."""
  power = 2 if norm == 'L2' else 4
  size = (lambda a: np.sqrt(np.sum(a * a))) if norm == 'L2' else (
      lambda a: np.sum(np.abs(a)))
  parts = []
  for height, sign in ((side // 2, 1.0), (side - side // 2, -1.0)):
    if height:
      hill = bump(height, side, power)
      parts.append(sign * hill / size(hill))
  both = np.concatenate(parts)
  return (both / size(both)).astype(np.float32)


@functools.cache
def patterns(sides: tuple[int, ...], norm: str) -> np.ndarray:
  """The patterns of the given sides, each zero-padded to the largest."""
  widest = max(sides)
  return np.stack([
      np.pad(pattern(side, norm), (0, widest - side)) for side in sides])
