"""How long a compiled program should take, by what its text, the compiler's costs and the schedules say."""

from __future__ import annotations

from collections.abc import Mapping

from diffdis_jax.parallel.chips import Chip
from diffdis_jax.preflight import hlo

_USABLE = 0.85  # of a memory's bandwidth

# What the TPU compiler has no estimate for, and puts into its sum of seconds with -1 each; they take next to nothing.
_COUNTED_AS_MINUS_ONE = ("ZeroCrop", "ConcatBitcast")


def estimated_seconds(costs: Mapping[str, float], text: str, chip: Chip, in_kernels: float) -> float | None:
  """The compiler's sum over a program; None if it has none.

  Args:
    in_kernels: seconds that the program's kernels take, instead of what the compiler charges for them.
  """
  if any(f'custom_call_target="{name}"' in text for name in _COUNTED_AS_MINUS_ONE):
    return None
  seconds = costs.get("optimal_seconds", 0.0)
  if seconds > 0 and in_kernels and chip.charged:
    seconds += in_kernels - sum(chip.charged.seconds(**vars(kernel)) for kernel in hlo.kernels(text).values())
  return max(seconds, 0.0) or None


def cycles_of_all(text: str, written: Mapping[str, int]) -> dict[str, int]:
  """Operation -> cycles by its schedule, where one alone is written for operations that are alike."""
  numbers = hlo.alike(text)
  cycles = {numbers[name]: count for name, count in written.items() if name in numbers}
  return {**written, **{name: cycles[number] for name, number in numbers.items() if number in cycles}}


def seconds_by_roof(text: str, cycles: Mapping[str, int], chip: Chip) -> float | None:
  """Of each operation the longer of its schedule and its memory traffic, added up; None where there are no schedules,
  or loops, whose turns the text does not say."""
  if not cycles or not chip.clock or hlo.has_loops(text):
    return None
  moved = hlo.traffic(text)
  # Both: a kernel has cycles and may have no traffic that the text shows, a copy has traffic alone.
  names = moved.keys() | (cycles.keys() & hlo.operations(text))
  usable = _USABLE * chip.bandwidth
  return sum(max(cycles.get(name, 0) / chip.clock, moved.get(name, 0) / usable) for name in names)


def seconds_between_chips(text: str, chip: Chip, near: int | None) -> float | None:
  """What the devices send each other, at what all of a device's links, or its share of the network, can carry.

  Args:
    near: devices that links join; those of other numbers are reached by the network. None: all.
  """
  total = 0.0
  for each in hlo.collectives(text):
    far = near is not None and len({device // near for device in each.group}) > 1
    speed = chip.network if far else chip.links
    if speed is None:
      return None
    total += each.received / speed
  return total
