"""Estimate how long a compiled program takes, by its text, the compiler's costs and the schedules of its kernels.

The TPU compiler has no estimate for a kernel, but writes down its schedule when asked: a list of bundles, of which one
issues a cycle, with loops. Waits for memory are not in it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffdis_jax.common import files
from diffdis_jax.preflight import hlo
from diffdis_jax.preflight.chips import Chip

# What the TPU compiler has no estimate for, and puts into its sum of seconds with -1 each; they take next to nothing.
_COUNTED_AS_MINUS_ONE = ("ZeroCrop", "ConcatBitcast")
_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*packed-bundles-post-ra.*"
_FILE = re.compile(r"\d+-(?!TLP|<late)(.*)-\d+-packed-bundles-post-ra\.txt")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s[^{]*\{")
_EXIT = re.compile(r"%(p\w+) = scmp\.\w+\.[su]32\.totalorder %\w+, (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!?%(p\w+)\) target bundleno = (\d+) ")
_DELAY = 3  # bundles that still issue after a branch
# Turns in which an outermost loop only fills and drains the pipeline of its copies, and its body is not run.
_PIPELINE = 2

Loop = tuple[int, int, int]  # first bundle, the one after the last, turns


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
    chip.charged.seconds(flops=kernel.flops, transcendentals=kernel.transcendentals, bytes=kernel.bytes)
    for kernel in hlo.kernels(text).values()
  )
  return max(turns * (seconds - charged) + in_kernels, 0.0) or None


def seconds_in_kernels(text: str, cycles: Mapping[str, int], chip: Chip) -> float:
  """Add up all calls of the program's kernels; 0 where there are none.

  Args:
    cycles: of operations, by their schedules, of which one alone is written for calls that share their code.
  """
  if not chip.clock:
    return 0.0
  kernels = hlo.kernels(text)
  by_code = {kernels[name].code: count for name, count in cycles.items() if name in kernels}
  return sum(kernel.times * by_code.get(kernel.code, 0) for kernel in kernels.values()) / chip.clock


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
  for collective in hlo.collectives(text):
    # A ring passes through all devices of a host before it goes on to the next one.
    hosts = len({device // near for device in collective.group}) if near and collective.group else 1
    rounds = collective.times * (2 if collective.kind == "all-reduce" else 1)  # a reduce-scatter and an all-gather
    sums["network_bytes" if hosts > 1 else "links_bytes"] += collective.received
    sums["network_hops"] += rounds * (hosts - 1)
    sums["links_hops"] += rounds * max(len(collective.group) - hosts, 0)
  return Traffic(**sums)


@functools.cache
def schedules() -> pathlib.Path:
  """Return the folder where libtpu writes the schedules of what this process compiles. It is removed when the process
  ends or, where that was ended in the compiler, by the next one."""
  stack = contextlib.ExitStack()
  atexit.register(stack.close)
  return stack.enter_context(files.temporary_folder("diffdis-schedules"))


def ask_for_schedules() -> None:
  """Ask libtpu for schedules; call it before libtpu is loaded, which reads once where to write them."""
  flags, asked = os.environ.get("LIBTPU_INIT_ARGS", ""), _FLAGS.format(schedules())
  if asked not in flags:
    os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {asked}".strip()


def clear_schedules() -> None:
  """Remove the schedules of what was compiled before."""
  for path in schedules().iterdir():
    path.unlink()


def cycles_by_operation(written: pathlib.Path) -> dict[str, int]:
  """Return, by an operation's name in the program's text, the cycles of one device's core, by the schedules in this
  folder."""
  files = ((_FILE.fullmatch(path.name), path) for path in written.iterdir())
  return {match[1]: cycles(path.read_text().splitlines()) for match, path in files if match}


def cycles(lines: Iterable[str]) -> int:
  """Count the cycles of one schedule: each bundle as often as the loops around it turn."""
  last, turns, backwards = 0, {}, []
  for line in lines:
    if bundle := _BUNDLE.match(line):
      last = int(bundle[1], 0)
    turns.update({predicate: int(count) for predicate, count in _EXIT.findall(line)})
    backwards += [(int(start), last, predicate) for predicate, start in _BACK.findall(line) if int(start) <= last]
  loops = [(start, end + _DELAY, turns.get(predicate, 1)) for start, end, predicate in backwards]
  return _within(0, last + 1, loops, outermost=True)


def _within(start: int, end: int, loops: list[Loop], *, outermost: bool = False) -> int:
  """Count the cycles of the bundles from start to end, in which `loops` lie."""
  total, after = end - start, start
  # The outer ones first: of those that begin together, the longest.
  for first, last, count in sorted(loops, key=lambda loop: (loop[0], -loop[1])):
    if first < after or last > end + _DELAY:
      continue
    inside = [loop for loop in loops if first <= loop[0] and loop[1] <= last and loop != (first, last, count)]
    count -= _PIPELINE if outermost and count > _PIPELINE else 0
    total += _within(first, last, inside) * count - (last - first)
    after = last
  return total
