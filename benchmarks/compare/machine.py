"""The machine and the versions of a measurement, by the standard library."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

#: Instruction sets that decide the speed of matrix products.
INSTRUCTIONS = (
    'avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_tile',
    'amx_bf16', 'asimd', 'bf16', 'i8mm', 'sve')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch')


def describe(cpuinfo: str | None = None) -> dict[str, Any]:
  """The processor.

  Args:
    cpuinfo: the text of /proc/cpuinfo; read if None and there is one.

  Returns:
    Its name, the number of cores for this process, and its instruction sets
    among `INSTRUCTIONS`.
  """
  path = pathlib.Path('/proc/cpuinfo')
  if cpuinfo is None:
    cpuinfo = path.read_text() if path.exists() else ''
  fields: dict[str, str] = {}
  for line in cpuinfo.splitlines():
    name, _, value = line.partition(':')
    fields.setdefault(name.strip(), value.strip())
  found = set(fields.get('flags', fields.get('Features', '')).split())
  return {
      'cpu': fields.get('model name') or platform.processor() or (
          platform.machine()),
      'cores': len(os.sched_getaffinity(0)) if hasattr(
          os, 'sched_getaffinity') else os.cpu_count(),
      'instructions': [name for name in INSTRUCTIONS if name in found]}


def versions() -> dict[str, str]:
  """Of Python and of the installed packages among `PACKAGES`."""
  found = {'python': platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
