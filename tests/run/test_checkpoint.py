from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time

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
from diffdis_jax.parallel import processes
from diffdis_jax.run import checkpoint, digests, restore, workdir
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
  def one(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x))

  return jax.tree.map(one, state)


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


@pytest.mark.parametrize("before, after", [(1, 1), (8, 1), (8, 4), (1, 8)])
def test_round_trip_keeps_every_bit_on_any_mesh(tmp_path, before, after):
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


def everywhere(_) -> NamedSharding:
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize("sharding_of", [one_device, on_mesh(8), everywhere])
def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path, sharding_of):
  step = jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)
  params = {"a": jnp.arange(1 << 20, dtype=jnp.float32)}
  params = place(TrainState(params=params), sharding_of).params
  jax.block_until_ready(step(jax.tree.map(jnp.copy, params)))  # compiled, so that it is quick below
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, TrainState(params=params))
    jax.block_until_ready(step(params))
  restored = restore.restore_params(tmp_path)
  np.testing.assert_array_equal(restored["a"], np.arange(1 << 20))


def test_saving_compiles_nothing_for_arrays_that_all_devices_hold(tmp_path, caplog):
  state = place(TrainState(params={"a": jnp.ones((8, 24)), "b": jnp.ones((16, 5, 7))}), everywhere)
  with jax.log_compiles(), checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
  assert "Compiling" not in caplog.text


def test_a_state_without_average_and_optimizer_state(tmp_path):
  state = TrainState(params=make_state().params, opt_state=optax.sgd(0.1).init({}))
  save(tmp_path, 1, state=state)
  restored = restore.read_state(tmp_path, 1, abstract(state, one_device))
  assert_same_bits(
    (restored.state.params, restored.state.ema, restored.state.opt_state), (state.params, {}, state.opt_state)
  )


def test_parameters_alone_with_and_without_average(tmp_path):
  save(tmp_path, 1, 2)
  state = make_state(2)
  assert_same_bits(restore.restore_params(tmp_path), dict(sorted({**state.params, **state.ema}.items())))
  assert_same_bits(restore.restore_params(tmp_path, ema=False), state.params)
  assert_same_bits(restore.restore_params(tmp_path, step=1, ema=False), make_state(1).params)
  on_four = restore.restore_params(tmp_path, abstract=abstract(state, on_mesh(4)).params)
  assert_same_bits(on_four, {**state.params, **state.ema})
  assert {len(x.sharding.device_set) for x in on_four.values()} == {4}


