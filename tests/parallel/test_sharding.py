from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import diffdis_cc3m
from diffdis_jax.common.params import first_match
from diffdis_jax.errors import UserError
from diffdis_jax.parallel import sharding
from diffdis_jax.preflight import hlo
from diffdis_jax.training.step import abstract_batch
from tests import steps
from tests.steps import build_trainer, network_of

# All meshes (data, fsdp, tensor) of eight devices that split a batch of 16.
SHAPES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
IN_CI = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
STEPS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
  """The losses and gradient norms of five steps on different batches, and the gradient of the first step."""

  losses: np.ndarray
  norms: np.ndarray
  gradient: dict[str, np.ndarray]


def measure(trainer: steps.Trainer) -> Measured:
  first, *later_batches = (steps.make_batch(trainer.config, seed) for seed in range(STEPS))
  state, metrics = trainer.run(trainer.initial(), first)
  gradient = first_gradient(state.opt_state, trainer)
  _, later_metrics = trainer.run(state, *later_batches)
  names = ["grad_norm", "loss", *(f"loss_{objective}" for objective in trainer.config.objectives)]
  values = np.array([[steps.means(step_metrics)[name] for name in names] for step_metrics in metrics + later_metrics])
  return Measured(values[:, 1:], values[:, 0], gradient)


def first_gradient(opt_state: Any, trainer: steps.Trainer) -> dict[str, np.ndarray]:
  """Return the first step's unclipped gradient: Adam's first moment is (1 - b1) times it."""
  assert not trainer.config.optim.clip_norm
  moments = steps.moments(opt_state, "mu")
  gradient = {path: np.asarray(x) / (1 - trainer.config.optim.b1) for path, x in moments.items()}
  assert gradient.keys() == set(trainer.step.trainable)
  return gradient


def measure_on(*shapes: tuple[int, int, int], objectives: tuple[str, ...] = (), **changes: Any) -> list[Measured]:
  """Measure steps on each mesh. Two compile at a time, but one runs at a time, since all use the same devices."""
  config = steps.make_config(*objectives, **{"optim.clip_norm": 0.0}, **changes)
  with ThreadPoolExecutor(2) as pool:
    trainers = list(pool.map(lambda shape: steps.Trainer(config, steps.make_mesh(*shape)), shapes))
  return [measure(trainer) for trainer in trainers]


