from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from diffdis_jax.run import checkpoint, watchdog
from tests.command_runs import ROOT

HANGS = """
import threading, time
from diffdis_jax.run import watchdog
def waits_for_a_dead_peer(event): event.wait()
watchdog.LOOK = 0.05
with watchdog.Watchdog(0.3) as dog:
  for _ in range(10):
    time.sleep(0.1)
    dog.alive()
  print("alive")
  waits_for_a_dead_peer(threading.Event())
"""


def test_a_process_that_hangs_says_where_and_ends_with_a_code_that_is_started_again():
  done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == watchdog.CODE == 1
  assert done.stdout == "alive\n", "no sooner"
  assert "in waits_for_a_dead_peer" in done.stderr, "of every thread, where it stands"
  assert done.stderr.splitlines()[-1].startswith("error: no step for 0 s")


class Looks:
  """In the place of the event that ends the watch: so many looks, before each of which `between` is called."""

  def __init__(self, count, between=lambda: None):
    self.count, self.between = count, between

  def wait(self, seconds):
    self.between()
    self.count -= 1
    return self.count < 0


@pytest.fixture
def ends(monkeypatch):
  codes = []
  monkeypatch.setattr(watchdog.signals, "exit_at_once", codes.append)
  monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
  return codes


@pytest.mark.parametrize("looks, alive, code", [(5, False, []), (6, False, [1]), (50, True, [])])
def test_only_seconds_in_which_it_looks_count(ends, looks, alive, code):
  """After Ctrl-Z, hours of the clock are one look."""
  dog = watchdog.Watchdog(5.0)
  dog._done = Looks(looks, dog.alive if alive else lambda: None)
  dog._watch()
  assert ends == code


def test_a_save_may_take_as_long_as_orbax_waits_for_it():
  assert checkpoint.SAVE_TIMEOUT < watchdog.SECONDS


def test_without_a_time_nothing_is_watched():
  with watchdog.Watchdog(0):
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
