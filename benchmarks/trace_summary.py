"""Sums the time of kernels in a trace of `jax.profiler`."""

import collections
import pathlib
import re
from typing import Any

import jax


def summarize(folder: pathlib.Path, most: int) -> dict[str, Any]:
  """The most costly kernels of the newest trace in a folder.

  Args:
    folder: the folder passed to `jax.profiler.trace`.
    most: number of kernels.

  Returns:
    Milliseconds of all kernels, of each of the most costly ones with its
    number of calls, and of families of kernels, whose names differ in numbers.
  """
  path = max(folder.rglob('*.xplane.pb'), key=lambda p: p.stat().st_mtime)
  totals: dict[str, float] = collections.defaultdict(float)
  calls: dict[str, int] = collections.defaultdict(int)
  families: dict[str, float] = collections.defaultdict(float)
  for event in _kernels(jax.profiler.ProfileData.from_file(str(path))):
    milliseconds = event.duration_ns / 1e6
    totals[event.name] += milliseconds
    calls[event.name] += 1
    families[re.sub(r'\d+', 'N', event.name)] += milliseconds

  def top(values: dict[str, float]) -> list[tuple[str, float]]:
    ordered = sorted(values.items(), key=lambda item: -item[1])[:most]
    return [(name[:160], round(value, 3)) for name, value in ordered]

  return {
      'milliseconds': sum(totals.values()),
      'kernels': [(*item, calls[name]) for item, name in zip(
          top(totals), sorted(totals, key=lambda n: -totals[n]),
          strict=False)],
      'families': top(families)}


def _kernels(data: Any) -> Any:
  """The events of the device; without an accelerator, those of XLA's threads.

  An accelerator's plane has a line per stream, or one of XLA's operations.
  """
  planes = list(data.planes)
  devices = [p for p in planes if p.name.startswith(('/device:GPU',
                                                     '/device:TPU'))]
  wanted = r'Stream|XLA Ops$' if devices else r'.*XLA'
  for plane in devices or planes:
    for line in plane.lines:
      if re.match(wanted, line.name):
        yield from line.events
