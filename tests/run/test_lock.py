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
from diffdis_jax.run import lock, workdir
from tests.command_runs import ROOT

HOLDER = """
import sys, time
from diffdis_jax.run import lock
lock.BEAT = 0.1
with lock.Lock(sys.argv[1]):
  sys.stdout.write("in\\n")
  sys.stdout.flush()
  time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.1)
  monkeypatch.setattr(lock, "PATIENCE", 1.0)
  monkeypatch.setattr(lock, "ENDING", 1.0)


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
  with pytest.raises(UserError, match=message), lock.Lock(str(tmp_path)):
    pass
  assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid
  assert holder.poll() is None


def test_a_copy_of_a_live_runs_folder_is_free(tmp_path, holder):
  copy = tmp_path / "copy"
  copy.mkdir()
  shutil.copy(tmp_path / "lock.json", copy)
  with lock.Lock(str(copy)):
    assert json.loads((copy / "lock.json").read_text())["pid"] == os.getpid()
  link = tmp_path / "link"
  link.symlink_to(tmp_path)
  with pytest.raises(UserError, match="is in use by"), lock.Lock(str(link)):
    pass
  assert holder.poll() is None


def test_a_killed_run_is_followed_at_once(tmp_path, holder, monkeypatch):
  monkeypatch.setattr(lock, "PATIENCE", 600.0)
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / "lock.json").exists()
  with lock.Lock(str(tmp_path)):
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
  assert not (tmp_path / "lock.json").exists()


def test_a_run_that_ends_meanwhile_is_waited_for(tmp_path, holder, monkeypatch):
  monkeypatch.setattr(lock, "ENDING", 600.0)
  killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({holder.pid}, 9)"])
  with lock.Lock(str(tmp_path)):
    assert holder.poll() == -signal.SIGKILL
  assert killer.wait() == 0


@pytest.mark.parametrize("content", [json.dumps({"owner": "x", "machine": "another", "pid": 1, "started": "2"}), "{"])
def test_of_another_machine_it_is_taken_over_without_a_sign_of_life(tmp_path, content):
  (tmp_path / "lock.json").write_text(content)
  begin = time.monotonic()
  with lock.Lock(str(tmp_path)):
    assert time.monotonic() - begin >= 1.0
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_that_cannot_be_read_for_a_moment_ends_nothing(tmp_path, holder):
  file = tmp_path / "lock.json"

  def to_folder():
    while not file.is_dir():  # the holder may write its file again before the folder is there
      file.unlink(missing_ok=True)
      with contextlib.suppress(FileExistsError):
        file.mkdir()

  for spoil in (lambda: file.write_text("{"), to_folder, file.rmdir):
    spoil()
    time.sleep(0.5)
    assert holder.poll() is None
  deadline = time.monotonic() + 60
  while not file.exists():  # until its next beat
    assert holder.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  assert json.loads(file.read_text())["pid"] == holder.pid


def test_whoever_was_taken_over_from_ends(tmp_path, holder):
  other = {"owner": "x", "machine": "another", "host": "other", "pid": 1, "started": "2"}
  workdir.write_whole(workdir.epath.Path(tmp_path) / "lock.json", json.dumps(other).encode())
  assert holder.wait(10) == 75


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(UserError, match="cannot write to --workdir=.*file/run"),
    lock.Lock(str(tmp_path / "file" / "run")),
  ):
    pass


def test_a_beat_under_way_at_the_end_does_not_bring_the_lock_back(tmp_path, monkeypatch):
  beat, began = lock._File.beat, threading.Event()

  def slow(file, content):
    began.set()
    time.sleep(0.3)
    beat(file, content)

  monkeypatch.setattr(lock._File, "beat", slow)
  with lock.Lock(str(tmp_path)):
    assert began.wait(10)
  time.sleep(0.5)
  assert not (tmp_path / "lock.json").exists()


STALLS = """
import os, pathlib, sys, time
from diffdis_jax.run import lock
def stall(call):
  def stalled(*args, **options):
    if not (args and args[0] in (1, 2)):
      time.sleep(2)
    return call(*args, **options)
  return stalled
if sys.argv[2] == "slow":
  os.write, os.link, os.replace = map(stall, (os.write, os.link, os.replace))
  pathlib.Path.replace = stall(pathlib.Path.replace)