def assert_same(measured: Measured, expected: Measured, name: str) -> None:
  np.testing.assert_allclose(measured.losses, expected.losses, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(measured.norms, expected.norms, rtol=1e-3, err_msg=name)
  largest = max(np.linalg.norm(value) for value in expected.gradient.values())
  for path, value in expected.gradient.items():
    # Add the largest norm to the divisor: the gradient of a key's bias is rounding alone.
    error = np.linalg.norm(measured.gradient[path] - value) / (np.linalg.norm(value) + 1e-4 * largest)
    assert error < 1e-3, f"{name}: {path}: {error:.1e}"


@pytest.mark.slow
def test_five_joint_steps_on_eight_devices_equal_those_on_one():
  expected, *on_meshes = measure_on((1, 1, 1), *IN_CI)
  assert len(set(expected.losses[:, 0])) == STEPS
  for shape, measured in zip(IN_CI, on_meshes, strict=True):
    assert_same(measured, expected, str(shape))


@pytest.mark.full
def test_every_mesh_shape_with_two_levels_and_accumulation():
  changes = {"model.unet.widths": (8, 16), "model.unet.attention": (True, True), "image_size": 32}
  changes |= {"optim.accumulate": 2}
  expected, *on_meshes = measure_on((1, 1, 1), *SHAPES, **changes)
  for shape, measured in zip(SHAPES, on_meshes, strict=True):
    assert_same(measured, expected, str(shape))


@pytest.mark.slow
def test_parameters_are_born_sharded_and_their_state_lies_with_them():
  trainer = build_trainer(steps.make_config("discrimination"), steps.make_mesh(2, 2, 2))
  state = trainer.with_params(dict(trainer.init_params(jax.random.key(0))))
  params = state.params
  assert {name: x.sharding for name, x in params.items()} == trainer.param_shardings
  kernel = "text_encoder.layers.0.mlp.fc1.kernel"
  assert params[kernel].shape == (16, 32)
  assert {shard.data.shape for shard in params[kernel].addressable_shards} == {(8, 16)}
  split = {name for name, x in params.items() if not x.sharding.is_fully_replicated}
  assert sum(params[name].size for name in split) > 0.9 * sum(x.size for x in params.values())
  assert all(x.sharding == params[name].sharding for name, x in state.ema.items())
  for moment in ("mu", "nu"):
    moments = steps.moments(state.opt_state, moment)
    assert {name: x.sharding for name, x in moments.items()} == {name: params[name].sharding for name in moments}
    assert moments.keys() == set(trainer.trainable)


def test_initial_parameters_do_not_depend_on_the_mesh():
  config = steps.make_config("reconstruction")
  single, eight = (build_trainer(config, steps.make_mesh(*shape)) for shape in ((1, 1, 1), (2, 2, 2)))
  expected, split = (jax.device_get(trainer.init_params(jax.random.key(3))) for trainer in (single, eight))
  for name in expected:
    np.testing.assert_allclose(split[name], expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
  other = jax.device_get(single.init_params(jax.random.key(4)))
  assert (other["autoencoder.conv_in.kernel"] != expected["autoencoder.conv_in.kernel"]).all()


@pytest.mark.parametrize(
  "axes, shape", [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((8, 1, -1), (8, 1, 1)), ((2, 4, 1), (2, 4, 1))]
)
def test_an_axis_of_minus_one_takes_what_is_left(axes, shape):
  mesh = sharding.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2])
  assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize("axes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
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


def test_every_parameter_has_a_rule_whose_axes_divide_it():
  mesh = steps.make_mesh(2, 2, 2)
  assert sharding.spec("unet.time.fc1.kernel", (8, 32), mesh) == PartitionSpec("fsdp", "tensor")
  assert sharding.spec("unet.time.fc1.kernel", (7, 32), mesh) == PartitionSpec(None, "tensor")
  with pytest.raises(UserError, match="no rule of sharding.RULES matches parameter unet.new_thing"):
    sharding.spec("unet.new_thing", (8, 8), steps.make_mesh())
  for objectives in (("generation", "discrimination"), ("reconstruction",)):
    for name, leaf in network_of(steps.make_config(*objectives)).shapes.items():
      assert len(first_match(name, sharding.RULES, "sharding.RULES")) in (0, len(leaf.shape)), name


@pytest.mark.slow
def test_only_parameters_and_embeddings_are_gathered_in_a_step():
  """All gathers of a step have the shape of a parameter, of an embedding, or of two numbers, and never of an image."""
  # One of the joint steps above has already compiled this program.
  config, mesh = steps.make_config(**{"optim.clip_norm": 0.0}), steps.make_mesh(1, 8, 1)
  trainer = build_trainer(config, mesh)
  lowered = trainer.train_step.lower(trainer.abstract_state, abstract_batch(trainer.run, trainer.network, mesh))
  text = lowered.compile().as_text()
  b, d = config.batch_size, config.model.text_encoder.width
  allowed = {leaf.shape for leaf in trainer.shapes.values()} | {(b, d), (b, 2)}
  squeezed = {tuple(size for size in shape if size > 1) for shape in allowed}
  collectives = hlo.collectives(text)
  assert {collective.kind for collective in collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}
  gathered = [shape for collective in collectives if collective.kind == "all-gather" for shape in collective.shapes]
  assert {tuple(size for size in shape if size > 1) for shape in gathered} <= squeezed
  kernel = trainer.shapes["unet.down.0.resnets.0.conv1.kernel"].shape
  assert kernel in gathered and (b, d) in gathered


def test_the_papers_state_on_eight_devices_is_at_most_a_seventh():
  trainer = build_trainer(diffdis_cc3m.get_config("latents=none"), steps.make_mesh(1, 8, 1))
  total = local = 0
  for leaf in jax.tree.leaves(trainer.abstract_state):
    size = leaf.dtype.itemsize
    total += size * math.prod(leaf.shape)
    local += size * math.prod(leaf.sharding.shard_shape(leaf.shape))
  assert total > 4 * 4 * 8e8 and local < total / 7


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  slice_index: int
  platform: str = "cpu"
  device_kind: str = "cpu"
  process_index: int = 0


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2)])
def test_only_data_crosses_slices(shape):
  devices = [Device(id=i, slice_index=i % 2) for i in range(8)]
  placed = sharding.arrange(shape, devices, 2)
  assert placed.shape == shape and set(placed.flat) == set(devices)
  slices = np.vectorize(lambda device: device.slice_index)(placed)
  half = shape[0] // 2
  assert (slices[:half] == 0).all() and (slices[half:] == 1).all()
  tpus = [dataclasses.replace(device, platform="tpu") for device in devices]
  with pytest.raises(UserError, match="mesh data=1 lies over 2 slices.*multiple of 2"):
    sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=tpus)
