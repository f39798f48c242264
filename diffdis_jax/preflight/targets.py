"""Find devices to compile for, present or not, and read what the compiler reports of a program."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffdis_jax.errors import UserError, not_installed
from diffdis_jax.preflight import gpus, hlo, times
from diffdis_jax.preflight.chips import Chip, Topology

# The TPU compiler loads without a TPU, beside another process that has loaded it, and asks no metadata server.
_LIBTPU = dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_WORKER_HOSTNAMES="localhost")
_LIBTPU |= dict(TPU_WORKER_ID="0", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
# The part of a GPU's memory that JAX may take, as the launchers set it (launch/supervise.sh); JAX's default is 0.75.
# The rest is the driver's, and of what NCCL and cuDNN allocate.
GPU_MEMORY = 0.9
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([BKMG]) of ([\d.]+)([BKMG]) hbm")

# Options of XLA for GPUs, whose programs are only looked at: they use the same memory and collectives, and compile
# sooner.
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_gpu_disable_gpuasm_optimizations": True}
_QUICKLY |= {"xla_gpu_enable_triton_gemm": False}
# NVIDIA's packages that jax's extras bring: CUDA 12's name, CUDA 13's.
CUDA = ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime")
CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """The devices and the compiler that a program is compiled with.

  Attributes:
    compiler: tpu or cuda, the chip's own; or cpu: then memory and collectives are those of a CPU's program, and
      there is no estimate of its time.
    options: of the compiler.
    near: devices that `Chip.links` joins; those of other numbers are reached by `Chip.network`. None: all.
  """

  devices: list[Any]
  chip: Chip
  compiler: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  near: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """The compiler's report of a program; bytes are those of one device. Times are None where it has none.

  Attributes:
    arguments, temporaries, outputs: bytes; outputs that reuse donated arguments are not counted again.
    seconds: the compiler's own estimate, in which kernels count by their schedules.
    seconds_by_cycles: its estimates of the operations' cycles, and its kernels' schedules, by the chip's clock.
    traffic: what reaches it from the others.
    collectives: bytes by kind.
    text: the program; empty where it does not fit.
  """

  arguments: int
  temporaries: int
  outputs: int
  seconds: float | None = None
  seconds_by_cycles: float | None = None
  traffic: times.Traffic = times.Traffic()
  collectives: dict[str, int] = dataclasses.field(default_factory=dict)
  text: str = dataclasses.field(repr=False, default="")

  @property
  def memory(self) -> int:
    return self.arguments + self.temporaries + self.outputs


def is_installed(compiler: str) -> bool:
  """Return whether the compiler for TPUs (libtpu) or for NVIDIA's GPUs (jax's plugin) is installed."""
  if compiler == "tpu":
    return importlib.util.find_spec("libtpu") is not None
  return any(plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins"))


def find(platform: str, topology: Topology, slices: int) -> Target:
  """Find the devices of a topology. Raises UserError where there are no such devices."""
  chip, near = topology.chip, topology.size if slices > 1 else topology.a_host
  if not topology.is_tpu:  # of a TPU's memory its compiler knows what a program may fill
    chip = dataclasses.replace(chip, memory=GPU_MEMORY * gpus.GPUS[topology.kind].memory)
  options: Mapping[str, Any] = {}
  if platform == "tpu":
    devices = tpu_devices(topology, slices)
  elif platform == "cpu":
    devices = jax.devices("cpu")[: topology.size * slices]
  elif slices > 1:
    raise UserError(f"--slices={slices} is of TPUs; several hosts of GPUs are a topology, such as h100:8x{slices}")
  else:
    devices, options = gpu_devices(topology), _QUICKLY
  return Target(devices=devices, chip=chip, compiler=platform, options=options, near=near)


def gpu_devices(topology: Topology) -> list[Any]:
  """Return devices to compile for, none of which need be there; `h100:8x4` is four hosts of eight."""
  from jax.experimental import topologies

  a_host, *rest = topology.shape
  hosts = rest[0] if rest else 1
  config = gpus.target_config(gpus.GPUS[topology.kind], topology.chip, cuda=_version(CUDA), cudnn=_version(CUDNN))
  layout = f"1x{hosts}x{a_host}"  # slices, hosts of one, devices of one
  return list(topologies.get_topology_desc(platform="cuda", target_config=config, topology=layout).devices)


def _version(names: Sequence[str]) -> list[int]:
  """Return major, minor and patch of the first of these packages that is installed. Raises UserError: none is."""
  installed = itertools.chain.from_iterable(importlib.metadata.distributions(name=name) for name in names)
  if (package := next(installed, None)) is not None:
    return [int(part) for part in package.version.split(".")[:3]]
  raise not_installed("the compiler", f"one of {', '.join(names)}", "cuda")


def tpu_devices(topology: Topology, slices: int) -> list[Any]:
  """Return devices to compile for, none of which need be there."""
  # Before libtpu is loaded, which reads them once. What the user has set stays.
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if topology.size == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  times.ask_for_schedules()
  if topology.name.startswith("v4"):
    options["chip_config_name"] = "megacore"  # one device a chip, as on a v4 itself
  return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)


def compile(lowered: jax.stages.Lowered, target: Target) -> Compiled:
  """Compile, and read the result. A program too large for the TPU compiler is an answer, not an error."""
  chip = target.chip
  if target.compiler == "tpu":
    times.clear_schedules()  # what lies there is taken for this program's
  try:
    program = lowered.compile(compiler_options=dict(target.options) or None)
  except jax.errors.JaxRuntimeError as error:
    needed = memory_needed(str(error))
    if needed is None:
      raise
    return Compiled(arguments=0, temporaries=needed, outputs=0)
  memory: Any = program.memory_analysis()
  costs, text = program.cost_analysis() or {}, program.as_text() or ""
  cycles = times.cycles_by_operation(times.schedules()) if target.compiler == "tpu" else {}
  in_kernels = times.seconds_in_kernels(text, cycles, chip)
  return Compiled(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    seconds=times.estimated_seconds(costs, text, chip, in_kernels),
    seconds_by_cycles=(hlo.estimated_cycles(text) / chip.clock + in_kernels or None) if chip.clock else None,
    traffic=times.traffic(text, target.near),
    collectives=hlo.bytes_by_kind(text),
    text=text,
  )


def memory_needed(message: str) -> int | None:
  """Return the bytes that a program would have used, by the TPU compiler's refusal; None if the message is not one."""
  match = _OUT_OF_MEMORY.search(message)
  return int(float(match[1]) * _UNITS[match[2]]) if match else None
