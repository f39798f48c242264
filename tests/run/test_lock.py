"""Test that one run at a time may write into a workdir."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from diffdis_jax.errors import UserError
from diffdis_jax.run import lock
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


def test_a_live_run_keeps_others_out(tmp_path, holder):
  message = rf"--workdir=.* is in use by process {holder.pid} on .*; wait for it, stop it, or take another --workdir$"
  with pytest.raises(UserError, match=message), lock.Lock(str(tmp_path)):
    pass
  assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid
  assert holder.poll() is None


def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path, holder, monkeypatch):
  monkeypatch.setattr(lock, "PATIENCE", 600.0)
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / "lock.json").exists()
  with lock.Lock(str(tmp_path)):
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
  assert not (tmp_path / "lock.json").exists()


def test_only_one_of_many_takes_over_the_lock_of_a_dead_process(tmp_path, holder):
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
