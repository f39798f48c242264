"""Devices to compile for, present or not, and what the compiler says of a program."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from diffdis_jax.errors import UserError
from diffdis_jax.estimates import hlo
from diffdis_jax.estimates.chips import Chip, Topology, of_kind

PLATFORMS = ("tpu", "cpu", "cuda")
# The TPU compiler loads without a TPU, beside another process that has loaded it, and asks no metadata server.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([BKMG]) of ([\d.]+)([BKMG]) hbm")

# What the TPU compiler has no estimate for, and puts into its sum of seconds with -1 each; they take next to nothing.
_COUNTED_AS_MINUS_ONE = ("ZeroCrop", "ConcatBitcast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """What to compile for.

  Attributes:
    devices: jax's, to which it gives no type.
    compiler: of PLATFORMS.
    exact: whether it compiles for the chip itself. Otherwise memory and collectives are those of another device's
      program, and there is no estimate of its time.
  """

  devices: list[Any]
  chip: Chip
  compiler: str
  exact: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """What the compiler says; bytes and operations are those of one device.

  Attributes:
    arguments, temporaries, outputs: bytes; outputs that reuse donated arguments are not counted again.
    seconds: the compiler's own estimate, None where it has none. A loop's body counts once.
    seconds_by_cycles: its estimates of the operations' cycles, added up, by the chip's clock; None where it has none.
    operations: as the compiler counts them, padding included, a loop's body once.
    collectives: bytes by kind.
    text: the program; empty where it does not fit.
  """

  arguments: int
  temporaries: int
  outputs: int
  fits: bool
  seconds: float | None = None
  seconds_by_cycles: float | None = None
  operations: float | None = None
  collectives: dict[str, int] = dataclasses.field(default_factory=dict)
  text: str = dataclasses.field(repr=False, default="")

  @property
  def memory(self) -> int:
    return self.arguments + self.temporaries + self.outputs


def choose_platform(platform: str | None, topology: Topology | None) -> str:
  """The compiler for a topology: the one asked for, or that of its chips where it is installed, or XLA's for CPUs."""
  if platform is None:
    platform = "tpu" if topology and topology.is_tpu and importlib.util.find_spec("libtpu") else "cpu"
  if platform == "tpu" and not importlib.util.find_spec("libtpu"):
    raise UserError("--platform=tpu needs libtpu; pip install 'diffdis_jax[tpu]', or take --platform=cpu")
  if topology is None:
    if platform != "cuda":
      raise UserError("give --topology, such as v5e:8x8; only --platform=cuda can do without")
  elif platform == "tpu" and not topology.is_tpu:
    raise UserError(f"--platform=tpu cannot compile for {topology.name}; take --platform=cpu, or cuda where one is")
  return platform


def prepare(platform: str, topology: Topology | None, slices: int) -> None:
  """Settings that JAX reads once, before it first looks for devices."""
  if platform == "cuda" or topology is None:
    jax.config.update("jax_platforms", "cuda,cpu")
    return
  jax.config.update("jax_platforms", "cpu")
  if platform == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.size * slices)


def find(platform: str, topology: Topology | None, slices: int) -> Target:
  """After `prepare`. Raises UserError where there are no such devices."""
  if platform == "cuda" or topology is None:
    return _find_gpus(topology)
  if platform == "tpu":
    return Target(devices=tpu_devices(topology, slices), chip=topology.chip, compiler="tpu", exact=True)
  devices = jax.devices("cpu")
  if len(devices) < topology.size * slices:
    raise UserError(
      f"{topology.name} needs {topology.size * slices} CPU devices, but this process has {len(devices)}; unset"
      " JAX_NUM_CPU_DEVICES and XLA_FLAGS"
    )
  return Target(devices=devices[: topology.size * slices], chip=topology.chip, compiler="cpu", exact=False)


def _find_gpus(topology: Topology | None) -> Target:
  try:
    devices = jax.devices("cuda")
  except RuntimeError as error:
    raise UserError("--platform=cuda finds no GPU that JAX can use; take --platform=cpu") from error
  if topology is not None and topology.size != len(devices):
    raise UserError(f"--topology={topology.name} has {topology.size} devices, but {len(devices)} are present")
  chip = of_kind(devices[0].device_kind)
  exact = topology is None or topology.chip == chip
  # What JAX may use of this very card: by default three quarters, and a card of one kind may come with less memory.
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  chip = dataclasses.replace(chip, memory=limit) if limit else chip
  return Target(devices=devices, chip=chip, compiler="cuda", exact=exact)


def tpu_devices(topology: Topology, slices: int) -> list[Any]:
  """Devices to compile for, none of which need be there."""
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if topology.size == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if topology.name.startswith("v4"):
    options["chip_config_name"] = "megacore"  # one device a chip, as on a v4 itself
  return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)


def compile(lowered: jax.stages.Lowered, chip: Chip) -> Compiled:
  """Compiles, and reads what came out. A program too large for the TPU compiler is an answer, not an error."""
  try:
    program = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = memory_needed(str(error))
    if needed is None:
      raise
    return Compiled(arguments=0, temporaries=needed, outputs=0, fits=False)
  memory: Any = program.memory_analysis()
  costs, text = program.cost_analysis() or {}, program.as_text() or ""
  compiled = Compiled(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    seconds=estimated_seconds(costs, text),
    seconds_by_cycles=(hlo.estimated_cycles(text) / chip.clock or None) if chip.clock else None,
    operations=costs.get("flops"),
    collectives=hlo.bytes_by_kind(text),
    fits=True,
    text=text,
  )
  return dataclasses.replace(compiled, fits=compiled.memory <= chip.memory)


def estimated_seconds(costs: Mapping[str, float], text: str) -> float | None:
  """The compiler's sum over a program; None if it has none."""
  if any(f'custom_call_target="{name}"' in text for name in _COUNTED_AS_MINUS_ONE):
    return None
  return max(costs.get("optimal_seconds", 0.0), 0.0) or None


def memory_needed(message: str) -> int | None:
  """Bytes that a program would have used, by the TPU compiler's refusal; None if it is not one."""
  match = _OUT_OF_MEMORY.search(message)
  return int(float(match[1]) * _UNITS[match[2]]) if match else None
