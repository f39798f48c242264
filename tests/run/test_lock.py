"""Who may write into a workdir."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.run import workdir
from tests.command_runs import ROOT

HOLDER = """
import sys, time
from diffdis_jax.run import workdir
workdir.BEAT = 0.1
with workdir.Lock(sys.argv[1]):
  sys.stdout.write("in\\n")
  sys.stdout.flush()
  time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(workdir, "BEAT", 0.1)
  monkeypatch.setattr(workdir, "PATIENCE", 1.0)
  monkeypatch.setattr(workdir, "ENDING", 1.0)


@pytest.fixture
def holder(tmp_path):
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "in\n"
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_live_run_keeps_others_out_and_stays(tmp_path, holder):
  message = rf"--workdir=.* is in use by process {holder.pid} on .*; wait for it, stop it, or take another --workdir$"
  with pytest.raises(UserError, match=message), workdir.Lock(str(tmp_path)):
    pass
  assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid
  assert holder.poll() is None


def test_a_copy_of_a_live_runs_folder_is_free(tmp_path, holder):
  copy = tmp_path / "copy"
  copy.mkdir()
  shutil.copy(tmp_path / "lock.json", copy)
  with workdir.Lock(str(copy)):
    assert json.loads((copy / "lock.json").read_text())["pid"] == os.getpid()
  link = tmp_path / "link"
  link.symlink_to(tmp_path)
  with pytest.raises(UserError, match="is in use by"), workdir.Lock(str(link)):
    pass
  assert holder.poll() is None


def test_a_killed_run_is_followed_at_once(tmp_path, holder, monkeypatch):
  monkeypatch.setattr(workdir, "PATIENCE", 600.0)
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / "lock.json").exists()
  with workdir.Lock(str(tmp_path)):
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
  assert not (tmp_path / "lock.json").exists()


def test_a_run_that_ends_meanwhile_is_waited_for(tmp_path, holder, monkeypatch):
  monkeypatch.setattr(workdir, "ENDING", 600.0)
  killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({holder.pid}, 9)"])
  with workdir.Lock(str(tmp_path)):
    assert holder.poll() == -signal.SIGKILL
  assert killer.wait() == 0


@pytest.mark.parametrize("content", [json.dumps({"owner": "x", "machine": "another", "pid": 1, "started": "2"}), "{"])
def test_of_another_machine_it_is_taken_over_without_a_sign_of_life(tmp_path, content):
  (tmp_path / "lock.json").write_text(content)
  begin = time.monotonic()
  with workdir.Lock(str(tmp_path)):
    assert time.monotonic() - begin >= 1.0
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_that_cannot_be_read_for_a_moment_ends_nothing(tmp_path, holder):
  lock = tmp_path / "lock.json"

  def to_folder():
    while not lock.is_dir():  # the holder may write its file again before the folder is there
      lock.unlink(missing_ok=True)
      with contextlib.suppress(FileExistsError):
        lock.mkdir()

  for spoil in (lambda: lock.write_text("{"), to_folder, lock.rmdir):
    spoil()
    time.sleep(0.5)
    assert holder.poll() is None
  deadline = time.monotonic() + 60
  while not lock.exists():  # until its next beat
    assert holder.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  assert json.loads(lock.read_text())["pid"] == holder.pid


def test_whoever_was_taken_over_from_ends(tmp_path, holder):
  other = {"owner": "x", "machine": "another", "host": "other", "pid": 1, "started": "2"}
  workdir.write_whole(workdir.epath.Path(tmp_path) / "lock.json", json.dumps(other).encode())
  assert holder.wait(10) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(UserError, match="cannot write to --workdir=.*file/run"),
    workdir.Lock(str(tmp_path / "file" / "run")),
  ):
    pass


def test_a_beat_under_way_at_the_end_does_not_bring_the_lock_back(tmp_path, monkeypatch):
  write, began = workdir.write_whole, threading.Event()

  def slow(path, content):
    if threading.current_thread() is not threading.main_thread():
      began.set()
      time.sleep(0.3)
    write(path, content)

  monkeypatch.setattr(workdir, "write_whole", slow)
  with workdir.Lock(str(tmp_path)):
    assert began.wait(10)
  time.sleep(0.5)
  assert not (tmp_path / "lock.json").exists()


def test_of_two_that_begin_at_one_moment_one_is_refused(tmp_path, monkeypatch):
  write = workdir.write_whole
  other = {"owner": "another", "machine": "elsewhere", "host": "node7", "pid": 3, "started": "1"}

  def both(path, content):
    write(path, content)
    write(path, json.dumps(other).encode())

  monkeypatch.setattr(workdir, "write_whole", both)
  with pytest.raises(workdir.InUse, match="in use by process 3 on node7"), workdir.Lock(str(tmp_path)):
    pass
  assert json.loads((tmp_path / "lock.json").read_text()) == other


@pytest.mark.parametrize("content", ["[1]", "3", '{"machine": MACHINE}', "[" * 20_000])
def test_a_damaged_lock_is_taken_over(tmp_path, content):
  (tmp_path / "lock.json").write_text(content.replace("MACHINE", json.dumps(workdir._machine())))
  with workdir.Lock(tmp_path):
    assert "owner" in json.loads((tmp_path / "lock.json").read_text())


def test_where_nothing_can_be_read_nothing_is_waited_for(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "PATIENCE", 600.0)
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file" / "run", "/proc/self/x"):
    with pytest.raises(UserError, match="cannot write to --workdir="), workdir.Lock(path):
      pass

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(type(workdir.epath.Path(tmp_path)), "read_bytes", refuse)
  with pytest.raises(UserError, match="cannot write to --workdir=.*: Permission denied"), workdir.Lock(tmp_path):
    pass
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC])
def test_a_disk_that_may_be_well_the_next_time_is_no_bad_input(tmp_path, monkeypatch, number):
  def fail(path, content):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr(workdir, "write_whole", fail)
  with pytest.raises(OSError, match=os.strerror(number)), workdir.Lock(tmp_path):
    pass
  with pytest.raises(OSError, match=os.strerror(number)):
    workdir.open_for_training(tmp_path, {})


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch, caplog):
  def fail(path, missing_ok=False):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

  with pytest.raises(KeyError, match="the run's own"), workdir.Lock(tmp_path):
    monkeypatch.setattr(type(workdir.epath.Path(tmp_path)), "unlink", fail)
    raise KeyError("the run's own")
  assert f"cannot remove {tmp_path}/lock.json: Input/output error" in caplog.text


def test_one_that_is_interrupted_as_it_begins_leaves_no_lock(tmp_path, monkeypatch):
  """In a notebook, where the process lives on and would keep its own next run out."""

  def interrupt(seconds):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(time, "sleep", interrupt)
    workdir.Lock(tmp_path).__enter__()
  with workdir.Lock(tmp_path):
    pass
