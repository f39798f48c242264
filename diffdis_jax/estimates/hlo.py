"""What a compiled program's text says of its collectives."""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, **{f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}}
# `%name = SHAPES kind(operands)`; the second half of an asynchronous pair, `kind-done`, is not counted.
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"%?([\w.\-]+) \(.*\) -> (.*) \{$")
# One collective that the TPU compiler spreads over the operations it runs beside, each of which lists it anew.
_SPREAD = re.compile(r"channel_id=(\d+),.* frontend_attributes=\{[^}]*chain_id=")
_ESTIMATED_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    shapes: of its results on one device.
    bytes: of them together.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  bytes: int


def collectives(text: str) -> list[Collective]:
  """In the order of the program. One in a loop's body is listed once."""
  found, scattered, spread = [], None, set()
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      # How the TPU compiler writes a reduce-scatter: a computation of an all-reduce and a slice.
      scattered = header[2] if header[1].startswith("all-reduce-scatter") else None
    elif line == "}":
      scattered = None
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
    found.append(Collective(kind=kind, shapes=tuple(shape for _, shape in parts), bytes=total))
  return found


def bytes_by_kind(text: str) -> dict[str, int]:
  """Bytes that a device ends up with from each kind of collective."""
  totals: dict[str, int] = dict.fromkeys(KINDS, 0)
  for each in collectives(text):
    totals[each.kind] += each.bytes
  return {kind: total for kind, total in totals.items() if total}


def estimated_cycles(text: str) -> int:
  """The TPU compiler's estimates for the program's operations together. One in a loop's body counts once."""
  return sum(int(cycles) for cycles in _ESTIMATED_CYCLES.findall(text))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number)
