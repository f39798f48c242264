"""What no step of a run changes is written once, and every checkpoint has it."""

from __future__ import annotations

import os
import random
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffdis_jax.config.sections import CheckpointPolicy
from diffdis_jax.errors import UserError
from diffdis_jax.run import checkpoint, committed, digests, restore
from diffdis_jax.structs import TrainState
from tests.run.test_checkpoint import abstract, assert_same_bits, make_state, on_mesh, one_device, place
from tests.run.test_digests import flip

UNCHANGED = ("frozen", "teacher")


def state_of(step: int) -> TrainState:
  """What changes is that of the step."""
  state = make_state(step)
  rng = np.random.default_rng(7)
  frozen = {f"vae.{name}": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for name in "ab"}
  teacher = {name: value * 3 for name, value in make_state(0).ema.items()}
  return TrainState(params=state.params, ema=state.ema, opt_state=state.opt_state, frozen=frozen, teacher=teacher)


def save_all(checkpointer, *steps: int) -> None:
  for step in steps:
    checkpointer.save(step, state_of(step))


def unchanged_files(workdir, step: int) -> dict[str, os.stat_result]:
  folder = workdir / "checkpoints" / str(step)
  found = [path for name in UNCHANGED for path in (folder / name).rglob("*") if path.is_file()]
  return {path.relative_to(folder).as_posix(): path.stat() for path in found}


def is_shared(workdir, *steps: int) -> bool:
  """Whether all of these have the same files."""
  first, *others = ({name: stat.st_ino for name, stat in unchanged_files(workdir, step).items()} for step in steps)
  assert len(first) > 4
  return all(other == first for other in others)


def read(workdir, step: int, sharding_of=one_device) -> TrainState:
  with checkpoint.Checkpointer(workdir) as checkpointer:
    return checkpointer.restore(step, abstract(state_of(step), sharding_of)).state


@pytest.mark.parametrize("sharding_of", [one_device, on_mesh(8)])
def test_it_is_written_once_and_each_checkpoint_has_it(tmp_path, sharding_of):
  with checkpoint.Checkpointer(tmp_path, CheckpointPolicy(keep_last=9)) as checkpointer:
    for step in (1, 2, 3):
      checkpointer.save(step, place(state_of(step), sharding_of))
  assert is_shared(tmp_path, 1, 2, 3)
  for step in (1, 2, 3):
    assert_same_bits(read(tmp_path, step), state_of(step))
    assert digests.damage(tmp_path / "checkpoints" / str(step)) is None
  listed = digests.read(committed.folder(tmp_path) / "3")
  assert isinstance(listed, digests.Digests) and {*unchanged_files(tmp_path, 3)} <= listed.files.keys()


def test_a_checkpoint_outlives_the_one_that_it_was_written_for(tmp_path):
  with checkpoint.Checkpointer(tmp_path, CheckpointPolicy(keep_last=1)) as checkpointer:
    save_all(checkpointer, 1, 2, 3)
  assert committed.committed_steps(committed.folder(tmp_path)) == [3]
  assert_same_bits(read(tmp_path, 3), state_of(3))
  shutil.copytree(tmp_path, tmp_path / "copy")
  assert_same_bits(read(tmp_path / "copy", 3), state_of(3))


def test_a_run_that_resumes_does_not_write_it_again(tmp_path):
  kept = CheckpointPolicy(keep_last=9)
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    save_all(checkpointer, 1)
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    checkpointer.restore(1, abstract(state_of(1), one_device))
    save_all(checkpointer, 2)
  assert is_shared(tmp_path, 1, 2)
  assert_same_bits(read(tmp_path, 2), state_of(2))


def test_of_a_checkpoint_that_was_not_read_nothing_is_taken(tmp_path):
  """Its frozen parameters may be others."""
  kept = CheckpointPolicy(keep_last=9)
  for step in (1, 2):
    with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
      save_all(checkpointer, step)
  assert not is_shared(tmp_path, 1, 2)
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    checkpointer.restore(1, abstract(state_of(1), one_device))
    save_all(checkpointer, 3)
  assert not is_shared(tmp_path, 2, 3)


