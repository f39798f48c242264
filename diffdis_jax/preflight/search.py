"""Settings that make a step fit, tried one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Changes = dict[str, Any]  # config field -> value


def candidates(
  *, remat: str, mesh: Mapping[str, int], batch_size: int, accumulate: int, chips: int, slices: int = 1
) -> Iterator[Changes]:
  """Changes of these config fields, those that cost least first: rematerialisation, sharding over a slice, both, then
  smaller batches."""
  more_remat: Changes = {} if remat == "full" else {"model.remat": "full"}
  fsdp: Changes = {}
  if mesh["tensor"] > 0:
    fsdp = {"mesh.data": slices, "mesh.fsdp": chips // slices // mesh["tensor"]}
  sharded = mesh["fsdp"] == -1 or mesh["fsdp"] == fsdp.get("mesh.fsdp")
  options = [more_remat, {} if sharded else fsdp]
  both = {**options[0], **options[1]}
  tried: list[Changes] = [{}]
  for changes in (*options, both):
    if changes not in tried:
      tried.append(changes)
      yield changes
  smallest = chips * accumulate
  batch_size //= 2
  while batch_size >= smallest and batch_size % smallest == 0:
    yield {**both, "batch_size": batch_size}
    batch_size //= 2


def first_fit(tried: Iterable[Changes], attempt: Callable[[Changes], dict[str, Any]]) -> list[dict[str, Any]]:
  """Each of the changes tried, up to the first that fits: the changes, and the report that `attempt` made of them."""
  trials = []
  for changes in tried:
    trials.append(dict(changes=changes, report=attempt(changes)))
    if trials[-1]["report"]["fits"]:
      break
  return trials
