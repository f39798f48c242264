"""Test that damage in any byte of a checkpoint is refused with the name of the file."""

from __future__ import annotations

import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.config import as_text
from diffdis_jax.errors import UserError
from diffdis_jax.run import checkpoint, digests, restore, workdir
from diffdis_jax.structs import TrainState
from tests.run.test_checkpoint import abstract, assert_same_bits, make_iterator, make_state, one_device, save

FLIPS = 200


def large_state() -> TrainState:
  """Make a state with an array that is so large that it has its own file. Small arrays are stored in the index."""
  state = make_state()
  large = jnp.asarray(np.random.default_rng(1).normal(size=(64, 64)), jnp.float32)
  return TrainState(params=state.params | {"unet.large": large}, ema=state.ema, opt_state=state.opt_state)


def checkpoint_files(workdir, step):
  return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def flip(path, random_):
  content = bytearray(path.read_bytes())
  content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
  path.write_bytes(bytes(content))


def test_every_flipped_bit_of_a_checkpoint_is_refused(tmp_path):
  state, random_, refused = large_state(), random.Random(0), 0
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, make_iterator(), meta={"note": "x"}, metrics={"acc": 0.5})
    checkpointer.wait()
    files, following = checkpoint_files(tmp_path, 1), next(make_iterator())
    never_read = {"commit_success.txt", "_CHECKPOINT_METADATA"}
    for i in range(FLIPS):
      path, data = files[i % len(files)], make_iterator()
      whole = path.read_bytes()
      flip(path, random_)
      try:
        restored = restore.read_state(tmp_path, 1, abstract(state, one_device), data)
      except UserError as error:
        refused += 1
        assert "\n" not in str(error) and path.relative_to(tmp_path / "checkpoints" / "1").as_posix() in str(error)
      else:
        assert path.parent.name == "1" and path.name in never_read, path
        assert_same_bits(restored.state, state)
        assert restored.meta == {"step": 1, "note": "x"}
        np.testing.assert_array_equal(next(data), following)
      path.write_bytes(whole)
  assert len(files) > 20 and refused > 0.8 * FLIPS


@pytest.mark.parametrize("name, message", [("ema", "ema/.* is missing"), (digests.NAME, "digests.json is missing; ")])
def test_a_checkpoint_with_lost_files_is_refused(tmp_path, name, message):
  save(tmp_path, 1)
  lost = tmp_path / "checkpoints" / "1" / name
  shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
  for read in (
    lambda: restore.restore_params(tmp_path),
    lambda: restore.read_state(tmp_path, 1, abstract(make_state(1), one_device), make_iterator()),
  ):
    with pytest.raises(UserError, match=f"checkpoints/1 cannot be read: {message}"):
      read()


def test_a_damaged_checkpoint_names_the_newest_whole_one_before_it(tmp_path):
  save(tmp_path, 1, 2, 3, 4, keep_last=9)
  for step in (3, 4):
    flip(next(path for path in checkpoint_files(tmp_path, step) if path.parent.name == "d"), random.Random(step))
  with pytest.raises(
    UserError, match="checkpoints/4 cannot be read: .*; take --step=2, the newest whole one before it"
  ):
    restore.restore_params(tmp_path)


def test_a_checkpoint_whose_folder_was_renamed_is_refused(tmp_path):
  save(tmp_path, 12)
  (tmp_path / "checkpoints" / "12").rename(tmp_path / "checkpoints" / "14")
  message = "checkpoints/14 cannot be read: digests.json says that it was saved as step 12; "
  with pytest.raises(UserError, match=message):
    restore.read_state(tmp_path, 14, abstract(make_state(12), one_device), make_iterator())
  with pytest.raises(UserError, match=message):
    restore.restore_params(tmp_path)


def run_of(folder, **changes):
  fields = {"seed": 0, "num_steps": 8, "log_every": 1, "data": {"path": "a"}, "model": {"width": 4}} | changes
  workdir.open_for_training(folder, fields)
  return folder


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
  save(run_of(tmp_path / "a"), 4)
  save(run_of(tmp_path / "b", seed=1), 2)
  shutil.copytree(tmp_path / "a" / "checkpoints" / "4", tmp_path / "b" / "checkpoints" / "4")
  message = "checkpoints/4 cannot be read: digests.json says that it was saved by a run of another config than config"
  with pytest.raises(UserError, match=message) as error:
    restore.read_state(tmp_path / "b", 4, abstract(make_state(4), one_device), make_iterator())
  assert "take --step=2, the newest whole one before it" in str(error.value)


def test_a_longer_run_and_moved_data_keep_their_checkpoints(tmp_path):
  save(run_of(tmp_path), 4)
  fields = {"num_steps": 16, "log_every": 2, "save_every": 3, "data": {"path": "b"}}
  (tmp_path / "config.json").write_text(as_text({"seed": 0, "model": {"width": 4}} | fields))
  assert_same_bits(restore.restore_params(tmp_path, ema=False), make_state(4).params)


def test_digests_are_written_before_the_commit_mark(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(digests, "write", full)
  with pytest.raises(OSError, match="No space left"):
    save(tmp_path, 1)
  assert not (tmp_path / "checkpoints" / "1").exists()


def test_damaged_metrics_are_refused_before_a_checkpoint_is_deleted_by_them(tmp_path):
  kept = checkpoint.CheckpointPolicy(keep_last=1, keep_best=1, best_metric="acc")
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    for step, accuracy in ((1, 0.5), (2, 0.25), (3, 0.125)):
      checkpointer.save(step, make_state(), metrics={"acc": accuracy})
  folder = tmp_path / "checkpoints"
  assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]
  assert digests.damage(folder / "1") is None and digests.damage(folder / "3") is None
  (folder / "1" / "metrics" / "metrics").write_text('{"acc": 0.1}')
  with pytest.raises(UserError, match="checkpoints/1 cannot be read: metrics/metrics .*; move its folder"):
    checkpoint.Checkpointer(tmp_path, kept)
