"""Reads once what every process needs of a checkpoint: each process reads some of these arrays, and gets the others'.

By itself each process reads all that its devices hold: the whole checkpoint, in a run that replicates its parameters.
What `fsdp` or `tensor` splits among processes each reads for itself, since nobody else needs it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from orbax import checkpoint as ocp

from diffdis_jax.parallel import processes

LEAST = 2**20  # bytes of an array that is worth to be sent


@dataclasses.dataclass(frozen=True)
class Part:
  """An array of a tree that is read, before it is handed out: `owner` is the process that has its `value`."""

  owner: int
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  sharding: Sharding
  value: np.ndarray | None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def as_bytes(self) -> np.ndarray:
    """Of the value, u8."""
    return np.ascontiguousarray(self.value).reshape(-1).view(np.uint8)

  def placed(self, data: np.ndarray) -> jax.Array:
    """Made of the value's bytes."""
    value = data.view(self.dtype).reshape(self.shape)
    return jax.make_array_from_callback(self.shape, self.sharding, lambda index: value[index])


class Reader(ocp.type_handlers.ArrayHandler):
  """Of what every process needs, reads this one's part, and gives a Part for each: `handed_out` makes arrays of them.

  Where an array cannot be read, waits for the others before it raises. Else Orbax closes its event loop at once, and
  each read that ends later prints a traceback.
  """

  async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
    args, own = args or (), jax.process_index()
    owners = _owners(args)
    mine = [i for i in range(len(args)) if owners.get(i, own) == own]
    here = SingleDeviceSharding(jax.local_devices()[0])
    asked = [dataclasses.replace(args[i], sharding=here) if i in owners else args[i] for i in mine]
    # Orbax starts one task for each array and gives no list of them: they are those that are there now and were not.
    earlier = asyncio.all_tasks()
    try:
      found = await super().deserialize([infos[i] for i in mine], asked) if mine else ()
    finally:
      while reads := asyncio.all_tasks() - earlier:
        await asyncio.gather(*reads, return_exceptions=True)
    read: dict[int, Any] = dict(zip(mine, found, strict=True))
    for i, owner in owners.items():
      value = np.asarray(read[i]) if owner == own else None
      read[i] = Part(owner, tuple(args[i].global_shape), np.dtype(args[i].dtype), args[i].sharding, value)
    return [read[i] for i in range(len(args))]


def _owners(args: Sequence[Any]) -> dict[int, int]:
  """Which process reads it, of each large array that all of them need: about as many bytes each."""
  size = lambda arg: math.prod(arg.global_shape) * np.dtype(arg.dtype).itemsize
  large = [i for i, arg in enumerate(args) if size(arg) >= LEAST]
  shared = [i for i in large if is_needed_by_all(args[i].sharding, tuple(args[i].global_shape))]
  shared.sort(key=lambda i: (-size(args[i]), i))
  return {i: at % jax.process_count() for at, i in enumerate(shared)}


def is_needed_by_all(sharding: Sharding, shape: tuple[int, ...]) -> bool:
  """Whether there are several processes, and the devices of each hold all of the array."""
  parts: dict[int, set[Any]] = {process: set() for process in range(jax.process_count())}
  if len(parts) == 1:
    return False
  for device, index in sharding.devices_indices_map(shape).items():
    bounds = tuple(each.indices(size) for each, size in zip(index or (), shape, strict=True))
    parts[device.process_index].add(bounds)
  return all(part == set.union(*parts.values()) for part in parts.values())


def handed_out(tree: Any) -> Any:
  """The tree with an array for each Part. Every process makes the call, with a tree of the same Parts."""
  leaves, structure = jax.tree.flatten(tree)
  own = jax.process_index()
  # The largest first, so that those that are sent at a time are of about one size.
  order = sorted((i for i, leaf in enumerate(leaves) if isinstance(leaf, Part)), key=lambda i: (-leaves[i].nbytes, i))
  if not order:
    return tree
  queues = [[i for i in order if leaves[i].owner == process] for process in range(jax.process_count())]
  most_of_each = 1 << ((processes.AT_ONCE // jax.process_count()).bit_length() - 1)
  for group in itertools.zip_longest(*queues):
    most = max(leaves[i].nbytes for i in group if i is not None)
    # In pieces: 64 processes with an array of 152 MB each would fill a device of 16 GB. As bytes, which arrive as they
    # are: a sum with zeros, as Orbax broadcasts arrays, makes 0.0 of -0.0. And of few sizes, each of which compiles.
    size = min(1 << (most - 1).bit_length(), most_of_each)
    mine = np.empty(0, np.uint8) if group[own] is None else leaves[group[own]].as_bytes()
    found = {i: np.empty(leaves[i].nbytes, np.uint8) for i in group if i is not None}
    for start in range(0, most, size):
      sent, piece = np.zeros(size, np.uint8), mine[start : start + size]
      sent[: len(piece)] = piece
      for i, row in zip(group, processes.gathered(sent), strict=True):
        if i is not None:
          place = found[i][start : start + size]
          place[:] = row[: len(place)]
    for i, data in found.items():
      leaves[i] = leaves[i].placed(data)
  return jax.tree.unflatten(structure, leaves)
