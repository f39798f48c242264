"""Read a compiled program's text for its collectives, its loops and its kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import numpy as np
from absl import logging
from jaxtyping import Int

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, **{f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}}
# `%name = SHAPES kind(operands)`; the second half of an asynchronous pair, `kind-done`, is not counted.
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"%?([\w.\-]+) \(.*\) -> (.*) \{$")
# What an operation runs; the second half of an asynchronous pair names it once more.
_RUNS = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
_SECOND_HALF = re.compile(r" async-(?:update|done)\(")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r" while\(.*condition=%([\w.\-]+)")
_BOUND = re.compile(r"%(\S+) = [su]32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%\S+, %([\w.\-]+)\), direction=LT")
# One collective that the TPU compiler spreads over the operations it runs beside, each of which lists it again.
_SPREAD = re.compile(r"channel_id=(\d+),.* frontend_attributes=\{[^}]*chain_id=")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Axes with their sizes, the devices if not in order, and the axes along which groups lie, or parts of them.
_OF_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)
_PART_OF_AXIS = re.compile(r"(.+):\((\d+)\)(\d+)")  # the axis as [before, size, the rest], along its second axis
_GROUPS = re.compile(r"replica_groups=(?!\{\}).{,80}")
_NAME = re.compile(r"%([\w.\-]+)")
_SAYS_NOTHING = re.compile(r", (?:metadata|frontend_attributes)=\{[^}]*\}")
_KERNEL = re.compile(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"")
_COST = re.compile(r'"(flops|transcendentals|bytes_accessed)":"?(\d+)')
_ESTIMATED_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
Numbers = tuple[int, ...]  # a shape, or devices


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation. `group` holds the devices of one of its groups; empty where the text does not say."""

  kind: str
  shapes: tuple[Numbers, ...]  # of its results on one device
  bytes: int  # of them together
  group: Numbers = ()
  times: int = 1  # that the program runs it: the turns of the loops around it, multiplied

  @property
  def received(self) -> float:
    """Return the least number of bytes that reach a device from others, all times together."""
    moved = float(self.times * self.bytes)
    if not self.group:
      return moved
    others, share = len(self.group) - 1, 1 - 1 / len(self.group)
    # By ring algorithms, the least that any can do: an all-reduce is a reduce-scatter and an all-gather.
    of_result = {"all-reduce": 2 * share, "reduce-scatter": others, "collective-permute": 1.0}
    return moved * of_result.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One call of a kernel written in Pallas, by the cost that was declared with it."""

  flops: int
  transcendentals: int
  bytes: int
  code: str = ""  # the call without names: the compiler makes code for one of the calls that share it
  times: int = 1  # that the program makes this call


def collectives(text: str) -> list[Collective]:
  """Return the collectives in the order of the program. One in a loop's body is listed once, with the number of its
  turns."""
  listed, scattered, spread, times, runs = [], None, set(), 1, _runs(text)
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      # How the TPU compiler writes a reduce-scatter: a computation of an all-reduce and a slice.
      scattered = header[2] if header[1].startswith("all-reduce-scatter") else None
      times = runs(header[1])
    elif line.startswith("}"):  # `}, execution_thread="sparsecore"` too
      scattered, times = None, 1
    match = _COLLECTIVE.search(_COMMENT.sub("", line))
    if match is None:
      continue
    if part := _SPREAD.search(line):
      if part[1] in spread:
        continue
      spread.add(part[1])
    kind, result = ("reduce-scatter", scattered) if scattered else (match[2], match[1])
    parts = [(kind, _numbers(shape)) for kind, shape in _SHAPE.findall(result) if kind in _BITS]
    if match[3] and match[2] != "all-reduce":
      # (operands, as many results[, counters]), the operands in brackets of their own or not: they are still held. An
      # all-reduce lists its results alone.
      parts = [part for part in parts if part[1] or part[0] != "u32"]
      parts = parts[len(parts) // 2 :]
    total = sum(_BITS[kind] * math.prod(shape) // 8 for kind, shape in parts)
    shapes = tuple(shape for _, shape in parts)
    listed.append(Collective(kind=kind, shapes=shapes, bytes=total, group=_group(line), times=times))
  return listed


@functools.lru_cache(maxsize=1)  # a full-size step's text takes seconds, and each of its figures asks
def _runs(text: str) -> Callable[[str], int]:
  """Return a function that maps a computation's name to how often a run of the program runs it. A loop of unknown turns
  counts as one turn, and so does each branch of a condition."""
  bodies = _computations(text)
  callers: dict[str, list[tuple[str, int]]] = {}
  for inside, lines in bodies.items():
    for line in lines:
      # Both halves name what they run: counted twice, a collective in it would be.
      if _SECOND_HALF.search(line):
        continue
      turns = _turns(line, bodies)
      for named in _RUNS.finditer(line):
        for name in _NAME.findall(named[1]):
          callers.setdefault(name, []).append((inside, turns))

  @functools.cache
  def runs(name: str) -> int:
    return sum(runs(caller) * turns for caller, turns in callers[name]) if name in callers else 1

  return runs


def _turns(line: str, bodies: Mapping[str, list[str]]) -> int:
  """Return the turns of the loop in this line: the number in the text or else, on TPUs, the number below which the
  loop's counter must be, which JAX counts from 0 by ones; 1 where there is no loop, or no number."""
  if known := _TURNS.search(line):
    return int(known[1])
  loop = _CONDITION.search(line)
  lines = bodies.get(loop[1], []) if loop else []
  bounds = {bound[1]: int(bound[2]) for bound in map(_BOUND.search, lines) if bound}
  return next((bounds.get(below[1], 1) for below in map(_BELOW.search, lines) if below), 1)


