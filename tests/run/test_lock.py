"""Who may write into a workdir."""

from __future__ import annotations

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


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(UserError, match="cannot write to --workdir=.*file/run"),
    lock.Lock(str(tmp_path / "file" / "run")),
  ):
    pass


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


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOSPC])
def test_a_disk_that_may_be_well_the_next_time_is_no_bad_input(tmp_path, monkeypatch, number):
  def fail(path, *_):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr(workdir.files, "write_whole", fail)
  monkeypatch.setattr(lock.os, "ftruncate", fail)
  with pytest.raises(OSError, match=os.strerror(number)), lock.Lock(tmp_path):
    pass
  with pytest.raises(OSError, match=os.strerror(number)):
    workdir.open_for_training(tmp_path, {})
