"""Estimate how long a compiled program takes, by its text, the compiler's costs and the schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffdis_jax.parallel.chips import Chip
from diffdis_jax.preflight import hlo

_USABLE = 0.85  # of a memory's bandwidth

# What the TPU compiler has no estimate for, and puts into its sum of seconds with -1 each; they take next to nothing.
_COUNTED_AS_MINUS_ONE = ("ZeroCrop", "ConcatBitcast")


def estimated_seconds(costs: Mapping[str, float], text: str, chip: Chip, in_kernels: float) -> float | None:
  """Return the compiler's sum over a program; None if it has none.

  It takes a loop's body once: what it says grows as cycles do when each body counts as often as it turns.

  Args:
    in_kernels: seconds that the program's kernels take, instead of what the compiler charges for them.
  """
  if any(f'custom_call_target="{name}"' in text for name in _COUNTED_AS_MINUS_ONE):
    return None
  seconds = costs.get("optimal_seconds", 0.0)
  if seconds <= 0:
    return None
  once = hlo.estimated_cycles(text, turns=False)
  turns = hlo.estimated_cycles(text) / once if once else 1.0
  if not (in_kernels and chip.charged):
    return turns * seconds
  charged = sum(
    chip.charged.seconds(flops=each.flops, transcendentals=each.transcendentals, bytes=each.bytes)
    for each in hlo.kernels(text).values()
  )
  return max(turns * (seconds - charged) + in_kernels, 0.0) or None


def seconds_in_kernels(text: str, cycles: Mapping[str, int], chip: Chip) -> float:
  """Add up all calls of the program's kernels, by their schedules; 0 where there are none.

  Args:
    cycles: of operations, by `cycles_of_all`.
  """
  if not chip.clock:
    return 0.0
  return sum(each.times * cycles.get(name, 0) for name, each in hlo.kernels(text).items()) / chip.clock


def cycles_of_all(text: str, written: Mapping[str, int]) -> dict[str, int]:
  """Return operation -> cycles by its schedule, where one alone is written for operations that are alike."""
  numbers = hlo.alike(text)
  cycles = {numbers[name]: count for name, count in written.items() if name in numbers}
  return {**written, **{name: cycles[number] for name, number in numbers.items() if number in cycles}}


def seconds_by_roof(text: str, cycles: Mapping[str, int], chip: Chip) -> float | None:
  """Add up, over the operations, the longer of the schedule and the memory traffic of each. Return None where there are
  no schedules, or where there are loops whose turns the text does not give."""
  if not cycles or not chip.clock or hlo.has_loops(text):
    return None
  moved = hlo.traffic(text)
  # Both: a kernel has cycles and may have no traffic that the text shows, a copy has traffic alone.
  names = moved.keys() | (cycles.keys() & hlo.operations(text))
  usable = _USABLE * chip.bandwidth
  return sum(max(cycles.get(name, 0) / chip.clock, moved.get(name, 0) / usable) for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """The bytes and hops that reach one device in a run of a program, by ring algorithms, which is the least that any can
  do.

  Attributes:
    links_bytes, network_bytes: of groups of devices that links join, and of those that the network joins.
    links_hops, network_hops: from one device to the next of a ring, one after another.
  """

  links_bytes: float = 0.0
  network_bytes: float = 0.0
  links_hops: float = 0
  network_hops: float = 0

  def seconds(self, chip: Chip) -> float | None:
    """Return the time at what all of a device's links, or its share of the network, can carry; None if part of it takes
    a network of unknown speed."""
    if not self.network_bytes:
      return self.links_bytes / chip.links
    return None if chip.network is None else self.links_bytes / chip.links + self.network_bytes / chip.network


def traffic(text: str, near: int | None) -> Traffic:
  """Return the traffic between devices in a run of the program.

  Args:
    near: devices that links join; those of other numbers are reached by the network. None: all.
  """
  sums: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(Traffic)}
  for each in hlo.collectives(text):
    # A ring passes through all devices of a host before it goes on to the next one.
    hosts = len({device // near for device in each.group}) if near and each.group else 1
    rounds = each.times * (2 if each.kind == "all-reduce" else 1)  # which is a reduce-scatter and an all-gather
    sums["network_bytes" if hosts > 1 else "links_bytes"] += each.received
    sums["network_hops"] += rounds * (hosts - 1)
    sums["links_hops"] += rounds * max(len(each.group) - hosts, 0)
  return Traffic(**sums)
