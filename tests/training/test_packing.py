"""A state's vectors, packed for the step and by path again."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import diffdis_cc3m
from diffdis_jax.parallel import sharding
from diffdis_jax.structs import TrainState
from diffdis_jax.training import packing
from tests import steps

KINDS = {"a.bias": "new", "b.bias": "new", "b.scale": "old", "c.bias": "new", "d.bias": "frozen", "a.kernel": "new"}
SHAPES = {
  path: jax.ShapeDtypeStruct(
    (3, 8) if path == "a.kernel" else (i + 1,), jnp.bfloat16 if path == "c.bias" else jnp.float32
  )
  for i, path in enumerate(KINDS)
} | {"logit_scale": jax.ShapeDtypeStruct((), jnp.float32), "shift": jax.ShapeDtypeStruct((4,), jnp.float32)}
PACKED = {
  "vectors.new.float32": {"a.bias": 1, "b.bias": 2},
  "vectors.old.float32": {"b.scale": 3},
  "vectors.new.bfloat16": {"c.bias": 4},
  "vectors.frozen.float32": {"d.bias": 5},
}


def draw(paths, place):
  rng = np.random.default_rng(0)
  return {
    path: jax.device_put(rng.normal(size=SHAPES[path].shape).astype(SHAPES[path].dtype), place(path)) for path in paths
  }


def test_the_layout_is_of_shapes_alone_and_keeps_its_order():
  for seed in range(3):
    paths = [*KINDS]
    random.Random(seed).shuffle(paths)
    found = packing.layout(SHAPES, {path: KINDS[path] for path in paths}, {"d.bias"}).packed
    assert {name: [*sizes.items()] for name, sizes in found.items()} == {
      name: [*sizes.items()] for name, sizes in PACKED.items()
    }


def test_packed_and_by_path_again_every_bit_and_place_is_the_same():
  mesh = steps.make_mesh(2, 4, 1)
  split = jax.sharding.PartitionSpec(None, "fsdp")
  place = lambda path: jax.sharding.NamedSharding(mesh, split if path == "a.kernel" else sharding.REPLICATED)
  layout = packing.layout(SHAPES, KINDS, {"d.bias"})
  trained = KINDS.keys() - {"d.bias"} | {"logit_scale"}
  state = TrainState(params=draw(SHAPES, place), ema=draw(trained, place))
  packed = layout.pack_state(state)
  assert packed.frozen.keys() == {"vectors.frozen.float32"} and packed.teacher == {}
  assert packed.params.keys() == PACKED.keys() - packed.frozen.keys() | {"a.kernel", "logit_scale", "shift"}
  assert packed.ema.keys() == packed.params.keys() - {"shift"}
  assert packed.params["a.kernel"] is state.params["a.kernel"]
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, layout.pack_state(packed), packed))
  found = layout.by_path(packed)
  assert jax.tree.structure(found) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
def test_a_packed_step_is_the_same_to_the_bit_as_one_by_path(monkeypatch, mesh_shape):
  """Parameters, averages, moments and metrics; clipped, with and without decay."""
  changes = {"optim.clip_norm": 0.1, "optim.warmup_steps": 0, "optim.weight_decay": 0.1}
  config, found = steps.make_config("discrimination", **changes), []
  for is_packed in (True, False):
    if not is_packed:
      monkeypatch.setattr(packing, "layout", lambda shapes, kinds, fixed: packing.Layout({}, frozenset(fixed)))
    trainer = steps.Trainer(config, steps.make_mesh(*mesh_shape))
    assert bool(trainer.step.layout.packed) == is_packed
    state, metrics = trainer.run(trainer.initial(), *(steps.make_batch(config, seed) for seed in range(2)))
    moments = [
      trainer.step.layout.unpack(
        {key: x for _, tree in optax.tree.get_all_with_path(state.opt_state, name) for key, x in tree.items()}
      )
      for name in ("mu", "nu")
    ]
    found.append(jax.device_get((state.params, state.ema, moments, metrics)))
  for (name, a), b in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(name)


@pytest.mark.parametrize(
  "config, changed, fixed", [(steps.make_config(), 0, 0), (diffdis_cc3m.get_config("latents=none"), 0, 0)]
)
def test_how_many_arrays_a_step_takes_and_changes(config, changed, fixed):
  """What is changed comes back; the batch and the metrics are a few more."""
  trainer = steps.build_trainer(config, steps.make_mesh())
  assert [len(jax.tree.leaves(half)) for half in trainer.abstract_state.split()] == [changed, fixed]
  for path, leaf in trainer.shapes.items():
    if len(leaf.shape) == 1:  # packed, whole on every device
      assert not any(sharding.spec(path, leaf.shape, trainer.mesh)), path
  matrices = [path for path in trainer.trainable if len(trainer.shapes[path].shape) > 1]
  assert changed < 4 * len(matrices) + 32