try:
  lock.Lock(sys.argv[1]).__enter__()
except lock.InUse as error:
  os._exit(error.code)
print("in", flush=True)
time.sleep(600)
"""


def test_one_whose_disk_stalls_while_it_takes_the_lock_does_not_share_it(tmp_path):
  processes = []
  for speed in ("slow", "quick"):
    command = [sys.executable, "-c", STALLS, str(tmp_path), speed]
    processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    time.sleep(0.8)
  try:
    deadline = time.monotonic() + 30
    while not any(ended := [process.poll() is not None for process in processes]):
      assert time.monotonic() < deadline, "both hold it"
      time.sleep(0.05)
    loser, holder = processes if ended[0] else processes[::-1]
    assert loser.returncode == 75, "which launchers start again"
    assert holder.stdout.readline() == "in\n" and holder.poll() is None
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path, holder):
  holder.kill()
  holder.wait()
  begin, held, refused = threading.Barrier(8), [], []

  def enter():
    own = lock.Lock(str(tmp_path))
    begin.wait()
    try:
      held.append(own.__enter__())
    except lock.InUse as error:
      refused.append(error)

  threads = [threading.Thread(target=enter) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(held), len(refused)) == (1, 7)
  held[0].__exit__()
  assert not (tmp_path / "lock.json").exists()


def test_a_file_that_was_replaced_since_it_was_seen_is_not_removed(tmp_path):
  """As by a process that stalled between the two, while another one took over."""
  file = lock._File(lock.epath.Path(tmp_path) / "lock.json")
  (tmp_path / "lock.json").write_text("{}")
  with file.seen() as seen:
    (tmp_path / "other").write_text("new")
    (tmp_path / "other").rename(tmp_path / "lock.json")
    file.remove(seen)
  assert (tmp_path / "lock.json").read_text() == "new"


@pytest.mark.parametrize("name", ["lock.json", "config.json"])
def test_a_named_pipe_is_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(UserError, match=f"{name} is no file; "):
    workdir.check_config(tmp_path, {})
    lock.Lock(tmp_path).__enter__()


def test_without_locks_on_files_signs_of_life_tell(tmp_path, holder, monkeypatch):
  def refuse(file, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(lock.fcntl, "flock", refuse)
  with pytest.raises(lock.InUse):
    lock.Lock(tmp_path).__enter__()
  holder.kill()
  holder.wait()
  begin = time.monotonic()
  with lock.Lock(tmp_path):
    assert time.monotonic() - begin >= 1.0


@pytest.mark.parametrize("content", ["[1]", "3", '{"machine": MACHINE}', "[" * 20_000])
def test_a_damaged_lock_is_taken_over(tmp_path, content):
  (tmp_path / "lock.json").write_text(content.replace("MACHINE", json.dumps(lock._machine())))
  with lock.Lock(tmp_path):
    assert "owner" in json.loads((tmp_path / "lock.json").read_text())


def test_where_nothing_can_be_read_nothing_is_waited_for(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "PATIENCE", 600.0)
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file" / "run", "/proc/self/x"):
    with pytest.raises(UserError, match="cannot write to --workdir="), lock.Lock(path):
      pass

  def refuse(path, *_):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(lock.os, "open", refuse)
  with pytest.raises(UserError, match="cannot write to --workdir=.*: Permission denied"), lock.Lock(tmp_path):
    pass
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC])
def test_a_disk_that_may_be_well_the_next_time_is_no_bad_input(tmp_path, monkeypatch, number):
  def fail(path, *_):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr(workdir, "write_whole", fail)
  monkeypatch.setattr(lock.os, "write", fail)
  with pytest.raises(OSError, match=os.strerror(number)), lock.Lock(tmp_path):
    pass
  with pytest.raises(OSError, match=os.strerror(number)):
    workdir.open_for_training(tmp_path, {})


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch, caplog):
  def fail(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

  with pytest.raises(KeyError, match="the run's own"), lock.Lock(tmp_path):
    monkeypatch.setattr(lock.os, "unlink", fail)
    raise KeyError("the run's own")
  assert f"cannot remove {tmp_path}/lock.json: Input/output error" in caplog.text
