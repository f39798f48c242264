"""What accelerators can do, and which sets of them can be rented. Figures are the makers', per device of JAX."""

from __future__ import annotations

import dataclasses
import math

from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Charged:
  """What the TPU compiler's `optimal_seconds` charges for a kernel by its declared cost: the longest of operations,
  transcendentals and bytes, at so many a second. Found by kernels of known cost (JAX 0.10.2, libtpu 0.0.42.1)."""

  flops: float
  transcendentals: float
  bandwidth: float

  def seconds(self, *, flops: float, transcendentals: float, bytes: float) -> float:
    return max(flops / self.flops, transcendentals / self.transcendentals, bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device.

  Attributes:
    flops: peak bf16 operations a second (a multiply-add is two).
    memory: bytes.
    bandwidth: of that memory, bytes a second.
    kind: how JAX names it, and nothing else: cards of one name with another memory or plug are other chips, and a part
      of a card (MIG) is none.
    aliases: other names of it, of JAX or of those who rent it.
    links: to the devices beside it, all of them together, bytes a second in one direction.
    network: a device's share of what joins GPU hosts, bytes a second in one direction, as is usual; None of TPUs and of
      cards that are rented in single hosts.
    clock: cycles a second, of those whose compiler estimates cycles.
    charged: of TPUs.
  """

  flops: float
  memory: float
  bandwidth: float
  kind: str
  links: float
  aliases: tuple[str, ...] = ()
  network: float | None = None
  clock: float | None = None
  charged: Charged | None = None

  @property
  def platform(self) -> str:
    """JAX's name of what it belongs to."""
    return "tpu" if self.kind.startswith("TPU") else "gpu"


GIB = 2**30
# By NVIDIA's data sheets: of bf16 with sums in f32, without sparsity, which many of them count in.
_A100 = Chip(flops=312e12, memory=80 * GIB, bandwidth=2.039e12, kind="NVIDIA A100-SXM4-80GB", links=300e9, network=25e9)
_H100 = Chip(flops=989e12, memory=80 * GIB, bandwidth=3.35e12, kind="NVIDIA H100 80GB HBM3", links=450e9, network=50e9)
_PCIE_4, _PCIE_5 = 32e9, 64e9  # of 16 lanes, bytes a second in one direction
_NVIDIA = {
  "a100": _A100,
  "a100-40": dataclasses.replace(_A100, kind="NVIDIA A100-SXM4-40GB", memory=40 * GIB, bandwidth=1.555e12),
  "a100pcie": dataclasses.replace(_A100, kind="NVIDIA A100 80GB PCIe", bandwidth=1.935e12, links=_PCIE_4),
  "a100pcie-40": dataclasses.replace(
    _A100, kind="NVIDIA A100-PCIE-40GB", memory=40 * GIB, bandwidth=1.555e12, links=_PCIE_4
  ),
  "h100": _H100,
  "h100pcie": dataclasses.replace(
    _H100, kind="NVIDIA H100 PCIe", flops=756e12, bandwidth=2.0e12, links=_PCIE_5, network=25e9
  ),
  "h100nvl": dataclasses.replace(
    _H100, kind="NVIDIA H100 NVL", flops=835e12, memory=94e9, bandwidth=3.9e12, links=300e9, network=25e9
  ),
  "h200": dataclasses.replace(_H100, kind="NVIDIA H200", memory=141e9, bandwidth=4.8e12),
  "b200": Chip(flops=2250e12, memory=180e9, bandwidth=8.0e12, kind="NVIDIA B200", links=900e9, network=50e9),
  # Data sheet of the L4 (2023): 242 TFLOPS with sparsity, 300 GB/s.
  "l4": Chip(flops=121e12, memory=24 * GIB, bandwidth=0.3e12, kind="NVIDIA L4", links=_PCIE_4),
  # Data sheet of the A10G, for AWS (2022): 70 TFLOPS, where an A10 has 125; 600 GB/s.
  "a10g": Chip(flops=70e12, memory=24 * GIB, bandwidth=0.6e12, kind="NVIDIA A10G", links=_PCIE_4),
  # White paper of the Ada architecture (2022), appendix A: 165.2 TFLOPS with sums in f32, 330.3 in f16; 1,008 GB/s.
  "rtx4090": Chip(flops=165.2e12, memory=24 * GIB, bandwidth=1.008e12, kind="NVIDIA GeForce RTX 4090", links=_PCIE_4),
}
CHIPS = {
  "v4": Chip(
    flops=275e12,
    memory=32 * GIB,
    bandwidth=1.228e12,
    kind="TPU v4",
    links=300e9,
    clock=1.05e9,
    charged=Charged(flops=274e12, transcendentals=1.0755e12, bandwidth=0.9825e12),
  ),
  "v5e": Chip(
    flops=197e12,
    memory=16 * GIB,
    bandwidth=0.819e12,
    kind="TPU v5 lite",
    aliases=("TPU v5e", "TPU v5litepod"),
    links=200e9,
    clock=1.5e9,
    charged=Charged(flops=197e12, transcendentals=1.536e12, bandwidth=0.7377e12),
  ),
  "v5p": Chip(
    flops=459e12,
    memory=95 * GIB,
    bandwidth=2.765e12,
    kind="TPU v5",
    aliases=("TPU v5p",),
    links=600e9,
    clock=1.75e9,
    charged=Charged(flops=394e12, transcendentals=3.072e12, bandwidth=2.3504e12),
  ),
  "v6e": Chip(
    flops=918e12,
    memory=32 * GIB,
    bandwidth=1.64e12,
    kind="TPU v6 lite",
    aliases=("TPU v6e",),
    links=448e9,
    clock=1.75e9,
    charged=Charged(flops=918e12, transcendentals=1.792e12, bandwidth=1.638e12),
  ),
} | _NVIDIA

_TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS_3D = (
  *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
  "16x16x16",
)
_ONE_HOST = ("1", "2", "4", "8")
_GPUS = (*_ONE_HOST, "4x2", "8x2", "8x4", "8x8", "8x16")
LAYOUTS = {name: _TORUS_2D for name in ("v5e", "v6e")} | {name: _TORUS_3D for name in ("v4", "v5p")}
LAYOUTS |= {name: _GPUS for name in ("a100", "a100-40", "h100", "h100pcie", "h200", "b200")}
LAYOUTS |= {name: _ONE_HOST for name in ("l4", "a10g", "rtx4090")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Chips that one network joins: `v5e:8x8`; of GPUs, those of a host and, if there are several, hosts: `h100:8x4`."""

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def a_host(self) -> int | None:
    """GPUs of a host."""
    return None if self.is_tpu else self.shape[0]

  @property
  def is_tpu(self) -> bool:
    return self.chip.platform == "tpu"


def parse(name: str) -> Topology:
  """Raises UserError for a topology that is not in LAYOUTS."""
  chip, _, layout = name.partition(":")
  if layout not in LAYOUTS.get(chip, ()):
    known = "; ".join(f"{known}: {' '.join(layouts)}" for known, layouts in LAYOUTS.items())
    raise UserError(f"unknown topology {name!r}; it is CHIP:LAYOUT, such as v5e:8x8, of {known}")
  return Topology(name=name, chip=CHIPS[chip], shape=tuple(map(int, layout.split("x"))))


def find(kind: str) -> Chip | None:
  """The chip that JAX calls `kind`; None where none is known under that name."""
  return next((chip for chip in CHIPS.values() if kind in (chip.kind, *chip.aliases)), None)


def of_kind(kind: str) -> Chip:
  """The chip that JAX calls `kind`.

  Raises:
    UserError: none is known under that name.
  """
  chip = find(kind)
  if chip is None:
    raise UserError(f"no figures for {kind!r}; known: {', '.join(chip.kind for chip in CHIPS.values())}")
  return chip
