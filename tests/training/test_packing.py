"""A state's small parameters, packed for the step and by path again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffdis_jax.config.sections import Optim
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import TrainState
from diffdis_jax.training import optim, packing
from tests import steps

KINDS = {
  "a.bias": "new",
  "b.bias": "new",
  "b.scale": "old",
  "c.bias": "new",
  "d.bias": "frozen",
  "a.kernel": "new",  # which the mesh splits
  "a.shortcut": "new",
  "b.kernel": "new",  # too large
  "c.kernel": "old",
}
MATRICES = {"a.kernel": (3, 8), "a.shortcut": (2, 3, 1), "b.kernel": (257, 256), "c.kernel": (256, 256)}
SHAPES = {
  path: jax.ShapeDtypeStruct(MATRICES.get(path, (i + 1,)), jnp.bfloat16 if path == "c.bias" else jnp.float32)
  for i, path in enumerate(KINDS)
} | {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32), "shift": jax.ShapeDtypeStruct((4,), jnp.float32)}
PACKED = {
  "small.new.float32": {"a.bias": (1,), "a.shortcut": (2, 3, 1), "b.bias": (2,)},
  "small.old.float32": {"b.scale": (3,), "c.kernel": (256, 256)},
  "small.new.bfloat16": {"c.bias": (4,)},
  "small.frozen.float32": {"d.bias": (5,)},
}
SPLIT = ["a.kernel"]
# Seen with jaxlib 0.12 on a CPU: an element of a longer array may round to the neighbour of what it is in its own.
ROUNDS_BY_PLACE = not importlib.metadata.version("jaxlib").startswith("0.10.")


def draw(paths, place):
  rng = np.random.default_rng(0)
  return {
    path: jax.device_put(rng.normal(size=SHAPES[path].shape).astype(SHAPES[path].dtype), place(path)) for path in paths
  }


def test_the_layout_is_of_shapes_alone_and_keeps_its_order():
  for seed in range(3):
    paths = [*KINDS]
    random.Random(seed).shuffle(paths)
    found = packing.layout(SHAPES, {path: KINDS[path] for path in paths}, {"d.bias"}, SPLIT).packed
    assert {name: [*shapes.items()] for name, shapes in found.items()} == {
      name: [*shapes.items()] for name, shapes in PACKED.items()
    }


def test_packed_and_by_path_again_every_bit_and_place_is_the_same():
  mesh = steps.make_mesh(2, 4, 1)
  split = jax.sharding.PartitionSpec(None, "fsdp")
  place = lambda path: jax.sharding.NamedSharding(mesh, split if path == "a.kernel" else sharding.REPLICATED)
  layout = packing.layout(SHAPES, KINDS, {"d.bias"}, SPLIT)
  trained = KINDS.keys() - {"d.bias"} | {"logit_scale"}
  state = TrainState(params=draw(SHAPES, place), ema=draw(trained, place))
  packed = layout.pack_state(state)
  assert packed.frozen.keys() == {"small.frozen.float32"} and packed.teacher == {}
  assert packed.params.keys() == PACKED.keys() - packed.frozen.keys() | {
    "a.kernel",
    "b.kernel",
    "logit_scale",
    "shift",
  }
  assert packed.ema.keys() == packed.params.keys() - {"shift"}
  assert packed.params["a.kernel"] is state.params["a.kernel"]
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, layout.pack_state(packed), packed))
  found = layout.by_path(packed)
  assert jax.tree.structure(found) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)


def moments_of(opt_state, layout):
  return [steps.moments(opt_state, layout, name) for name in ("mu", "nu")]


def assert_same_bits(found, expected):
  for (name, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    if ROUNDS_BY_PLACE and a.dtype == np.float32:
      np.testing.assert_array_max_ulp(a, b, maxulp=4)
    else:
      assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(name)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_packed_arithmetic_is_the_same_to_the_bit(clip_norm):
  section = Optim(groups=(("scale", "old"), (".*", "new")), rates={"old": 0.1, "new": 0.2}, clip_norm=clip_norm)
  section = dataclasses.replace(section, no_decay="b.bias|scale", weight_decay=0.1, warmup_steps=0)
  params, found = {path: x for path, x in draw(KINDS, lambda _: None).items() if path != "c.bias"}, []
  kinds = optim.kinds_of(optim.groups_of(params, section.groups), section)
  for layout in (packing.layout(SHAPES, kinds, (), SPLIT), packing.Layout()):
    tx = optim.build_optimizer(params, section, num_steps=9, layout=layout)

    def step(params, opt_state, ema, scale, layout=layout, tx=tx):
      loss = lambda params: sum(jnp.sum(jnp.sin(x * scale)) for x in params.values())
      gradient = jax.grad(loss)(layout.unpack(params))
      clipped = optim.clip(layout.pack(gradient), optax.tree.norm(gradient), section)
      with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(clipped, opt_state, params)
      params = optax.apply_updates(params, updates)
      return params, opt_state, optim.update_ema(params, ema, decay=0.9, step=jnp.int32(1))

    state = [layout.pack(params), tx.init(layout.pack(params)), layout.pack(params)]
    for scale in (1.0, 1.7):
      state = jax.jit(step)(*state, scale)
    assert len(state[0]) == (5 if layout.packed else len(params))  # one is too large, one split, three kinds
    found.append((layout.unpack(state[0]), moments_of(state[1], layout), layout.unpack(state[2])))
  assert_same_bits(*found)


@pytest.mark.parametrize(
  "objective, mesh_shape",
  [("reconstruction", (1, 1, 1)), pytest.param("discrimination", (2, 2, 2), marks=pytest.mark.slow)],
)
def test_a_packed_step_is_the_same_to_the_bit_as_one_by_path(monkeypatch, objective, mesh_shape):
  """Parameters, averages, moments and metrics."""
  config = steps.make_config(objective, **{"optim.clip_norm": 0.1, "optim.warmup_steps": 0, "batch_size": 8})
  found = []
  for is_packed in (True, False):
    if not is_packed:
      monkeypatch.setattr(packing, "layout", lambda shapes, kinds, fixed, split: packing.Layout({}, frozenset(fixed)))
    trainer = steps.Trainer(config, steps.make_mesh(*mesh_shape))
    layout = trainer.step.layout
    assert bool(layout.packed) == is_packed
    state, metrics = trainer.run(trainer.initial(), *(steps.make_batch(config, seed) for seed in range(2)))
    found.append(jax.device_get((state.params, state.ema, moments_of(state.opt_state, layout), metrics)))
  assert_same_bits(*found)


def test_by_path_a_state_is_that_of_an_optimizer_whose_parameters_were_never_packed():
  """So that a checkpoint does not depend on the mesh."""
  section = Optim(groups=(("scale", "old"), (".*", "new")), rates={"old": 0.1, "new": 0.2}, first_moment="bfloat16")
  params = draw(KINDS, lambda _: None)
  kinds = optim.kinds_of(optim.groups_of(params, section.groups), section)
  layout, plain = packing.layout(SHAPES, kinds, (), SPLIT), packing.Layout()
  tx, other = (optim.build_optimizer(params, section, num_steps=9, layout=each) for each in (layout, plain))
  state = TrainState(params=layout.pack(params), opt_state=tx.init(layout.pack(params)))
  # Neighbours differ, and so do arrays: a moment that comes to a wrong place is seen.
  leaves, tree = jax.tree.flatten(state.opt_state)
  starts = np.cumsum([0, *(x.size for x in leaves)])
  numbers = [jnp.asarray((np.arange(x.size) + i) % 251, x.dtype).reshape(x.shape) for x, i in zip(leaves, starts)]
  state = dataclasses.replace(state, opt_state=jax.tree.unflatten(tree, numbers))
  by_path, expected = layout.by_path(state).opt_state, other.init(params)
  assert jax.tree.structure(by_path) == jax.tree.structure(expected)
  for (name, x), y in zip(jax.tree.leaves_with_path(by_path), jax.tree.leaves(expected), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), jax.tree_util.keystr(name)
  for name in ("mu", "nu"):
    found, packed = (steps.moments(each, plain, name) for each in (by_path, state.opt_state))
    assert found.keys() == params.keys()
    for array, shapes in layout.packed.items():
      assert np.concatenate([np.ravel(found[path]) for path in shapes]).tobytes() == np.asarray(packed[array]).tobytes()
  again = layout.pack_state(layout.by_path(state))
  assert_same_bits(again.opt_state, state.opt_state)


def test_how_many_arrays_a_step_takes_and_changes():
  """A packed array has an average and two moments beside it; what is changed comes back, what is frozen does not."""
  trainer = steps.build_trainer(steps.make_config(), steps.make_mesh())
  assert [len(jax.tree.leaves(half)) for half in trainer.abstract_state.split()] == [35, 2]
  # Neither scalars nor what is too large.
  left = {path for path, leaf in trainer.shapes.items() if not leaf.shape or leaf.size > packing.SMALL}
  assert left == trainer.shapes.keys() - {path for shapes in trainer.layout.packed.values() for path in shapes}
  split = steps.build_trainer(steps.make_config(), steps.make_mesh(2, 2, 2))
  assert [len(jax.tree.leaves(half)) for half in split.abstract_state.split()] == [243, 22]
  # Whole on every device, so that one array may hold them.
  packed = [path for shapes in split.layout.packed.values() for path in shapes]
  assert all(split.param_shardings[path].is_fully_replicated for path in packed)
  assert len(packed) > len(split.shapes) / 2