def test_saving_a_step_again_changes_nothing(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(1, make_state(1))
    assert not checkpointer.save(1, make_state(5))
  assert_same_bits(restore.restore_params(tmp_path, ema=False), make_state(1).params)


def test_keeps_the_last_ones_and_every_tenth(tmp_path):
  save(tmp_path, 9, 10, 11, 12, 13, keep_last=2, keep_every=10)
  assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [10, 12, 13]


def test_without_a_commit_mark_it_is_refused_skipped_and_saved_again(tmp_path, caplog):
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


def test_no_checkpoint(tmp_path):
  with pytest.raises(UserError, match="no checkpoint in .*checkpoints; train first"):
    restore.restore_params(tmp_path)
  assert workdir.latest_step(tmp_path) is None
  assert list(tmp_path.iterdir()) == []
  save(tmp_path, 1)
  with pytest.raises(UserError, match="no checkpoint 3 in .*; committed there: 1$"):
    restore.restore_params(tmp_path, step=3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  "item", ["params", "ema", "opt_state", "meta", "data", "params/d", "params/_METADATA", "data/process_0-of-1.json"]
)
def test_a_checkpoint_with_a_missing_file_is_one_line(tmp_path, item):
  save(tmp_path, 1)
  path = tmp_path / "checkpoints" / "1" / item
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  with pytest.raises(UserError) as error:
    restore.read_state(tmp_path, 1, abstract(make_state(), one_device), make_iterator())
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("item", ["params", "ema", "opt_state"])
@pytest.mark.parametrize(
  "damage",
  [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:8] + bytes(len(data) - 8)],
  ids=["cut short", "emptied", "overwritten"],
)
def test_a_checkpoint_with_a_damaged_file_is_one_line(tmp_path, item, damage):
  large = {"unet.conv": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
  state = TrainState(
    params=large, ema=large, opt_state=large
  )  # small arrays lie in the index, not in files of their own
  save(tmp_path, 1, state=state)
  files = [path for path in (tmp_path / "checkpoints" / "1" / item).rglob("*") if path.is_file()]
  arrays = max(files, key=lambda path: path.stat().st_size)
  arrays.write_bytes(damage(arrays.read_bytes()))
  with pytest.raises(UserError) as error:
    restore.read_state(tmp_path, 1, abstract(state, one_device), make_iterator())
  line = rf"checkpoint {tmp_path}/checkpoints/1 cannot be read: {item}/.+; take another step, or .+"
  assert re.fullmatch(line, str(error.value))


@pytest.mark.parametrize("right, wrong", [("SingleDeviceSharding", "SinglmDeviceSharding"), ('"', "'"), ("{", "[")])
def test_a_flipped_bit_in_the_shardings_is_one_line(tmp_path, right, wrong):
  save(tmp_path, 1)
  file = tmp_path / "checkpoints" / "1" / "params" / "_sharding"
  file.write_text(file.read_text().replace(right, wrong, 1))
  with pytest.raises(UserError, match="checkpoints/1 cannot be read: params/_sharding holds "):
    restore.restore_params(tmp_path, ema=False)


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', "[" * 20_000, "{"])
def test_a_damaged_position_of_the_data_is_one_line(tmp_path, content):
  save(tmp_path, 1)
  for file in (tmp_path / "checkpoints" / "1" / "data").glob("process_*.json"):
    file.write_text(content)
  with pytest.raises(UserError, match="cannot be read: data/"):
    restore.read_state(tmp_path, 1, abstract(make_state(), one_device), make_iterator())


@pytest.mark.parametrize("late", [True, False])
def test_a_save_that_fails_is_tried_again_at_the_next_one(tmp_path, monkeypatch, caplog, late):
  """Within the save itself it is raised, and a launcher starts the run again."""

  def full(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 177 bytes to file 14: No space left on device")

  state = make_state()
  with checkpoint.Checkpointer(tmp_path, CheckpointPolicy(keep_last=1)) as checkpointer:
    checkpointer.save(1, state)
    checkpointer.wait()
    with monkeypatch.context() as patch:
      patch.setattr(checkpointer._manager, "wait_until_finished", full)
      if late:
        with pytest.raises(ValueError, match="No space left on device"):
          checkpointer.wait()
      else:
        assert checkpointer.save(2, state)
    assert checkpointer.save(3, state)
  assert not late == ("No space left on device; trying again at step 2" in caplog.text)
  assert [path.name for path in workdir.checkpoints(tmp_path).iterdir() if path.is_dir()] == ["3"]


def test_a_save_that_fails_in_the_background_leaves_the_last_checkpoint(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with checkpoint.Checkpointer(tmp_path, CheckpointPolicy(keep_last=1)) as checkpointer:
    checkpointer.save(1, make_state())
    checkpointer.wait()
    with monkeypatch.context() as patch:
      patch.setattr(digests, "write", full)
      checkpointer.save(2, make_state())
      while checkpointer._manager.is_saving_in_progress():
        time.sleep(0.01)
    assert workdir.committed_steps(workdir.checkpoints(tmp_path)) == [1]
    checkpointer.save(3, make_state())
  assert [path.name for path in workdir.checkpoints(tmp_path).iterdir() if path.is_dir()] == ["3"]


@pytest.mark.parametrize("where", ["_saved", "_read_tree"])
def test_a_checkpoint_on_storage_that_is_away_for_a_while_is_read(tmp_path, monkeypatch, caplog, where):
  monkeypatch.setattr(storage, "PAUSE", 0.01)
  save(tmp_path, 1)
  original, errors = getattr(restore, where), [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale")]

  def flaky(*args, **options):
    if errors:
      raise errors.pop()
    return original(*args, **options)

  monkeypatch.setattr(restore, where, flaky)
  restored = restore.read_state(tmp_path, 1, abstract(make_state(1), one_device), make_iterator())
  assert_same_bits(restored.state, make_state(1))
  assert f"cannot read {tmp_path}/checkpoints/1: Stale; trying again in 0.01 s" in caplog.text


def test_another_model_is_told_which_array_differs(tmp_path):
  save(tmp_path, 1)
  wanted = abstract(make_state(), one_device).params
  wanted["text.bias"] = jax.ShapeDtypeStruct((6,), jnp.float32)
  wanted["unet.new"] = jax.ShapeDtypeStruct((2,), jnp.float32)
  with pytest.raises(UserError, match=r"2 arrays; the first, text.bias, is float32\[5\] there and float32\[6\] here"):
    restore.restore_params(tmp_path, abstract=wanted)


KILLED = """
import sys, threading, types, jax.numpy as jnp
from diffdis_jax.run import checkpoint, digests
from diffdis_jax.structs import TrainState
with checkpoint.Checkpointer(sys.argv[1]) as checkpointer:
  for step in (1, 2):
    if step == 2:  # which is not finished before it is killed, however late that is
      digests.write = lambda *_, **__: threading.Event().wait()
    params = {"a.b": jnp.full((1 << 25,), step, jnp.float32)}
    checkpointer.save(step, types.SimpleNamespace(params=params, ema={}, opt_state=(), teacher={}))
    checkpointer.wait()
"""


def test_a_save_killed_half_way_leaves_the_last_good_checkpoint(tmp_path):
  process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "JAX_PLATFORMS": "cpu"})
  folder = tmp_path / "checkpoints"
  deadline = time.monotonic() + 60
  while not list(folder.glob("2*tmp*/params*")) and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  assert list(folder.glob("2*tmp*")), "killed too late"

  assert workdir.latest_step(tmp_path) == 1
  np.testing.assert_array_equal(restore.restore_params(tmp_path)["a.b"][::4096], 1)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(2, TrainState(params={"a.b": jnp.zeros(3)}))
  assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "2"]
  assert workdir.latest_step(tmp_path) == 2


@pytest.mark.parametrize("best_is, expected", [("max", [2, 4]), ("min", [3, 4])])
def test_the_best_stays_whichever_way_is_better(tmp_path, best_is, expected):
  kept = CheckpointPolicy(keep_last=1, keep_best=1, best_metric="a", best_is=best_is)
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    for step, value in enumerate((0.5, 0.9, 0.1, 0.6), start=1):
      checkpointer.save(step, make_state(), metrics={"a": value})
  assert workdir.committed_steps(workdir.checkpoints(tmp_path)) == expected
  best = checkpoint.best(tmp_path, kept)
  assert best is not None and best.step == expected[0]


@pytest.mark.parametrize("best_is", ["max", "min"])
def test_what_is_no_number_is_never_the_best(tmp_path, best_is):
  kept = CheckpointPolicy(keep_last=1, keep_best=1, best_metric="a", best_is=best_is)
  first, *others = (0.9, float("nan"), 0.5) if best_is == "max" else (0.1, float("nan"), 0.5)
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    for step, value in enumerate((first, *others, float("nan")), start=1):
      checkpointer.save(step, make_state(), metrics={"a": value})
  assert workdir.committed_steps(workdir.checkpoints(tmp_path)) == [1, 4]
  best = checkpoint.best(tmp_path, kept)
  assert best is not None and (best.step, best.value) == (1, first)


@pytest.mark.parametrize("best_is, values", [("max", (0.5, 0.75, 0.75)), ("min", (0.75, 0.5, 0.5))])
def test_of_equal_ones_the_earliest_is_the_best(tmp_path, best_is, values):
  for step, value in zip((2, 4, 6), values, strict=True):
    folder = tmp_path / "checkpoints" / str(step)
    (folder / workdir._METRICS).parent.mkdir(parents=True)
    (folder / workdir._METRICS).write_text(f'{{"a": {value}}}')
    (folder / digests.COMMIT_MARK).touch()
  kept = CheckpointPolicy(keep_best=1, best_metric="a", best_is=best_is)
  assert checkpoint.best(tmp_path, kept) == checkpoint.Best(4, values[1])


def make_second(monkeypatch, found: int) -> None:
  """Makes this process the second of two, of which the first has found the checkpoint of this step."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "is_first", lambda: False)
  monkeypatch.setattr(processes, "first_message", lambda mine: mine)
  monkeypatch.setattr(processes, "from_first", lambda mine: np.asarray(found))


def test_all_processes_read_the_checkpoint_that_the_first_finds(tmp_path, monkeypatch):
  """Of a run that has saved another one before the second looks."""
  save(tmp_path, 1, 2, keep_last=2)
  make_second(monkeypatch, found=1)
  assert restore.choose(tmp_path, None, ema=True) == (1, True)
  assert_same_bits(restore.restore_params(tmp_path, ema=False), make_state(1).params)


def test_of_a_thousand_checkpoints_the_newest_is_found_at_one_look(tmp_path, monkeypatch):
  """In a bucket each look is a request, and a start asks several times."""
  (tmp_path / "config.json").write_text("{}")
  folder = workdir.checkpoints(tmp_path)
  for step in range(1000):
    (folder / str(step)).mkdir(parents=True)
    (folder / str(step) / digests.COMMIT_MARK).touch()
  looks, exists = [], type(folder).exists

  def look(path):
    looks.append(path.name)
    return exists(path)

  monkeypatch.setattr(type(folder), "exists", look)
  assert workdir.latest_step(tmp_path) == 999
  assert restore.find(tmp_path).name == "999" and restore.find(tmp_path, 7).name == "7"
  assert workdir.lengthened(tmp_path, {}) is None
  assert looks.count(digests.COMMIT_MARK) <= 5
  (folder / "999" / digests.COMMIT_MARK).unlink()
  assert workdir.latest_step(tmp_path) == 998
  assert workdir.committed_steps(folder) == [*range(999)]
