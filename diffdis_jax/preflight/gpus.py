"""What XLA's compiler for NVIDIA GPUs must know of one that is not there: its target config, a text protocol buffer."""

from __future__ import annotations

import dataclasses

KIB, MIB = 2**10, 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
  """One kind of GPU, by NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.

  Attributes:
    name: as the driver gives it.
    capability: CUDA's compute capability.
    cores: streaming multiprocessors.
    lanes: of a core for f32.
    clock: boost, GHz.
    memory: bytes, as the driver gives them.
    bandwidth: of it, bytes a second.
    cache: second level, bytes.
    shared_memory: of a core, bytes. A block may have all but one KiB of it.
    links: NVLinks; 0 without.
    threads: that a core holds.
    corrects: whether its memory corrects errors.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  lanes: int
  clock: float
  memory: int
  bandwidth: float
  cache: int
  shared_memory: int
  links: int
  threads: int = 2048
  corrects: bool = True


_H100 = Gpu(
  name="NVIDIA H100 80GB HBM3",
  capability=(9, 0),
  cores=132,
  lanes=128,
  clock=1.98,
  memory=81_008 * MIB,
  bandwidth=3.35e12,
  cache=50 * MIB,
  shared_memory=228 * KIB,
  links=18,
)
_A100 = Gpu(
  name="NVIDIA A100-SXM4-80GB",
  capability=(8, 0),
  cores=108,
  lanes=64,
  clock=1.41,
  memory=81_152 * MIB,
  bandwidth=2.039e12,
  cache=40 * MIB,
  shared_memory=164 * KIB,
  links=12,
)
_L4 = Gpu(
  name="NVIDIA L4",
  capability=(8, 9),
  cores=58,
  lanes=128,
  clock=2.04,
  memory=23_034 * MIB,
  bandwidth=0.3e12,
  cache=48 * MIB,
  shared_memory=100 * KIB,
  links=0,
  threads=1536,
)
GPUS = {
  "a100": _A100,
  "a100-40": dataclasses.replace(_A100, name="NVIDIA A100-SXM4-40GB", memory=40_960 * MIB, bandwidth=1.555e12),
  "h100": _H100,
  "h100pcie": dataclasses.replace(_H100, name="NVIDIA H100 PCIe", cores=114, clock=1.755, bandwidth=2.0e12, links=0),
  "h200": dataclasses.replace(_H100, name="NVIDIA H200", memory=143_771 * MIB, bandwidth=4.8e12),
  "b200": Gpu(
    name="NVIDIA B200",
    capability=(10, 0),
    cores=148,
    lanes=128,
    clock=1.965,
    memory=183_359 * MIB,
    bandwidth=8.0e12,
    cache=126 * MIB,
    shared_memory=228 * KIB,
    links=18,
  ),
  "l4": _L4,
  "a10g": dataclasses.replace(
    _L4,
    name="NVIDIA A10G",
    capability=(8, 6),
    cores=80,
    clock=1.71,
    memory=23_028 * MIB,
    bandwidth=0.6e12,
    cache=6 * MIB,
  ),
  "rtx4090": dataclasses.replace(
    _L4,
    name="NVIDIA GeForce RTX 4090",
    cores=128,
    clock=2.52,
    memory=24_564 * MIB,
    bandwidth=1.008e12,
    cache=72 * MIB,
    corrects=False,
  ),
}
# Of every one of these.
_LIMITS = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
"""


def target_config(gpu: Gpu, *, cuda: tuple[int, ...], cudnn: tuple[int, ...]) -> str:
  """What the compiler takes for `target_config`.

  Args:
    cuda, cudnn: versions that a program is to run with, as (major, minor, patch).
  """
  major, minor = gpu.capability
  fields = lambda version: " ".join(f"{name}: {part}" for name, part in zip(("major", "minor", "patch"), version))
  dotted = lambda version: ".".join(map(str, version))
  links = f"device_interconnect_info {{ active_links: {gpu.links} }}" if gpu.links else ""
  return f"""
gpu_device_info {{{_LIMITS}
  core_count: {gpu.cores}
  threads_per_core_limit: {gpu.threads}
  ecc_enabled: {str(gpu.corrects).lower()}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.bandwidth:.0f}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - KIB}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  device_vendor: "NVIDIA Corporation"
  name: "{gpu.name}"
  platform_version: "Compute Capability {major}.{minor}"
  runtime_version: "{dotted(cuda)}"
  compile_time_toolkit_version: "{dotted(cuda)}"
  driver_version: "{dotted(cuda)}"
  dnn_version: "{dotted(cudnn)}"
  {links}
}}
platform_name: "CUDA"
dnn_version_info {{ {fields(cudnn)} }}
runtime_version {{ {fields(cuda)} }}
device_description_str: "{gpu.name}"
"""
