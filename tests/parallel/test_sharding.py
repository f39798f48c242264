from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import diffdis_cc3m
from diffdis_jax.common.params import first_match
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import chips, hlo, targets
from diffdis_jax.training.step import abstract_batch
from tests import steps
from tests.steps import build_trainer, network_of

# (data, fsdp, tensor), all those of eight devices that split a batch of 16.
SHAPES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
IN_CI = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
STEPS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
  """Of five steps on different batches: the loss, its two parts, the gradient's norm, and the first step's gradient."""

  losses: np.ndarray
  norms: np.ndarray
  gradient: dict[str, np.ndarray]


def measure(trainer: steps.Trainer) -> Measured:
  first, *rest = (steps.make_batch(trainer.config, seed) for seed in range(STEPS))
  state, metrics = trainer.run(trainer.initial(), first)
  gradient = first_gradient(state.opt_state, trainer)
  _, more = trainer.run(state, *rest)
  names = ["grad_norm", "loss", *(f"loss_{objective}" for objective in trainer.config.objectives)]
  values = np.array([[steps.means(now)[name] for name in names] for now in metrics + more])
  return Measured(values[:, 1:], values[:, 0], gradient)


def first_gradient(opt_state: Any, trainer: steps.Trainer) -> dict[str, np.ndarray]:
  """Adam's first moment after one step is 1 - b1 of the gradient, where that is not clipped."""
  assert not trainer.config.optim.clip_norm
  moments = steps.moments(opt_state, "mu")
  found = {path: np.asarray(x) / (1 - trainer.config.optim.b1) for path, x in moments.items()}
  assert found.keys() == set(trainer.step.trainable)
  return found


def measure_on(*shapes: tuple[int, int, int], objectives: tuple[str, ...] = (), **changes: Any) -> list[Measured]:
  """`measure` on each mesh. Two compile at a time; one runs at a time, since all use the same devices."""
  config = steps.make_config(*objectives, **{"optim.clip_norm": 0.0}, **changes)
  with ThreadPoolExecutor(2) as pool:
    trainers = list(pool.map(lambda shape: steps.Trainer(config, steps.make_mesh(*shape)), shapes))
  return [measure(trainer) for trainer in trainers]


def assert_same(found: Measured, expected: Measured, name: str) -> None:
  np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-3, err_msg=name)
  largest = max(np.linalg.norm(value) for value in expected.gradient.values())
  for path, value in expected.gradient.items():
    # Beside the largest, since a key's bias has no gradient but what rounding leaves.
    error = np.linalg.norm(found.gradient[path] - value) / (np.linalg.norm(value) + 1e-4 * largest)
    assert error < 1e-3, f"{name}: {path}: {error:.1e}"


@pytest.mark.slow
def test_five_joint_steps_on_eight_devices_equal_those_on_one():
  expected, *found = measure_on((1, 1, 1), *IN_CI)
  assert len(set(expected.losses[:, 0])) == STEPS
  for shape, each in zip(IN_CI, found, strict=True):
    assert_same(each, expected, str(shape))


@pytest.mark.slow
def test_attention_at_several_levels_on_eight_devices_equals_that_on_one():
  """Losses and gradients of discrimination, whose text token joins the image's at two levels and in the middle."""
  shapes = [(2, 2, 2), (1, 1, 8)]
  changes = {"model.unet.widths": (8, 8), "model.unet.attention": (True, True)}
  # Of the parts where attention is: the compiler's time is what this test costs.
  changes["optim.groups"] = ((r"^unet\.(down|middle)|^text_stream", "new"), (".*", "frozen"))
  expected, *found = measure_on((1, 1, 1), *shapes, objectives=("discrimination",), **changes)
  assert {f"text_stream.blocks.{i}.fc_in.kernel" for i in range(3)} <= expected.gradient.keys()
  for shape, each in zip(shapes, found, strict=True):
    assert_same(each, expected, str(shape))


@pytest.mark.full
def test_every_mesh_shape_with_two_levels_and_accumulation():
  changes = {"model.unet.widths": (8, 16), "model.unet.attention": (True, True), "image_size": 32}
  changes |= {"optim.accumulate": 2}
  expected, *found = measure_on((1, 1, 1), *SHAPES, **changes)
  for shape, each in zip(SHAPES, found, strict=True):
    assert_same(each, expected, str(shape))


