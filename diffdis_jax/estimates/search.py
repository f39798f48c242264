"""Settings that make a step fit, tried one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

Changes = dict[str, Any]


def candidates(config: ConfigDict, chips: int, slices: int = 1) -> Iterator[Changes]:
  """Changes of config fields, those that cost least first: rematerialisation, sharding over a slice, both, then smaller
  batches."""
  remat: Changes = {} if config.model.remat == "full" else {"model.remat": "full"}
  fsdp: Changes = {}
  if config.mesh.tensor > 0:
    fsdp = {"mesh.data": slices, "mesh.fsdp": chips // slices // config.mesh.tensor}
  sharded = config.mesh.fsdp == -1 or config.mesh.fsdp == fsdp.get("mesh.fsdp")
  options = [remat, {} if sharded else fsdp]
  both = {**options[0], **options[1]}
  tried: list[Changes] = [{}]
  for changes in (*options, both):
    if changes not in tried:
      tried.append(changes)
      yield changes
  smallest = chips * config.optim.accumulate
  batch_size = config.batch_size // 2
  while batch_size >= smallest and batch_size % smallest == 0:
    yield {**both, "batch_size": batch_size}
    batch_size //= 2


def first_fit(
  config: ConfigDict, chips: int, attempt: Callable[[ConfigDict], dict[str, Any]], *, slices: int = 1
) -> list[dict[str, Any]]:
  """Each candidate tried, up to the first that fits: its changes and the report that `attempt` made of it."""
  trials = []
  for changes in candidates(config, chips, slices):
    changed = ConfigDict(config).unlock()
    changed.update_from_flattened_dict(changes)
    trials.append(dict(changes=changes, report=attempt(changed)))
    if trials[-1]["report"]["fits"]:
      break
  return trials
