"""A table of accelerators, and the sets of them that can be rented. Figures are the makers', per device of JAX."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from diffdis_jax.errors import UserError


class Charged(NamedTuple):
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
    kind: JAX's name of it. Cards of one name with another memory or plug are other chips.
    links: to the devices beside it, all of them together, bytes a second in one direction.
    network: a device's usual share of what joins GPU hosts, bytes a second in one direction; None of TPUs and of cards
      that are rented in single hosts.
    clock: cycles a second, for TPUs, whose compiler estimates cycles.
    charged: the compiler's charge for kernels, for TPUs.
  """

  flops: float
  memory: float
  bandwidth: float
  kind: str
  links: float
  network: float | None = None
  clock: float | None = None
  charged: Charged | None = None

  @property
  def platform(self) -> str:
    """Return JAX's name of the platform that the chip belongs to."""
    return "tpu" if self.kind.startswith("TPU") else "gpu"


GIB = 2**30
CHIPS = {
  "v4": Chip(275e12, 32 * GIB, 1.228e12, "TPU v4", 300e9, None, 1.05e9, Charged(274e12, 1.0755e12, 0.9825e12)),
  "v5e": Chip(197e12, 16 * GIB, 0.819e12, "TPU v5 lite", 200e9, None, 1.5e9, Charged(197e12, 1.536e12, 0.7377e12)),
  "v5p": Chip(459e12, 95 * GIB, 2.765e12, "TPU v5", 600e9, None, 1.75e9, Charged(394e12, 3.072e12, 2.3504e12)),
  "v6e": Chip(918e12, 32 * GIB, 1.64e12, "TPU v6 lite", 448e9, None, 1.75e9, Charged(918e12, 1.792e12, 1.638e12)),
  # By NVIDIA's data sheets: of bf16 with sums in f32, without sparsity, which many of them count in. PCIe's links are
  # of 16 lanes.
  "a100": Chip(312e12, 80 * GIB, 2.039e12, "NVIDIA A100-SXM4-80GB", 300e9, 25e9),
  "a100-40": Chip(312e12, 40 * GIB, 1.555e12, "NVIDIA A100-SXM4-40GB", 300e9, 25e9),
  "h100": Chip(989e12, 80 * GIB, 3.35e12, "NVIDIA H100 80GB HBM3", 450e9, 50e9),
  "h100pcie": Chip(756e12, 80 * GIB, 2.0e12, "NVIDIA H100 PCIe", 64e9, 25e9),
  "h200": Chip(989e12, 141e9, 4.8e12, "NVIDIA H200", 450e9, 50e9),
  "b200": Chip(2250e12, 180e9, 8.0e12, "NVIDIA B200", 900e9, 50e9),
  # The data sheet of the L4 (2023) has 242 TFLOPS with sparsity; that of the A10G, for AWS (2022), 70, where an A10 has
  # 125; appendix A of the white paper of the Ada architecture (2022) 165.2 with sums in f32, 330.3 in f16.
  "l4": Chip(121e12, 24 * GIB, 0.3e12, "NVIDIA L4", 32e9),
  "a10g": Chip(70e12, 24 * GIB, 0.6e12, "NVIDIA A10G", 32e9),
  "rtx4090": Chip(165.2e12, 24 * GIB, 1.008e12, "NVIDIA GeForce RTX 4090", 32e9),
}
_TORUS_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_TORUS_3D = "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"
# The numbers of GPUs are those of a host and then hosts; 24 GB cards are rented in single hosts.
_ONE_HOST, _HOSTS = "1 2 4 8", "1 2 4 8 4x2 8x2 8x4 8x8 8x16 8x32"
LAYOUTS = {
  name: tuple(layouts.split())
  for names, layouts in (
    ("v5e v6e", _TORUS_2D),
    ("v4 v5p", _TORUS_3D),
    ("a100 a100-40 h100 h100pcie h200 b200", _HOSTS),
    ("l4 a10g rtx4090", _ONE_HOST),
  )
  for name in names.split()
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Chips that one network joins: `v5e:8x8`; of GPUs, those of a host and, if there are several, hosts: `h100:8x4`."""

  name: str
  kind: str
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
  return Topology(name=name, kind=chip, chip=CHIPS[chip], shape=tuple(map(int, layout.split("x"))))