def test_a_residual_on_a_mesh_with_three_axes():
  """The compiler bug that decides the order of the axes in sharding.BATCH, alone."""
  mesh = steps.make_mesh(2, 2, 2)
  rng = np.random.default_rng(0)
  x, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 8), (8, 8), (8, 8)))
  weights = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp", "tensor"), ("tensor", "fsdp"))]
  residual = jax.jit(lambda x, a, b: x @ a + (x @ a) @ b, in_shardings=(sharding.batch_sharding(mesh), *weights))
  np.testing.assert_allclose(residual(x, a, b), x @ a + (x @ a) @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_parameters_are_born_sharded_and_their_state_lies_with_them():
  config = steps.make_config("discrimination")
  mesh = steps.make_mesh(2, 2, 2)
  trainer = build_trainer(config, mesh)
  params = trainer.init_params(jax.random.key(0))
  state = trainer.with_params(dict(params))
  assert params.keys() == trainer.shapes.keys()

  kernel = "text_encoder.layers.0.mlp.fc1.kernel"
  assert trainer.shapes[kernel].shape == (16, 32)
  assert {shard.data.shape for shard in state.params[kernel].addressable_shards} == {(8, 16)}
  conv = "unet.down.0.resnets.0.conv1.kernel"
  assert {shard.data.shape for shard in state.params[conv].addressable_shards} == {(3, 3, 4, 4)}
  assert state.params["logit_scale"].sharding.is_fully_replicated

  params = state.params
  split = {name for name, x in params.items() if not x.sharding.is_fully_replicated}
  assert sum(params[name].size for name in split) > 0.9 * sum(x.size for x in params.values())
  assert {name: x.sharding for name, x in params.items()} == trainer.param_shardings
  for name, x in state.ema.items():
    assert x.sharding == state.params[name].sharding, name
  moments = 0
  for path, x in jax.tree.leaves_with_path(state.opt_state):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in state.params]
    if names:
      assert x.sharding == state.params[names[-1]].sharding, path
      moments += 1
    else:
      assert x.sharding.is_fully_replicated
  assert moments == 2 * len(trainer.trainable)


def test_initial_parameters_do_not_depend_on_the_mesh():
  config = steps.make_config("reconstruction")
  one, eight = (build_trainer(config, steps.make_mesh(*shape)) for shape in ((1, 1, 1), (2, 2, 2)))
  expected, found = (jax.device_get(trainer.init_params(jax.random.key(3))) for trainer in (one, eight))
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
  other = jax.device_get(one.init_params(jax.random.key(4)))
  assert (other["autoencoder.conv_in.kernel"] != expected["autoencoder.conv_in.kernel"]).all()


@pytest.mark.parametrize(
  "axes, shape",
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 2, -1), (1, 2, 4)),
    ((8, 1, -1), (8, 1, 1)),
    ((2, 4, 1), (2, 4, 1)),
  ],
)
def test_an_axis_of_minus_one_takes_what_is_left(axes, shape):
  mesh = sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2])
  assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize("axes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (16, 1, 1), (-2, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices(axes):
  with pytest.raises(UserError, match=rf"mesh data={axes[0]}, fsdp={axes[1]}, tensor={axes[2]}"):
    sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2])


def test_a_batch_that_the_mesh_does_not_divide():
  mesh = steps.make_mesh(2, 2, 2)
  sharding.check_batch(mesh, 8, 2)
  sharding.check_batch(mesh, 4, 1)
  for batch_size, accumulate, parts in ((6, 1, 4), (0, 1, 4), (12, 2, 8), (-4, 1, 4)):
    with pytest.raises(
      UserError, match=f"batch_size is {batch_size}; .*must be a multiple of {parts}, such as"
    ) as error:
      sharding.check_batch(mesh, batch_size, accumulate)
    suggested = int(str(error.value).rpartition(" ")[2])
    sharding.check_batch(mesh, suggested, accumulate)


def test_a_mesh_that_leaves_processes_without_rows_of_their_own(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  sharding.check_batch(steps.make_mesh(2, 2, 2), 8, 1)
  with pytest.raises(UserError, match="4 processes"):
    sharding.check_batch(steps.make_mesh(2, 1, 4), 8, 1)


def test_axes_that_do_not_divide_a_dimension_are_left_out():
  mesh = steps.make_mesh(2, 2, 2)
  assert sharding.spec("unet.time.fc1.kernel", (8, 32), mesh) == PartitionSpec("fsdp", "tensor")
  assert sharding.spec("unet.time.fc1.kernel", (7, 32), mesh) == PartitionSpec(None, "tensor")
  assert sharding.spec("unet.time.fc1.bias", (32,), mesh) == PartitionSpec()
  assert sharding.spec("autoencoder.conv_in.kernel", (3, 3, 3, 8), mesh) == PartitionSpec(None, None, None, "tensor")


def test_an_unmatched_parameter_is_an_error():
  with pytest.raises(UserError, match="no rule of sharding.RULES matches parameter unet.new_thing"):
    sharding.spec("unet.new_thing", (8, 8), steps.make_mesh())


def test_every_parameter_of_every_part_matches_a_rule_that_fits_its_rank():
  for objectives in (("generation", "discrimination"), ("reconstruction",)):
    config = steps.make_config(*objectives)
    for name, leaf in network_of(config).shapes.items():
      rule = first_match(name, sharding.RULES, "sharding.RULES")
      assert len(rule) in (0, len(leaf.shape)), name


def test_rows_go_to_the_devices_whole_and_in_order():
  mesh = steps.make_mesh(2, 2, 2)
  rows = np.arange(32, dtype=np.int32).reshape(8, 4)
  placed = sharding.to_global({"tokens": rows}, mesh)["tokens"]
  np.testing.assert_array_equal(placed, rows)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 4)}


