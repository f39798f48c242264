"""Small parameters packed end to end: one array for all of them that the optimizer treats alike.

At each step the host hands every array to every device, and the compiler makes code for each. At full size more than
half of the parameters are vectors, with about a thousandth of the numbers, and each has an average and two moments; of
a small network nearly all parameters are small. Larger ones are not packed: a step would have to copy each out of the
array that holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import optax

from diffdis_jax.common.params import Params
from diffdis_jax.parallel.sharding import everywhere
from diffdis_jax.structs import TrainState

SMALL = 2**16  # numbers of the largest parameter that is packed; steps that copy these out took no longer
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which parameters are packed, and where.

  Attributes:
    packed: name of a packed array -> path of each parameter in it -> its shape, in their order.
    fixed: paths of the parameters that a step does not change.
  """

  packed: Mapping[str, Mapping[str, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
  fixed: frozenset[str] = frozenset()

  def pack_state(self, state: TrainState) -> TrainState:
    """A state as it is saved -> as a step takes it; one that is so already stays. Every process calls it."""
    changed = {path: value for path, value in state.params.items() if path not in self.fixed}
    frozen = state.frozen | {path: value for path, value in state.params.items() if path in self.fixed}
    trees = dict(params=changed, frozen=frozen, ema=state.ema, teacher=state.teacher)
    firsts = {next(iter(shapes)) for shapes in self.packed.values()}
    opt_state = _moments(state.opt_state, firsts, self.common, self.pack)
    return dataclasses.replace(state, opt_state=opt_state, **{name: self.pack(tree) for name, tree in trees.items()})

  def by_path(self, state: TrainState) -> TrainState:
    """The inverse: parameters, the frozen ones among them, averages, moments and teacher by path, as on any other mesh.
    What is not packed is not copied."""
    params = self.unpack(state.params) | self.unpack(state.frozen)
    ema, teacher = self.unpack(state.ema), self.unpack(state.teacher)
    opt_state = _moments(state.opt_state, self.packed, self._spread, self.unpack)
    return dataclasses.replace(state, params=params, ema=ema, opt_state=opt_state, teacher=teacher, frozen={})

  def pack(self, params: Params) -> Params:
    """By path -> packed. A tree that lacks a packed array's parameters, such as one of no averages, has none of it."""
    # Whole before and after: left to itself, XLA's partitioner splits what is joined, and fails on some meshes.
    whole = {name: [everywhere(params[path]).reshape(-1) for path in shapes] for name, shapes in self._of(params)}
    joined = {name: everywhere(jax.lax.concatenate(vectors, 0)) for name, vectors in whole.items()}
    return self.not_packed(params) | joined

  def unpack(self, packed: Params) -> Params:
    """Packed -> by path."""
    found = {name: value for name, value in packed.items() if name not in self.packed}
    # In the layout's order: a set's would make another program in each process.
    for name, shapes in self.packed.items():
      if name in packed:
        vectors = jax.lax.split(everywhere(packed[name]), tuple(map(math.prod, shapes.values())))
        each = zip(shapes.items(), vectors, strict=True)
        found |= {path: everywhere(vector.reshape(shape)) for (path, shape), vector in each}
    return found

  def common(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """What is known of parameters by path, by packed name: of a packed array, what is known of its first."""
    return self.not_packed(values) | {name: values[next(iter(shapes))] for name, shapes in self._of(values)}

  def not_packed(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Of parameters by path, those that stay as they are."""
    within = {path for _, shapes in self._of(values) for path in shapes}
    return {path: value for path, value in values.items() if path not in within}

  def _spread(self, values: Mapping[str, _Value]) -> dict[str, _Value]:
    """The inverse of `common`: of each packed parameter, what is known of the array."""
    found = {name: value for name, value in values.items() if name not in self.packed}
    return found | {path: values[name] for name, shapes in self.packed.items() if name in values for path in shapes}

  def _of(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, tuple[int, ...]]]]:
    return ((name, shapes) for name, shapes in self.packed.items() if next(iter(shapes)) in values)


def _moments(
  opt_state: Any,
  names: Collection[str],
  masked: Callable[[Mapping[str, Any]], Mapping[str, Any]],
  arrays: Callable[[Params], Params],
) -> Any:
  """An optimizer's state with its trees of parameters, which have one of `names`, changed: each has the parameters of
  one group, and an empty node for those of every other."""
  is_tree = lambda node: isinstance(node, dict) and not node.keys().isdisjoint(names)

  def changed(node: Any) -> Any:
    if not is_tree(node):
      return node
    empty = {name: value for name, value in node.items() if isinstance(value, optax.MaskedNode)}
    return {**masked(empty), **arrays({name: value for name, value in node.items() if name not in empty})}

  return jax.tree.map(changed, opt_state, is_leaf=is_tree)


def layout(shapes: Params, kinds: Mapping[str, str], fixed: Iterable[str], split: Collection[str] = ()) -> Layout:
  """Packs the small parameters of one kind and dtype together, in the order of their paths.

  Args:
    shapes: parameter path -> its shape and dtype.
    kinds: path -> kind, of those that may be packed.
    fixed: as Layout has them.
    split: paths of the parameters that the mesh splits, which stay as they are.
  """
  packed: dict[str, dict[str, tuple[int, ...]]] = {}
  for path in sorted(kinds.keys() - {*split}):
    leaf = shapes[path]
    if leaf.shape and math.prod(leaf.shape) <= SMALL:
      packed.setdefault(f"small.{kinds[path]}.{leaf.dtype}", {})[path] = leaf.shape
  return Layout(packed, frozenset(fixed))
