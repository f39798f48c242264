from __future__ import annotations

import errno

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from diffdis_jax.common import storage
from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import UserError
from diffdis_jax.run import checkpoint, restore, workdir
from diffdis_jax.structs import TrainState

OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0),
  optax.multi_transform(
    {"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()},
    {"unet.conv": "train", "unet.conv.kernel": "train", "text.bias": "freeze"},
  ),
)


def make_state(seed: int = 0) -> TrainState:
  rng = np.random.default_rng(seed)
  params = {
    "unet.conv": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
    "unet.conv.kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16),
    "text.bias": jnp.asarray(rng.normal(size=5), jnp.float32),
  }
  opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed + 1, x.dtype), OPTIMIZER.init(params))
  ema = {name: params[name] * 2 for name in ("unet.conv", "unet.conv.kernel")}
  return TrainState(params=params, ema=ema, opt_state=opt_state)


def place(state: TrainState, sharding_of) -> TrainState:
  return jax.tree.map(lambda x: jax.device_put(x, sharding_of(x)), state)


def abstract(state: TrainState, sharding_of) -> TrainState:
  def abstract_array(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x))

  return jax.tree.map(abstract_array, state)


def one_device(_) -> SingleDeviceSharding:
  return SingleDeviceSharding(jax.devices()[0])


def on_mesh(count: int):
  mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])

  def sharding_of(x) -> NamedSharding:
    divides = x.ndim and x.shape[0] % count == 0
    return NamedSharding(mesh, PartitionSpec("fsdp") if divides else PartitionSpec())

  return sharding_of


def make_iterator():
  return iter(grain.MapDataset.source(np.arange(50)).shuffle(seed=3).repeat().batch(4).to_iter_dataset())


def assert_same_bits(got, want) -> None:
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(workdir, *steps: int, state: TrainState | None = None, **options) -> None:
  with checkpoint.Checkpointer(workdir, checkpoint.CheckpointPolicy(**options)) as checkpointer:
    for step in steps:
      checkpointer.save(step, state or make_state(step), make_iterator())


@pytest.mark.parametrize("before, after", [(8, 1), (8, 4), (1, 8)])
def test_a_checkpoint_is_restored_bit_for_bit_on_any_mesh(tmp_path, before, after):
  state, data = make_state(), make_iterator()
  next(data), next(data)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(2, place(state, on_mesh(before)), data, meta={"note": "x"})
  following = [next(data) for _ in range(20)]

  data = make_iterator()
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.latest_step() == 2
  restored = restore.read_state(tmp_path, 2, abstract(state, on_mesh(after)), data)
  assert_same_bits(
    (restored.state.params, restored.state.ema, restored.state.opt_state), (state.params, state.ema, state.opt_state)
  )
  assert restored.state.params["unet.conv"].sharding == on_mesh(after)(state.params["unet.conv"])
  assert restored.meta == {"step": 2, "note": "x"}
  np.testing.assert_array_equal([next(data) for _ in range(20)], following)


@pytest.mark.parametrize("sharding_of", [one_device, on_mesh(8)])
def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, sharding_of):
  step = jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)
  params = {"a": jnp.arange(1 << 20, dtype=jnp.float32)}
  params = place(TrainState(params=params), sharding_of).params
  jax.block_until_ready(
    step(jax.tree.map(jnp.copy, params))
  )  # compile now, so that the step below runs before the save ends
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, TrainState(params=params))
    jax.block_until_ready(step(params))
  restored = restore.restore_params(tmp_path)
  np.testing.assert_array_equal(restored["a"], np.arange(1 << 20))


def test_parameters_are_restored_with_and_without_their_average(tmp_path):
  save(tmp_path, 1, 2)
  state = make_state(2)
  assert_same_bits(restore.restore_params(tmp_path), dict(sorted({**state.params, **state.ema}.items())))
  assert_same_bits(restore.restore_params(tmp_path, ema=False), state.params)
  assert_same_bits(restore.restore_params(tmp_path, step=1, ema=False), make_state(1).params)
  on_four = restore.restore_params(tmp_path, abstract=abstract(state, on_mesh(4)).params)
  assert_same_bits(on_four, {**state.params, **state.ema})
  assert {len(x.sharding.device_set) for x in on_four.values()} == {4}