def bytes_by_kind(text: str) -> dict[str, int]:
  """Return the bytes that a device ends up with from each kind of collective, over all turns of loops."""
  totals: dict[str, int] = dict.fromkeys(KINDS, 0)
  for collective in collectives(text):
    totals[collective.kind] += collective.times * collective.bytes
  return {kind: total for kind, total in totals.items() if total}


def estimated_cycles(text: str, *, turns: bool = True) -> int:
  """Add up the TPU compiler's estimates for the program's operations.

  Args:
    turns: whether those in a loop's body count as often as it turns, or once.
  """
  if not turns:
    return sum(map(int, _ESTIMATED_CYCLES.findall(text)))
  runs = _runs(text)
  noted = {name: _ESTIMATED_CYCLES.findall("\n".join(lines)) for name, lines in _computations(text).items()}
  return sum(runs(name) * sum(map(int, cycles)) for name, cycles in noted.items() if cycles)


def _numbers(text: str) -> Numbers:
  return tuple(int(number) for number in text.split(",") if number)


def kernels(text: str) -> dict[str, Kernel]:
  """Return, by operation, what a TPU's kernel declares; one that declares nothing is left out."""
  by_name, runs = {}, _runs(text)
  for inside, lines in _computations(text).items():
    for line in lines:
      if name := _KERNEL.search(line):
        cost = {field: int(value) for field, value in _COST.findall(line[line.find('"cost_estimate"') :])}
        if cost:
          code = _NAME.sub("%", _SAYS_NOTHING.sub("", line))
          declared = (cost["flops"], cost["transcendentals"], cost["bytes_accessed"])
          by_name[name[1]] = Kernel(*declared, code=code.replace("ROOT ", ""), times=runs(inside))
  return by_name


def _computations(text: str) -> dict[str, list[str]]:
  """Return the lines of each computation; the program's own, which is the last, has no name."""
  begin = max(text.find("ENTRY "), 0)
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in _COMMENT.sub("", text[:begin]).splitlines():
    if header := _COMPUTATION.match(line):
      lines = bodies[header[1]] = []
    else:
      lines.append(line)
  return bodies | {"": text[begin:].splitlines()}


def _group(line: str) -> Numbers:
  """Return the first group, in whichever of three ways groups are written: listed, counted through, or along a mesh's
  axes."""
  if listed := _LISTED.search(line):
    return _numbers(listed[1])
  if counted := _COUNTED.search(line):
    return tuple(_counted(counted[2], counted[3])[: int(counted[1])].tolist())
  if of_mesh := _OF_MESH.search(line):
    mesh, order, transposed, listed, along = of_mesh.groups()
    axes = {name: int(size) for name, size in (axis.split("=") for axis in mesh.split(","))}
    parts = {axis: (1, size) for axis, size in axes.items() if axis in along.split(",")}
    parts |= {part[1]: (int(part[2]), int(part[3])) for part in map(_PART_OF_AXIS.fullmatch, along.split(",")) if part}
    in_order = ",".join(map(str, axes.values()))
    ordered = np.array(_numbers(listed)) if listed else _counted(order or in_order, transposed)
    split = [(size, *parts.get(axis, (size, 1))) for axis, size in axes.items()]
    shape = [n for size, before, part in split for n in (before, part, size // (before * part))]
    return tuple(ordered.reshape(shape)[(0, slice(None), 0) * len(axes)].reshape(-1).tolist())
  if unknown := _GROUPS.search(line):
    # Without it a collective's bytes are taken for what reaches a device, and its network is not seen.
    logging.log_first_n(logging.WARNING, "cannot read who takes part in a collective: %s", 1, unknown[0])
  return ()


def _counted(sizes: str, transposed: str | None) -> Int[np.ndarray, " devices"]:
  """Count devices through an array of these sizes, in the order of its axes when transposed."""
  devices = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return (devices.transpose(_numbers(transposed)) if transposed else devices).reshape(-1)
