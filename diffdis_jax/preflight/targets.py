"""Find devices to compile for, present or not, and read what the compiler reports of a program."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffdis_jax.errors import UserError, not_installed
from diffdis_jax.parallel.chips import Chip, Topology, of_kind
from diffdis_jax.preflight import gpus, hlo, schedules, times

PLATFORMS = ("tpu", "cpu", "cuda")
# The TPU compiler loads without a TPU, beside another process that has loaded it, and asks no metadata server.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The part of a GPU's memory that JAX may take, as the launchers set it (launch/supervise.sh); JAX's default is 0.75.
# The rest is the driver's, and of what NCCL and cuDNN allocate.
GPU_MEMORY = 0.9
# JAX's own variables for it, of which the second is the older one; both at once it refuses.
MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([BKMG]) of ([\d.]+)([BKMG]) hbm")

# Options of XLA for GPUs, whose programs are only looked at: they use the same memory and collectives, and compile
# sooner.
_QUICKLY = {
  "xla_backend_optimization_level": 0,
  "xla_gpu_disable_gpuasm_optimizations": True,
  "xla_gpu_enable_triton_gemm": False,
}
# NVIDIA's packages that jax's extras bring: CUDA 12's name, CUDA 13's.
CUDA = ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime")
CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """The devices and the compiler that a program is compiled with.

  Attributes:
    devices: jax's, to which it gives no type.
    compiler: of PLATFORMS.
    exact: whether it compiles for the chip itself. Otherwise memory and collectives are those of another device's
      program, and there is no estimate of its time.
    options: of the compiler.
    near: devices that `Chip.links` joins; those of other numbers are reached by `Chip.network`. None: all.
  """

  devices: list[Any]
  chip: Chip
  compiler: str
  exact: bool
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  near: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """The compiler's report of a program; bytes and operations are those of one device.

  Attributes:
    arguments, temporaries, outputs: bytes; outputs that reuse donated arguments are not counted again.
    seconds: the compiler's own estimate, None where it has none. Kernels, for which it takes what they declare, count
      by their schedules instead.
    seconds_by_cycles: its estimates of the operations' cycles, added up, by the chip's clock; None where it has none.
      It has none for kernels, which count by their schedules.
    seconds_by_roof: of each operation the longer of its schedule and its memory traffic, added up; None where there are
      no schedules, or loops.
    seconds_between_chips: what they send each other, at all the links can carry. It may overlap with the rest or not.
      None where part of it takes a way of unknown speed.
    traffic: what reaches it from the others.
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
  seconds_by_roof: float | None = None
  seconds_between_chips: float | None = None
  traffic: times.Traffic = times.Traffic()
  operations: float | None = None
  collectives: dict[str, int] = dataclasses.field(default_factory=dict)
  text: str = dataclasses.field(repr=False, default="")

  @property
  def memory(self) -> int:
    return self.arguments + self.temporaries + self.outputs


def choose_platform(platform: str | None, topology: Topology | None) -> str:
  """Return the compiler for a topology: the one asked for, or that of its chips where it is installed, or XLA's for
  CPUs."""
  # A machine may have both compilers: which one is asked for is said by the chips, not by what is installed.
  own = "tpu" if topology and topology.is_tpu else "cuda"
  if platform is None:
    platform = own if topology and is_installed(own) else "cpu"
  if platform != "cpu" and not is_installed(platform):
    package = {"tpu": "libtpu", "cuda": "jax's CUDA plugin"}[platform]
    raise not_installed(f"--platform={platform}", package, platform, otherwise="take --platform=cpu")
  if topology is None:
    if platform != "cuda":
      raise UserError("give --topology, such as v5e:8x8; only --platform=cuda can do without")
  elif platform not in ("cpu", own):
    raise UserError(f"--platform={platform} cannot compile for {topology.name}; take --platform={own} or cpu")
  return platform


