"""Estimates the time of a program from its operations, bytes and collectives.

With R the chip's peak rates, B its memory's bandwidth and t the least time of a
kernel, a step takes between

  max(sum_k flops_k / R_k,  sum_i max(bytes_i / B, t)) + communication

over kinds k of operations and kernels i, and the sum of the three terms. Its
collectives take, for n devices,

  2 (n - 1) / n * bytes / link  +  latency * log2(n)      each.
"""

import math
from typing import NamedTuple

from experiments.ahead import analysis, programs, targets

#: Seconds of a collective per doubling of the devices, whatever its size.
LATENCY = 5e-6

ASSUMPTIONS = (
    'the peak rates of the data sheets; every kernel reads and writes its '
    'arrays once, and takes at least {kernel:g} us; collectives are rings over '
    'links of {link:g} GB/s, do not overlap with computations and take '
    '{latency:g} us per doubling of the devices. The first time assumes that '
    'computing and memory traffic overlap completely, the second that they do '
    'not overlap. Real programs also stay below the peak rates.')


class Estimate(NamedTuple):
  """Seconds of one execution of a program.

  Attributes:
    computing: of convolutions and matrix products at the peak rates.
    memory: of all kernels at the bandwidth of the memory.
    kernels: the same, with the least time of each kernel.
    communication: of the collectives.
    compiler: the compiler's own estimate (TPU), or None.
  """

  computing: float
  memory: float
  kernels: float
  communication: float
  compiler: float | None

  @property
  def least(self) -> float:
    """With computing and memory traffic at the same time."""
    return max(self.computing, self.kernels) + self.communication

  @property
  def most(self) -> float:
    """With one after the other."""
    return self.computing + self.kernels + self.communication


def _link(target: targets.Target) -> float:
  """Bytes/s that a chip sends when all communicate.

  Between hosts of GPUs the rings run in parallel, one through the network
  interface of each GPU, so each carries its share of the data.
  """
  chip = target.chip
  if target.num_hosts == 1 or chip.platform == 'tpu':
    return chip.link
  per_host = target.num_devices // target.num_hosts
  return min(chip.link, per_host * chip.network)


def of_collective(
    target: targets.Target, found: analysis.Collective) -> float:
  """Seconds of all executions of a collective."""
  number = target.num_devices
  if number == 1:
    return 0.0
  each = (2 * (number - 1) / number * found.bytes / _link(target)
          + LATENCY * math.log2(number))
  return found.times * each


def estimate(target: targets.Target, program: programs.Program) -> Estimate:
  """Estimates the time of a program.

  Args:
    target: the chips.
    program: compiled for them, with a module.

  Returns:
    The parts of the time.
  """
  chip, module = target.chip, program.module
  assert module is not None
  computing = sum(
      number / chip.peak[kind] for kind, number in program.flops.items())
  found = analysis.kernels(module)
  memory = sum(part.times * part.bytes for part in found) / chip.bandwidth
  kernels = sum(
      part.times * max(part.bytes / chip.bandwidth, chip.kernel_seconds)
      for part in found)
  communication = sum(
      of_collective(target, part) for part in analysis.collectives(module))
  cycles = analysis.compiler_cycles(module)
  return Estimate(
      computing, memory, kernels, communication,
      cycles / chip.clock if cycles and chip.clock else None)


def assumptions(target: targets.Target) -> str:
  """The assumptions of `estimate`, in a sentence."""
  return ASSUMPTIONS.format(
      kernel=target.chip.kernel_seconds * 1e6, link=_link(target) / 1e9,
      latency=LATENCY * 1e6)
