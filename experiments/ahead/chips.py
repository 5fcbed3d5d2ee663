"""Facts about the chips that programs are compiled for.

Peak rates are those of the vendors' data sheets, without sparsity. They enter
the roofline only; the compilers have their own tables.
"""

from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30

_TPU = 'https://docs.cloud.google.com/tpu/docs/'
_NVIDIA = 'https://www.nvidia.com/en-us/data-center/'

#: bfloat16 passes of a float32 product on a TPU, by precision.
_PASSES = {'float32': 1, 'float32 high': 3, 'float32 highest': 6}


class Gpu(NamedTuple):
  """What XLA needs to compile for a GPU that is not there.

  Attributes:
    compute_capability: (major, minor).
    cores: streaming multiprocessors.
    fpus_per_core: float32 units of each.
    shared_memory: bytes of each.
    l2_cache: bytes.
    clock_ghz: the boost clock.
    name: the driver's name of the device.
  """

  compute_capability: tuple[int, int]
  cores: int
  fpus_per_core: int
  shared_memory: int
  l2_cache: int
  clock_ghz: float
  name: str


class Chip(NamedTuple):
  """One accelerator; one JAX device.

  Attributes:
    name: as in a target.
    platform: 'tpu' or 'gpu'.
    description: the product.
    memory: bytes of its memory.
    usable: the share of the memory that JAX allocates by default.
    bandwidth: of its memory, in bytes/s.
    peak: FLOP/s of matrix products by kind, as in `flops.count`.
    link: bytes/s that it sends to the chips of its slice or host.
    network: bytes/s that it sends to other hosts; equal to `link` on TPUs,
      whose slices span hosts.
    kernel_seconds: least time of a kernel, including its launch.
    clock: cycles/s, in which the compiler's own estimate counts; None if
      the vendor does not publish it.
    source: where the figures are published.
    gpu: further facts of a GPU; None for TPUs.
  """

  name: str
  platform: str
  description: str
  memory: int
  usable: float
  bandwidth: float
  peak: Mapping[str, float]
  link: float
  network: float
  kernel_seconds: float
  clock: float | None
  source: str
  gpu: Gpu | None = None


def _tpu(
    name: str, description: str, *, memory: int, bandwidth: float,
    usable: float, bfloat16: float, link: float,
    clock: float | None = None) -> Chip:
  """A TPU; `usable` is libtpu's limit in bytes.

  `link` is half of the published bidirectional bandwidth, of all links.
  """
  peak = {'bfloat16': bfloat16} | {
      kind: bfloat16 / passes for kind, passes in _PASSES.items()}
  # The TPU's own programs take the rest of its memory.
  return Chip(
      name, 'tpu', description, memory, usable / memory, bandwidth, peak, link,
      link, 3e-7, clock, _TPU + name)


def _gpu(
    name: str, description: str, gpu: Gpu, *, memory: int, bandwidth: float,
    bfloat16: float, float32: float, link: float, network: float) -> Chip:
  """A GPU; JAX multiplies float32 in TensorFloat-32, at half the rate."""
  peak = {
      'bfloat16': bfloat16, 'float32': bfloat16 / 2,
      'float32 high': bfloat16 / 2, 'float32 highest': float32}
  # JAX preallocates 75 % (XLA_PYTHON_CLIENT_MEM_FRACTION).
  return Chip(
      name, 'gpu', description, memory, 0.75, bandwidth, peak, link, network,
      2e-6, None, _NVIDIA + name.partition('-')[0], gpu)


_HOPPER = {
    'bfloat16': 989.4e12, 'float32': 66.9e12, 'link': 450e9, 'network': 50e9}

CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    _tpu('v5e', 'Cloud TPU v5e', memory=16 * GIB, usable=15.75 * GIB,
         bandwidth=819e9, bfloat16=197e12, link=200e9, clock=1.5e9),
    _tpu('v5p', 'Cloud TPU v5p', memory=96 * GIB, usable=95.73 * GIB,
         bandwidth=2765e9, bfloat16=459e12, link=600e9, clock=1.75e9),
    _tpu('v6e', 'Cloud TPU v6e', memory=32 * GIB, usable=31.24 * GIB,
         bandwidth=1638e9, bfloat16=918e12, link=400e9),
    _gpu('a100', 'NVIDIA A100 SXM, 80 GB',
         Gpu((8, 0), 108, 64, 167_936, 41_943_040, 1.41,
             'NVIDIA A100-SXM4-80GB'),
         memory=85_100_068_864, bandwidth=2039e9, bfloat16=312e12,
         float32=19.5e12, link=300e9, network=25e9),
    _gpu('h100', 'NVIDIA H100 SXM, 80 GB',
         Gpu((9, 0), 132, 128, 233_472, 52_428_800, 1.98,
             'NVIDIA H100 80GB HBM3'),
         memory=84_942_979_072, bandwidth=3352e9, **_HOPPER),
    _gpu('h200', 'NVIDIA H200 SXM, 141 GB',
         Gpu((9, 0), 132, 128, 233_472, 52_428_800, 1.98,
             'NVIDIA H200 141GB HBM3e'),
         memory=143_771 * 2**20, bandwidth=4800e9, **_HOPPER),
)}


def target_config(chip: Chip) -> str:
  """The `GpuTargetConfigProto` of a GPU, as text.

  Args:
    chip: a GPU.

  Returns:
    The proto, for `topologies.get_topology_desc(target_config=...)`.
  """
  gpu = chip.gpu
  assert gpu is not None
  major, minor = gpu.compute_capability
  return f'''
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory}
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {gpu.l2_cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
'''