def is_installed(compiler: str) -> bool:
  """Return whether the compiler for TPUs (libtpu) or for NVIDIA's GPUs (jax's plugin) is installed."""
  if compiler == "tpu":
    return importlib.util.find_spec("libtpu") is not None
  return any(plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins"))


def prepare(platform: str, topology: Topology | None, slices: int) -> None:
  """Apply the settings that JAX reads once, before it first looks for devices."""
  if topology is None:
    if not any(map(os.environ.get, MEMORY_VARIABLES)):
      os.environ[MEMORY_VARIABLES[-1]] = str(GPU_MEMORY)
    jax.config.update("jax_platforms", "cuda,cpu")
    return
  jax.config.update("jax_platforms", "cpu")
  if platform == "cpu":
    jax.config.update("jax_num_cpu_devices", topology.size * slices)


def gpu_memory() -> float:
  """Return the part of a GPU's memory that JAX may take. Raises UserError: its variable is no number above 0."""
  for name in MEMORY_VARIABLES:
    if value := os.environ.get(name):
      try:
        fraction = float(value)
      except ValueError:
        fraction = 0.0
      if not 0 < fraction < math.inf:
        raise UserError(f"{name} is {value!r}; it is a part of a GPU's memory, such as {GPU_MEMORY}")
      return fraction
  return GPU_MEMORY


def _usable(topology: Topology) -> Chip:
  """Return the chip with the memory that a program may fill: of a TPU its compiler knows more, of a GPU
  `gpu_memory`."""
  if topology.is_tpu:
    return topology.chip
  return dataclasses.replace(topology.chip, memory=gpu_memory() * _gpu(topology).memory)


def _gpu(topology: Topology) -> gpus.Gpu:
  return gpus.GPUS[topology.name.partition(":")[0]]


def find(platform: str, topology: Topology | None, slices: int) -> Target:
  """Find the devices of a topology; call `prepare` before it. Raises UserError where there are no such devices."""
  if topology is None:
    return _present_gpus()
  chip, near = _usable(topology), topology.size if slices > 1 else topology.a_host
  if platform == "cuda":
    if slices > 1:
      raise UserError(f"--slices={slices} is of TPUs; several hosts of GPUs are a topology, such as h100:8x{slices}")
    devices = gpu_devices(topology)
    return Target(devices=devices, chip=chip, compiler="cuda", exact=True, options=_QUICKLY, near=near)
  if platform == "tpu":
    return Target(devices=tpu_devices(topology, slices), chip=chip, compiler="tpu", exact=True, near=near)
  devices = jax.devices("cpu")
  if len(devices) < topology.size * slices:
    raise UserError(
      f"{topology.name} needs {topology.size * slices} CPU devices, but this process has {len(devices)}; unset"
      " JAX_NUM_CPU_DEVICES and XLA_FLAGS"
    )
  return Target(devices=devices[: topology.size * slices], chip=chip, compiler="cpu", exact=False, near=near)


def _present_gpus() -> Target:
  try:
    devices = jax.devices("cuda")
  except RuntimeError as error:
    raise UserError(
      "--platform=cuda without --topology finds no GPU that JAX can use; name GPUs that are not there, such as"
      " --topology=h100:8"
    ) from error
  chip = of_kind(devices[0].device_kind)
  # What JAX may use of this very card, by the same part (`prepare`), and a card of one kind may come with less memory.
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  chip = dataclasses.replace(chip, memory=limit) if limit else chip
  return Target(devices=devices, chip=chip, compiler="cuda", exact=True)


def gpu_devices(topology: Topology) -> list[Any]:
  """Return devices to compile for, none of which need be there; `h100:8x4` is four hosts of eight."""
  from jax.experimental import topologies

  a_host, *rest = topology.shape
  hosts = rest[0] if rest else 1
  config = gpus.target_config(_gpu(topology), topology.chip, cuda=_version(CUDA), cudnn=_version(CUDNN))
  layout = f"1x{hosts}x{a_host}"  # slices, hosts of one, devices of one
  return list(topologies.get_topology_desc(platform="cuda", target_config=config, topology=layout).devices)


def _version(names: Sequence[str]) -> list[int]:
  """Return the version, as major, minor and patch, of the first of these packages that is installed.

  Raises:
    UserError: none is.
  """
  for name in names:
    try:
      return [int(part) for part in importlib.metadata.version(name).split(".")[:3]]
    except importlib.metadata.PackageNotFoundError:
      continue
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
  schedules.ask_for_them()
  if topology.name.startswith("v4"):
    options["chip_config_name"] = "megacore"  # one device a chip, as on a v4 itself
  return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)


def compile(lowered: jax.stages.Lowered, target: Target) -> Compiled:
  """Compile, and read the result. A program too large for the TPU compiler is an answer, not an error."""
  chip = target.chip
  if target.compiler == "tpu":
    schedules.clear()  # what lies there is taken for this program's
  try:
    program = lowered.compile(compiler_options=dict(target.options or {}) or None)
  except jax.errors.JaxRuntimeError as error:
    needed = memory_needed(str(error))
    if needed is None:
      raise
    return Compiled(arguments=0, temporaries=needed, outputs=0, fits=False)
  memory: Any = program.memory_analysis()
  costs, text = program.cost_analysis() or {}, program.as_text() or ""
  written = schedules.cycles_by_operation(schedules.folder()) if target.compiler == "tpu" else {}
  cycles = times.cycles_of_all(text, written)
  in_kernels = times.seconds_in_kernels(text, cycles, chip)
  traffic = times.traffic(text, target.near)
  compiled = Compiled(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    seconds=times.estimated_seconds(costs, text, chip, in_kernels),
    seconds_by_cycles=(hlo.estimated_cycles(text) / chip.clock + in_kernels or None) if chip.clock else None,
    seconds_by_roof=times.seconds_by_roof(text, cycles, chip),
    seconds_between_chips=traffic.seconds(chip),
    traffic=traffic,
    operations=costs.get("flops"),
    collectives=hlo.bytes_by_kind(text),
    fits=True,
    text=text,
  )
  return dataclasses.replace(compiled, fits=compiled.memory <= chip.memory)


def memory_needed(message: str) -> int | None:
  """Return the bytes that a program would have used, by the TPU compiler's refusal; None if the message is not one."""
  match = _OUT_OF_MEMORY.search(message)
  return int(float(match[1]) * _UNITS[match[2]]) if match else None
