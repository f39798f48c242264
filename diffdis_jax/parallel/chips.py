"""The abilities of accelerators, and the sets of them that can be rented. Figures are the makers', per device of
JAX."""

from __future__ import annotations

import dataclasses
import math

from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Charged:
  """The TPU compiler's charge (`optimal_seconds`) for a kernel by its declared cost: the longest of operations,
  transcendentals and bytes, at so many a second. Found by kernels of known cost (JAX 0.10.2, libtpu 0.0.42.1)."""

  flops: float
  transcendentals: float
  bandwidth: float

  def seconds(self, *, flops: float, transcendentals: float, bytes: float) -> float:
    return max(flops / self.flops, transcendentals / self.transcendentals, bytes / self.bandwidth)


@dataclasses.dataclass(frozen=True)
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
    """Return JAX's name of the platform that the chip belongs to."""
    return "tpu" if self.kind.startswith("TPU") else "gpu"


GIB = 2**30
_PCIE_4, _PCIE_5 = 32e9, 64e9  # of 16 lanes, bytes a second in one direction
# By NVIDIA's data sheets: of bf16 with sums in f32, without sparsity, which many of them count in.
_A100 = Chip(312e12, 80 * GIB, 2.039e12, "NVIDIA A100-SXM4-80GB", links=300e9, network=25e9)
_H100 = Chip(989e12, 80 * GIB, 3.35e12, "NVIDIA H100 80GB HBM3", links=450e9, network=50e9)
_A100_40 = dataclasses.replace(_A100, kind="NVIDIA A100-SXM4-40GB", memory=40 * GIB, bandwidth=1.555e12)
_NVIDIA = {
  "a100": _A100,
  "a100-40": _A100_40,
  "a100pcie": dataclasses.replace(_A100, kind="NVIDIA A100 80GB PCIe", bandwidth=1.935e12, links=_PCIE_4),
  "a100pcie-40": dataclasses.replace(_A100_40, kind="NVIDIA A100-PCIE-40GB", links=_PCIE_4),
  "h100": _H100,
  "h100pcie": Chip(756e12, 80 * GIB, 2.0e12, "NVIDIA H100 PCIe", links=_PCIE_5, network=25e9),
  "h100nvl": Chip(835e12, 94e9, 3.9e12, "NVIDIA H100 NVL", links=300e9, network=25e9),
  "h200": dataclasses.replace(_H100, kind="NVIDIA H200", memory=141e9, bandwidth=4.8e12),
  "b200": Chip(2250e12, 180e9, 8.0e12, "NVIDIA B200", links=900e9, network=50e9),
  # Data sheet of the L4 (2023): 242 TFLOPS with sparsity, 300 GB/s.
  "l4": Chip(121e12, 24 * GIB, 0.3e12, "NVIDIA L4", links=_PCIE_4),
  # Data sheet of the A10G, for AWS (2022): 70 TFLOPS, where an A10 has 125; 600 GB/s.
  "a10g": Chip(70e12, 24 * GIB, 0.6e12, "NVIDIA A10G", links=_PCIE_4),
  # White paper of the Ada architecture (2022), appendix A: 165.2 TFLOPS with sums in f32, 330.3 in f16; 1,008 GB/s.
  "rtx4090": Chip(165.2e12, 24 * GIB, 1.008e12, "NVIDIA GeForce RTX 4090", links=_PCIE_4),
}
# A bare name of JAX's for a TPU, such as "TPU v5", is not its family but one chip of it; the others have `lite`.
CHIPS = {
  "v4": Chip(
    *(275e12, 32 * GIB, 1.228e12, "TPU v4"), links=300e9, clock=1.05e9, charged=Charged(274e12, 1.0755e12, 0.9825e12)
  ),
  "v5e": Chip(
    *(197e12, 16 * GIB, 0.819e12, "TPU v5 lite"),
    aliases=("TPU v5e", "TPU v5litepod"),
    links=200e9,
    clock=1.5e9,
    charged=Charged(197e12, 1.536e12, 0.7377e12),
  ),
  "v5p": Chip(
    *(459e12, 95 * GIB, 2.765e12, "TPU v5"),
    aliases=("TPU v5p",),
    links=600e9,
    clock=1.75e9,
    charged=Charged(394e12, 3.072e12, 2.3504e12),
  ),
  "v6e": Chip(
    *(918e12, 32 * GIB, 1.64e12, "TPU v6 lite"),
    aliases=("TPU v6e",),
    links=448e9,
    clock=1.75e9,
    charged=Charged(918e12, 1.792e12, 1.638e12),
  ),
} | _NVIDIA

_TORUS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_TORUS_3D = (
  *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
  "16x16x16",
)
# The numbers of GPUs are those of a host and then hosts; 24 GB cards are rented in single hosts.
_ONE_HOST = ("1", "2", "4", "8")
_GPUS = (*_ONE_HOST, "4x2", "8x2", "8x4", "8x8", "8x16", "8x32")
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
    """Return the number of GPUs of a host."""
    return None if self.is_tpu else self.shape[0]

  @property
  def is_tpu(self) -> bool:
    return self.chip.platform == "tpu"


def parse(name: str) -> Topology:
  """Parse a topology such as `v5e:8x8`. Raise UserError for one that is not in LAYOUTS."""
  chip, _, layout = name.partition(":")
  if layout not in LAYOUTS.get(chip, ()):
    known = "; ".join(f"{known}: {' '.join(layouts)}" for known, layouts in LAYOUTS.items())
    raise UserError(f"unknown topology {name!r}; it is CHIP:LAYOUT, such as v5e:8x8, of {known}")
  return Topology(name=name, chip=CHIPS[chip], shape=tuple(map(int, layout.split("x"))))


def find(kind: str) -> Chip | None:
  """Return the chip that JAX calls `kind`; None where none is known under that name."""
  return next((chip for chip in CHIPS.values() if kind in (chip.kind, *chip.aliases)), None)


def of_kind(kind: str) -> Chip:
  """Return the chip that JAX calls `kind`.

  Raises:
    UserError: none is known under that name.
  """
  chip = find(kind)
  if chip is None:
    raise UserError(f"no figures for {kind!r}; known: {', '.join(chip.kind for chip in CHIPS.values())}")
  return chip
