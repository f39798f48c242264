"""Vectors packed end to end: one array for all biases and scales that the optimizer treats alike.

At each step the host hands every array to every device. More than half of a network's parameters are vectors, with
about a thousandth of its numbers, and each has an average and two moments. Matrices are not packed: a step would have
to copy each one out of the larger array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from diffdis_jax.common.params import Params
from diffdis_jax.parallel.sharding import everywhere
from diffdis_jax.structs import TrainState

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which vectors are packed, and where.

  Attributes:
    packed: name of a packed array -> path of each vector in it -> its size, in their order.
    fixed: paths of the parameters that a step does not change.
  """

  packed: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
  fixed: frozenset[str] = frozenset()

  def pack_state(self, state: TrainState) -> TrainState:
    """A state as it is saved -> as a step takes it; one that is so already stays. Every process calls it."""
    changed = {path: value for path, value in state.params.items() if path not in self.fixed}
    frozen = state.frozen | {path: value for path, value in state.params.items() if path in self.fixed}
    trees = dict(params=changed, frozen=frozen, ema=state.ema, teacher=state.teacher)
    return dataclasses.replace(state, **{name: self.pack(tree) for name, tree in trees.items()})

  def by_path(self, state: TrainState) -> TrainState:
    """The inverse: parameters, the frozen ones among them, averages and teacher by path. Matrices are not copied."""
    params = self.unpack(state.params) | self.unpack(state.frozen)
    ema, teacher = self.unpack(state.ema), self.unpack(state.teacher)
    return dataclasses.replace(state, params=params, ema=ema, teacher=teacher, frozen={})

  def pack(self, params: Params) -> Params:
    """By path -> packed. A tree that lacks a packed array's vectors, such as one of no averages, has none of it."""
    # Whole before and after: left to itself, XLA's partitioner splits what is joined, and fails on some meshes.
    whole = {name: [everywhere(params[path]) for path in sizes] for name, sizes in self._of(params)}
    joined = {name: everywhere(jax.lax.concatenate(vectors, 0)) for name, vectors in whole.items()}
    return self.not_packed(params) | joined

  def unpack(self, packed: Params) -> Params:
    """Packed -> by path."""
    found = {name: value for name, value in packed.items() if name not in self.packed}
    # In the layout's order: a set's would make another program in each process.
    for name, sizes in self.packed.items():
      if name in packed:
        vectors = jax.lax.split(everywhere(packed[name]), tuple(sizes.values()))
        found |= zip(sizes, map(everywhere, vectors), strict=True)
    return found

  def common(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """What is known of parameters by path, by packed name: of a packed array, what is known of its first vector."""
    return self.not_packed(values) | {name: values[next(iter(sizes))] for name, sizes in self._of(values)}

  def not_packed(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Of parameters by path, those that stay as they are."""
    within = {path for _, sizes in self._of(values) for path in sizes}
    return {path: value for path, value in values.items() if path not in within}

  def _of(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, int]]]:
    return ((name, sizes) for name, sizes in self.packed.items() if next(iter(sizes)) in values)


def layout(shapes: Params, kinds: Mapping[str, str], fixed: Iterable[str]) -> Layout:
  """Packs the vectors of one kind and dtype together, in the order of their paths, on any mesh the same.

  Args:
    shapes: parameter path -> its shape and dtype.
    kinds: path -> kind, of those that may be packed. All vectors are whole on every device (parallel/sharding.py).
    fixed: as Layout has them.
  """
  packed: dict[str, dict[str, int]] = {}
  for path in sorted(kinds):
    leaf = shapes[path]
    if len(leaf.shape) == 1:
      packed.setdefault(f"vectors.{kinds[path]}.{leaf.dtype}", {})[path] = leaf.shape[0]
  return Layout(packed, frozenset(fixed))
