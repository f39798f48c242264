"""Ctrl-C in a terminal, and its closing, to a real run with data workers; another config for a run without a save."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from diffdis_jax.run import provenance, workdir
from tests.command_runs import ROOT, call
from tests.interrupting import Terminal
from tests.test_kills import steps_logged

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)


def flags(run: pathlib.Path, **fields) -> list[str]:
  fields = {"num_steps": 2000, "save_every": 1000, "log_every": 1, **fields}
  config = ["--config=tests/tiny.py:autoencoder", f"--workdir={run}"]
  return [*config, *(f"--config.{name}={value}" for name, value in fields.items())]


def test_ctrl_c_saves_and_one_that_has_saved_nothing_takes_another_config(tmp_path, environment):
  run = tmp_path / "run"
  train = [sys.executable, "-m", "diffdis_jax.train"]
  with Terminal([*train, *flags(run)], environment, tmp_path / "stderr") as terminal:
    terminal.wait_until(lambda: len(steps_logged(run)) > 2)
    os.killpg(terminal.process.pid, signal.SIGKILL)
    terminal.process.wait()
  assert workdir.latest_step(run) is None

  other = {"seed": 1, "data.loader.num_workers": 1}
  with Terminal([*train, *flags(run, **other)], environment, tmp_path / "stderr") as terminal:
    # Its own steps, not those that are about to be dropped.
    terminal.wait_until(lambda: len(provenance.read(run)) == 2 and len(steps_logged(run)) > 2)
    terminal.ctrl_c()
    assert terminal.end() == 130
    said = terminal.said
  assert "Traceback" not in said and "KeyboardInterrupt" not in said
  assert "the config of a run without a checkpoint is replaced: data.loader.num_workers is 0 there and 1 here," in said
  step = workdir.latest_step(run)
  assert step and steps_logged(run) == list(range(1, step + 1)) and f"saving step {step}" in said
  assert [event.get("why", "") for event in provenance.read(run)] == ["", "", "stopped"]
  assert json.loads((run / "config.json").read_text())["seed"] == 1 and not (run / "lock.json").exists()

  done = call("train", environment, *flags(run, **other | {"seed": 2}))
  assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("take its config or a new --workdir")


def test_a_terminal_that_is_closed_loses_no_step(tmp_path, environment):
  """All processes of the terminal get SIGHUP, data workers too, and each write to it fails from then on."""
  run = tmp_path / "run"
  command = [sys.executable, "-m", "diffdis_jax.train", *flags(run, **{"data.loader.num_workers": 1})]
  terminal, side = os.openpty()
  # The process takes the terminal by itself: a function to call after a fork may not be given where JAX has threads.
  take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
  process = subprocess.Popen(
    [sys.executable, "-c", take, *command],
    cwd=ROOT,
    env=environment,
    stdin=side,
    stdout=side,
    stderr=side,
    start_new_session=True,
  )
  try:
    os.close(side)
    os.set_blocking(terminal, False)
    while len(steps_logged(run)) < 20:
      assert process.poll() is None
      time.sleep(0.01)
      with contextlib.suppress(BlockingIOError):  # or else a full terminal would stop the run
        os.read(terminal, 2**16)
    os.close(terminal)
    assert process.wait(60) == 75
  finally:
    process.kill()
  step = workdir.latest_step(run)
  assert step and step >= 20 and steps_logged(run) == list(range(1, step + 1))
  with Terminal(command, environment, tmp_path / "stderr") as again:
    again.wait_until(lambda: len(steps_logged(run)) > step)
  assert [event.get("step") for event in provenance.read(run)] == [0, None, step]