def test_a_checkpoint_without_a_commit_mark_is_skipped_and_saved_again(tmp_path, caplog):
  save(tmp_path, 1, 7)
  (tmp_path / "checkpoints" / "7" / "commit_success.txt").unlink()
  with pytest.raises(UserError, match="no checkpoint 7 in .*: it was never committed.*committed there: 1$"):
    restore.restore_params(tmp_path, step=7)
  assert_same_bits(restore.restore_params(tmp_path, ema=False), make_state(1).params)
  assert (tmp_path / "checkpoints" / "7").exists(), "reading changes nothing"

  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.latest_step() == 1
    assert "7 has no commit_success.txt and is ignored" in caplog.text
    assert checkpointer.save(5, make_state(5))
    assert checkpointer.save(7, make_state(8))
  assert_same_bits(restore.restore_params(tmp_path, step=7, ema=False), make_state(8).params)


def test_a_missing_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match="no checkpoint in .*checkpoints; train first"):
    restore.restore_params(tmp_path)
  assert workdir.latest_step(tmp_path) is None
  assert list(tmp_path.iterdir()) == []
  save(tmp_path, 1)
  with pytest.raises(UserError, match="no checkpoint 3 in .*; committed there: 1$"):
    restore.restore_params(tmp_path, step=3)


@pytest.mark.parametrize("raised_by_wait", [True, False])
def test_a_save_that_fails_is_repeated_at_the_next_save(tmp_path, monkeypatch, caplog, raised_by_wait):
  """A background save raises its error when the run waits for it; a launcher then restarts the run."""

  def full(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 177 bytes to file 14: No space left on device")

  state = make_state()
  with checkpoint.Checkpointer(tmp_path, CheckpointPolicy(keep_last=1)) as checkpointer:
    checkpointer.save(1, state)
    checkpointer.wait()
    with monkeypatch.context() as patch:
      patch.setattr(checkpointer._manager, "wait_until_finished", full)
      if raised_by_wait:
        with pytest.raises(ValueError, match="No space left on device"):
          checkpointer.wait()
      else:
        assert checkpointer.save(2, state)
    assert checkpointer.save(3, state)
  assert not raised_by_wait == ("No space left on device; trying again at step 2" in caplog.text)
  assert [path.name for path in workdir.checkpoints(tmp_path).iterdir() if path.is_dir()] == ["3"]


def test_a_checkpoint_is_read_after_the_storage_was_unreachable(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(storage, "PAUSE", 0.01)
  save(tmp_path, 1)
  original, errors = restore._read_tree, [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale")]

  def flaky(*args, **options):
    if errors:
      raise errors.pop()
    return original(*args, **options)

  monkeypatch.setattr(restore, "_read_tree", flaky)
  restored = restore.read_state(tmp_path, 1, abstract(make_state(1), one_device), make_iterator())
  assert_same_bits(restored.state, make_state(1))
  assert f"cannot read {tmp_path}/checkpoints/1: Stale; trying again in 0.01 s" in caplog.text


def test_a_checkpoint_of_another_model_is_refused_with_the_array_that_differs(tmp_path):
  save(tmp_path, 1)
  expected_shapes = abstract(make_state(), one_device).params
  expected_shapes["text.bias"] = jax.ShapeDtypeStruct((6,), jnp.float32)
  expected_shapes["unet.new"] = jax.ShapeDtypeStruct((2,), jnp.float32)
  with pytest.raises(UserError, match=r"2 arrays; the first, text.bias, is float32\[5\] there and float32\[6\] here"):
    restore.restore_params(tmp_path, abstract=expected_shapes)


@pytest.mark.parametrize(
  "best_is, values, kept",
  [
    ("max", {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: 0.8, 10: 0.5, 11: None, 12: 0.5}, [2, 5, 10, 12]),
    ("min", {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: 0.8, 10: 0.5, 11: None, 12: 0.5}, [1, 4, 10, 12]),
    ("max", {1: 0.5, 2: np.nan, 3: 0.5, 4: 0.1, 5: np.nan}, [1, 3, 5]),
    ("min", {1: 0.5, 2: np.nan, 3: 0.5, 4: 0.9, 5: np.nan}, [1, 3, 5]),
  ],
)
def test_the_best_the_last_and_every_tenth_checkpoint_are_kept(tmp_path, best_is, values, kept):
  policy = CheckpointPolicy(keep_last=1, keep_every=10, keep_best=2, best_metric="a", best_is=best_is)
  for step, value in values.items():  # each new Checkpointer reads the metrics of earlier saves
    with checkpoint.Checkpointer(tmp_path, policy) as checkpointer:
      checkpointer.save(step, make_state(), metrics={} if value is None else {"a": value})
  assert workdir.committed_steps(workdir.checkpoints(tmp_path)) == kept
  best = checkpoint.best(tmp_path, policy)
  assert best is not None and (best.step, best.value) == (kept[0], values[kept[0]])
