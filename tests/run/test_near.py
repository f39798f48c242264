"""Near checkpoints, of one process."""

from __future__ import annotations

import errno
import functools
import json

import jax
import numpy as np
import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.run import digests, history
from diffdis_jax.run.near import Near
from tests.run.test_checkpoint import abstract, assert_same_bits, make_iterator, make_state, on_mesh, one_device, place

META = {"evaluated": True}


@pytest.fixture
def run(tmp_path):
  """A workdir whose run has started."""
  start(tmp_path / "run", 0.5)
  return tmp_path / "run"


def start(run, time, **line):
  run.mkdir(exist_ok=True)
  with (run / history.FILE).open("a") as file:
    file.write(json.dumps({"event": "start", "time": time, "step": 0, **line}) + "\n")


@functools.cache
def values():
  return jax.device_get(make_state())


def state_of(seed, sharding_of=None):
  """Added on the host, where nothing is compiled."""
  return place(jax.tree.map(lambda x: (x + seed).astype(x.dtype), values()), sharding_of or on_mesh(4))


def saved(run, *steps, ready=True):
  """As by a process that is killed: its folder stays."""
  near, batches = Near(run, run.parent / "near", 5), make_iterator()
  for step in steps:
    next(batches)
    near.save(step, state_of(step), batches, meta=META, ready=ready)
  near.wait()
  return near


def found_in(run, *, beyond=0, sharding_of=None):
  batches = make_iterator()
  target = abstract(values(), sharding_of or on_mesh(4))
  return Near(run, run.parent / "near", 5).restore(target, batches, beyond=beyond), batches


def restored(run, **options):
  found = found_in(run, **options)[0]
  assert found is not None
  return found


def folders(run):
  return sorted(path.name for path in (run.parent / "near").glob("*/0/*"))


def test_the_newest_is_restored_to_the_same_bits(run):
  saved(run, 5, 10, 15)
  assert folders(run) == ["10", "15"]
  found, batches = found_in(run)
  assert found is not None
  assert found.meta == {"step": 15, **META}
  assert_same_bits(jax.device_get(found.state), jax.device_get(state_of(15)))
  expected = make_iterator()
  for _ in range(3):
    next(expected)
  np.testing.assert_array_equal(next(batches), next(expected))
  assert found_in(run, beyond=15)[0] is None


def test_the_one_before_is_taken_where_the_newest_is_damaged(run, caplog):
  saved(run, 5, 10)
  (path,) = (run.parent / "near").glob("*/0/10/params")
  content = bytearray(path.read_bytes())
  content[3] ^= 1
  path.write_bytes(content)
  assert restored(run).meta["step"] == 5
  assert "0/10 is not taken: params holds other bytes than were saved" in caplog.text
  (path.parent / digests.NAME).unlink()
  assert restored(run).meta["step"] == 5


def test_it_is_not_taken_on_another_mesh_which_needs_other_parts(run, caplog):
  saved(run, 5)
  assert found_in(run, sharding_of=on_mesh(2))[0] is None
  assert "is not taken: it lacks ['unet.conv'], float32[(0, 8), (0, 3)]" in caplog.text


def test_only_whole_arrays_are_needed_on_one_device(run):
  near = saved(run)
  near.save(5, state_of(5, one_device), make_iterator(), meta=META, ready=True)
  near.wait()
  assert restored(run, sharding_of=one_device).meta["step"] == 5


def test_another_run_in_the_same_workdir_has_its_own(run):
  saved(run, 5)
  (run / history.FILE).unlink()
  assert found_in(run)[0] is None
  start(run, 0.75)
  assert found_in(run)[0] is None


def test_a_run_that_went_back_has_its_own_from_then_on(run):
  near = saved(run, 5, 10)
  with (run / history.FILE).open("a") as file:
    file.write(json.dumps({"event": "end", "time": 0.6, "why": "went back", "to": 4, "batches": 6}) + "\n")
  start(run, 0.7)
  assert near.restore(abstract(values(), on_mesh(4)), make_iterator(), beyond=4) is None
  assert not folders(run)


def test_there_is_none_without_the_lines_before_it(run, caplog):
  saved(run, 5, ready=False)
  assert not folders(run) and "no near checkpoint of step 5: the run's metrics cannot be written" in caplog.text


def test_a_full_disk_ends_no_run_and_costs_no_near_checkpoint(run, caplog, monkeypatch):
  near = saved(run, 5)
  near.save(10, state_of(10), make_iterator(), meta=META, ready=True)
  near.wait()

  def full(folder):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(digests, "write", full)
    near.save(15, state_of(15), make_iterator(), meta=META, ready=True)
    near.wait()
  assert folders(run) == ["10"]
  near.save(20, state_of(20), make_iterator(), meta=META, ready=True)
  near.wait()
  assert folders(run) == ["10", "20"] and "near checkpoint 15 cannot be written: [Errno 28] No space" in caplog.text


def test_they_go_when_the_run_has_ended_well(run):
  with pytest.raises(UserError), saved(run, 5):
    raise UserError("bad")
  assert folders(run) == ["5"]
  near = saved(run, 10)
  (own,) = (run.parent / "near").glob("*/0")
  of_another = own.with_name("1")
  of_another.mkdir()
  with near:
    pass
  assert not own.exists() and of_another.exists()
  of_another.rmdir()
  with saved(run, 10):
    pass
  assert not list((run.parent / "near").iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write to --near=.*/file/near: Not a directory"):
    Near(tmp_path, tmp_path / "file" / "near", 5).check()