def test_where_there_are_no_hard_links_it_is_copied(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise PermissionError(1, "Operation not permitted")

  monkeypatch.setattr(os, "link", fail)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    save_all(checkpointer, 1, 2)
  assert not is_shared(tmp_path, 1, 2)
  assert_same_bits(read(tmp_path, 2), state_of(2))


def test_after_the_checkpoint_that_has_it_is_gone_it_is_written_again(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    save_all(checkpointer, 1)
    checkpointer.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    save_all(checkpointer, 2)
  assert_same_bits(read(tmp_path, 2), state_of(2))


def test_after_a_save_that_failed_it_is_taken_from_the_last_whole_one(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    save_all(checkpointer, 1)
    checkpointer.wait()
    with monkeypatch.context() as patched:
      patched.setattr(digests, "write", full)
      checkpointer.save(2, state_of(2), required=False)
      with pytest.raises(OSError, match="No space left"):
        checkpointer.wait()
    checkpointer.save(3, state_of(3), required=False)
  assert committed.committed_steps(committed.folder(tmp_path)) == [1, 3] and is_shared(tmp_path, 1, 3)
  assert_same_bits(read(tmp_path, 3), state_of(3))


def test_a_flipped_bit_of_it_is_found_at_the_next_save_and_the_one_after_writes_it_again(tmp_path, caplog):
  kept = CheckpointPolicy(keep_last=9)
  with checkpoint.Checkpointer(tmp_path, kept) as checkpointer:
    save_all(checkpointer, 1)
    checkpointer.wait()
    large = (path for path in (tmp_path / "checkpoints/1/frozen").rglob("d/*") if path.stat().st_size > 1 << 13)
    flip(next(large), random.Random(0))
    save_all(checkpointer, 2, 3, 4)
  (said,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
  assert said.startswith("checkpoints 1 and 2 have the same damaged file, frozen/")
  for step in (1, 2):
    with pytest.raises(
      UserError, match=rf"checkpoints/{step} cannot be read: its frozen: .*holds other .* share this file; take"
    ):
      restore.restore_params(tmp_path, step=step)
  assert not is_shared(tmp_path, 2, 3) and is_shared(tmp_path, 3, 4)
  assert_same_bits(read(tmp_path, 4), state_of(4))


def test_digests_are_of_the_algorithm_of_the_file_that_lists_them(tmp_path, monkeypatch):
  """Where the one before was saved with another."""
  with monkeypatch.context() as patched:
    patched.setitem(sys.modules, "google_crc32c", None)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
      save_all(checkpointer, 1)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.restore(1, abstract(state_of(1), one_device))
    save_all(checkpointer, 2)
  assert is_shared(tmp_path, 1, 2) and digests.damage(tmp_path / "checkpoints" / "2") is None


@pytest.mark.parametrize("ema", [True, False])
def test_parameters_alone_have_the_frozen_ones_too(tmp_path, ema):
  state = state_of(2)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    save_all(checkpointer, 1, 2)
  expected = state.params | state.frozen
  assert {*restore.saved_params(tmp_path)} == {*expected}
  averaged = expected | state.ema if ema else expected
  assert_same_bits(restore.restore_params(tmp_path, ema=ema), averaged)
  like = abstract(TrainState(params=averaged), on_mesh(8)).params
  found = restore.restore_params(tmp_path, ema=ema, abstract=like)
  assert_same_bits(found, averaged)
  assert {name: value.sharding for name, value in found.items()} == {name: x.sharding for name, x in like.items()}
  del like["vae.b"]
  with pytest.raises(UserError, match=r"does not fit this model in 1 arrays; the first, vae.b, is float32\[64, 64\]"):
    restore.restore_params(tmp_path, ema=ema, abstract=like)


def test_frozen_parameters_that_are_gone_are_missed(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    save_all(checkpointer, 1)
  shutil.rmtree(tmp_path / "checkpoints" / "1" / "frozen")
  with pytest.raises(UserError, match="checkpoints/1 cannot be read: its frozen: frozen/.* is missing"):
    restore.restore_params(tmp_path)


def test_room_is_asked_for_what_is_written(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(checkpoint, "has_room", lambda _, arrays: asked.append(sum(x.nbytes for x in arrays)) or True)
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    save_all(checkpointer, 1, 2)
  state = state_of(1)
  assert asked[0] - asked[1] == sum(x.nbytes for x in jax.tree.leaves((state.frozen, state.teacher)))