@pytest.mark.slow
def test_only_parameters_and_embeddings_are_gathered_in_a_step():
  """No image and no activation: whatever is made whole has a parameter's shape, or is a row's vector or two numbers."""
  # The same program as one of the joint steps above, which is compiled once.
  config, mesh = steps.make_config(**{"optim.clip_norm": 0.0}), steps.make_mesh(1, 8, 1)
  trainer = build_trainer(config, mesh)
  lowered = trainer.train_step.lower(trainer.abstract_state, abstract_batch(trainer.run, trainer.network, mesh))
  text = lowered.compile().as_text()
  b, d = config.batch_size, config.model.text_encoder.width
  allowed = {leaf.shape for leaf in trainer.shapes.values()} | {(b, d), (b, 2)}
  squeezed = {tuple(size for size in shape if size > 1) for shape in allowed}
  found = hlo.collectives(text)
  for each in found:
    assert each.kind in ("all-gather", "all-reduce", "reduce-scatter"), each
    if each.kind == "all-gather":
      assert {tuple(size for size in shape if size > 1) for shape in each.shapes} <= squeezed, each
  gathered = [shape for each in found if each.kind == "all-gather" for shape in each.shapes]
  kernel = trainer.shapes["unet.down.0.resnets.0.conv1.kernel"].shape
  assert kernel in gathered and (b, d) in gathered


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (1, 4, 2)])
def test_the_papers_state_on_eight_devices_is_at_most_a_seventh(mesh_shape):
  trainer = build_trainer(diffdis_cc3m.get_config("latents=none"), steps.make_mesh(*mesh_shape))
  whole = local = 0
  for leaf in jax.tree.leaves(trainer.abstract_state):
    size = leaf.dtype.itemsize
    whole += size * math.prod(leaf.shape)
    local += size * math.prod(leaf.sharding.shard_shape(leaf.shape))
  assert whole > 4 * 4 * 8e8 and local < whole / 7


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  slice_index: int
  platform: str = "cpu"
  device_kind: str = "cpu"
  process_index: int = 0


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2), (8, 1, 1), (2, 1, 4)])
def test_only_data_crosses_slices(shape):
  devices = [Device(id=i, slice_index=i % 2) for i in range(8)]
  placed = sharding.arrange(shape, devices, 2)
  assert placed.shape == shape and set(placed.flat) == set(devices)
  slices = np.vectorize(lambda device: device.slice_index)(placed)
  half = shape[0] // 2
  assert (slices[:half] == 0).all() and (slices[half:] == 1).all()


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", ["v4:2x2x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4"])
def test_any_mesh_fits_any_torus(name, slices):
  topology = chips.parse(name)
  devices = targets.tpu_devices(topology, slices)
  n = topology.size * slices
  assert len(devices) == n
  sizes = [2**i for i in range(n.bit_length())]
  for data, fsdp in itertools.product(sizes, sizes):
    if data % slices == 0 and n % (data * fsdp) == 0:
      mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=-1, devices=devices)
      assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


def test_data_that_does_not_divide_into_the_slices():
  devices = [Device(id=i, slice_index=i % 2, platform="tpu") for i in range(8)]
  with pytest.raises(UserError, match="mesh data=1 lies over 2 slices.*multiple of 2"):
    sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=devices)


def test_hosts_of_gpus_are_no_slices():
  devices = [Device(id=i, slice_index=i // 4, platform="gpu", device_kind="NVIDIA H100") for i in range(8)]
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=devices)
  assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_sums_over_own_rows_lie_where_each_parameter_is_stored(shape):
  mesh = steps.make_mesh(*shape)
  rng = np.random.default_rng(0)
  rows, weights = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
  # fsdp splits one of them along its first axis, one along its second, and one not at all.
  paths = ("unet.q.kernel", "unet.out.kernel", "logit_scale")
  summed = {paths[0]: (8, 8), paths[1]: (8, 8), paths[2]: ()}
  stored = {path: sharding.spec(path, like, mesh) for path, like in summed.items()}
  if shape[1] > 1:
    assert sorted([*part].index("fsdp") for part in stored.values() if "fsdp" in part) == [0, 1]

  def f(whole, own):
    square = own.T @ own
    return {paths[0]: square, paths[1]: square * 2.0, paths[2]: own.sum()}, own @ whole

  like = {path: jax.ShapeDtypeStruct(each, np.float32) for path, each in summed.items()}
  own = jax.device_put(rows, NamedSharding(mesh, sharding.BATCH))
  sums, results = jax.jit(sharding.on_own_rows(f, mesh, like))(weights, own)
  np.testing.assert_allclose(sums[paths[0]], rows.T @ rows, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(sums[paths[1]], rows.T @ rows * 2, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(sums[paths[2]], rows.sum(), rtol=1e-4)
  np.testing.assert_allclose(results, rows @ weights, rtol=1e-5, atol=1e-5)
