"""Test that Ctrl-C and SIGTERM end a command that has nothing to save with one line and an exit code."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from diffdis_jax.common import signals
from tests.command_runs import ROOT
from tests.interrupting import Terminal, not_ignored

VERB = """
import pathlib, tempfile, time
from absl import flags
from diffdis_jax.common import cli

HOW = flags.DEFINE_string("how", "", "")
FOLDER = flags.DEFINE_string("folder", "", "")
LONG = 600  # seconds, more than any test waits


def main(_):
  folder = pathlib.Path(FOLDER.value)
  with tempfile.TemporaryDirectory(dir=folder):
    try:
      (folder / "begun").touch()
      time.sleep(LONG)
    finally:
      if HOW.value == "ends slowly":
        (folder / "ending").touch()
        time.sleep(LONG)


if __name__ == "__main__":
  cli.run(main)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def begin(tmp_path: pathlib.Path):
  """Begin that command, and return once Ctrl-C may be sent."""
  (tmp_path / "verb.py").write_text(VERB)
  (tmp_path / "work").mkdir()

  def start(how: str) -> Terminal:
    command = [sys.executable, str(tmp_path / "verb.py"), f"--how={how}", f"--folder={tmp_path / 'work'}"]
    terminal = Terminal(command, ENVIRONMENT, tmp_path / "stderr")
    terminal.wait_until((tmp_path / "work" / "begun").exists)
    time.sleep(0.2)
    return terminal

  return start


def left(tmp_path: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (tmp_path / "work").iterdir())


ENDS = [
  (signal.SIGINT, 130, "interrupted\n"),
  (signal.SIGTERM, 143, "terminated\n"),
  (signal.SIGHUP, 143, "terminated\n"),
]


@pytest.mark.parametrize("number, code, message", ENDS)
def test_it_is_one_line_and_leaves_nothing_half_written(begin, tmp_path, number, code, message):
  with begin("sleeps") as terminal:
    os.killpg(terminal.process.pid, number)
    assert (terminal.end(), terminal.stderr) == (code, message)
  assert left(tmp_path) == ["begun"]


def test_a_second_one_ends_it_at_once(begin, tmp_path):
  with begin("ends slowly") as terminal:
    terminal.ctrl_c()
    terminal.wait_until((tmp_path / "work" / "ending").exists)
    assert terminal.process.poll() is None
    terminal.ctrl_c()
    assert (terminal.end(), terminal.stderr) == (130, "interrupted\n")


def test_a_worker_does_not_hear_of_it_from_its_first_moment_on_and_its_parent_does():
  code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
  started = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
  with not_ignored():
    assert started() == "False"
    with pytest.raises(KeyboardInterrupt):
      with signals.starting_workers():
        assert started() == "True"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    assert started() == "False"
