"""Describe NVIDIA GPUs that are not there to XLA's compiler, by its target config, a text protocol buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffdis_jax.preflight.chips import Chip

KIB, MIB = 2**10, 2**20


class Gpu(NamedTuple):
  """The figures of one kind of GPU that the compiler asks for beyond chips.py, by NVIDIA's data sheets and the
  CUDA programming guide's table of compute capabilities."""

  capability: tuple[int, int]  # CUDA's compute capability
  cores: int  # streaming multiprocessors
  lanes: int  # of a core for f32
  clock: float  # boost, GHz
  memory: int  # bytes, as the driver gives them
  cache: int  # second level, bytes
  shared_memory: int  # of a core, bytes; a block may have all but one KiB of it
  links: int  # NVLinks
  threads: int = 2048  # of a core
  corrects: bool = True  # errors of its memory


# By their names in chips.CHIPS. What a variant shares with another card stands again, so that a row can be held against
# one data sheet.
GPUS = {
  "a100": Gpu((8, 0), 108, 64, 1.41, 81_152 * MIB, 40 * MIB, 164 * KIB, 12),
  "a100-40": Gpu((8, 0), 108, 64, 1.41, 40_960 * MIB, 40 * MIB, 164 * KIB, 12),
  "h100": Gpu((9, 0), 132, 128, 1.98, 81_008 * MIB, 50 * MIB, 228 * KIB, 18),
  "h100pcie": Gpu((9, 0), 114, 128, 1.755, 81_008 * MIB, 50 * MIB, 228 * KIB, 0),
  "h200": Gpu((9, 0), 132, 128, 1.98, 143_771 * MIB, 50 * MIB, 228 * KIB, 18),
  "b200": Gpu((10, 0), 148, 128, 1.965, 183_359 * MIB, 126 * MIB, 228 * KIB, 18),
  # Cards of Ada and the A10G hold fewer threads a core; a card for games has no error correction.
  "l4": Gpu((8, 9), 58, 128, 2.04, 23_034 * MIB, 48 * MIB, 100 * KIB, 0, threads=1536),
  "a10g": Gpu((8, 6), 80, 128, 1.71, 23_028 * MIB, 6 * MIB, 100 * KIB, 0, threads=1536),
  "rtx4090": Gpu((8, 9), 128, 128, 2.52, 24_564 * MIB, 72 * MIB, 100 * KIB, 0, threads=1536, corrects=False),
}
# The limits that all of these share.
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


def target_config(gpu: Gpu, chip: Chip, *, cuda: Sequence[int], cudnn: Sequence[int]) -> str:
  """Return the text that the compiler takes for `target_config`.

  Args:
    chip: the same card; its `kind` is the driver's name of it.
    cuda, cudnn: versions that a program is to run with, as (major, minor, patch).
  """
  (major, minor), parts = gpu.capability, "major: {} minor: {} patch: {}"
  runtime, dnn = (".".join(map(str, version)) for version in (cuda, cudnn))
  links = f"device_interconnect_info {{ active_links: {gpu.links} }}" if gpu.links else ""
  return f"""
gpu_device_info {{{_LIMITS}
  core_count: {gpu.cores}
  threads_per_core_limit: {gpu.threads}
  ecc_enabled: {str(gpu.corrects).lower()}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - KIB}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  device_vendor: "NVIDIA Corporation"
  name: "{chip.kind}"
  platform_version: "Compute Capability {major}.{minor}"
  runtime_version: "{runtime}"
  compile_time_toolkit_version: "{runtime}"
  driver_version: "{runtime}"
  dnn_version: "{dnn}"
  {links}
}}
platform_name: "CUDA"
dnn_version_info {{ {parts.format(*cudnn)} }}
runtime_version {{ {parts.format(*cuda)} }}
device_description_str: "{chip.kind}"
"""
