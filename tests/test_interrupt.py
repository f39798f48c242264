"""Test that a signal stops a run before or after its first step, and that a run without a checkpoint may change."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

import pytest

from diffdis_jax.run import provenance, workdir
from tests import slow_compiling
from tests.command_runs import call
from tests.interrupting import Terminal
from tests.test_resume import steps_logged

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)


def flags(run: pathlib.Path, **fields) -> list[str]:
  fields = {"num_steps": 2000, "save_every": 1000, "log_every": 1, **fields}
  config = ["--config=tests/tiny.py:autoencoder", f"--workdir={run}"]
  return [*config, *(f"--config.{name}={value}" for name, value in fields.items())]


def test_ctrl_c_saves_and_a_run_without_a_checkpoint_takes_another_config(tmp_path, environment):
  run = tmp_path / "run"
  train = [sys.executable, "-m", "diffdis_jax.train"]
  with Terminal([*train, *flags(run)], environment, tmp_path / "stderr") as terminal:
    terminal.wait_until(lambda: len(steps_logged(run)) > 2)
    os.killpg(terminal.process.pid, signal.SIGKILL)
    terminal.process.wait()
  assert workdir.latest_step(run) is None
  killed_at = max(steps_logged(run))

  other = {"seed": 1, "data.loader.num_workers": 1}
  with Terminal([*train, *flags(run, **other)], environment, tmp_path / "stderr") as terminal:
    # The steps of the killed run are dropped only after this run has begun, so a later step is its own.
    terminal.wait_until(lambda: len(provenance.read(run)) == 2 and max(steps_logged(run), default=0) > killed_at)
    terminal.ctrl_c()
    assert terminal.end() == 130
    stderr = terminal.stderr
  assert "Traceback" not in stderr and "KeyboardInterrupt" not in stderr
  assert "the config of a run without a checkpoint is replaced: data.loader.num_workers is 0 there and 1 here" in stderr
  step = workdir.latest_step(run)
  assert step and steps_logged(run) == list(range(1, step + 1)) and f"saving step {step}" in stderr
  assert [event.get("why", "") for event in provenance.read(run)] == ["", "", "stopped"]
  assert json.loads((run / "config.json").read_text())["seed"] == 1 and not (run / "lock.json").exists()

  done = call("train", environment, *flags(run, **other | {"seed": 2}))
  assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("take its config or a new --workdir")


def test_sigterm_while_the_first_step_compiles_ends_the_run_at_once(environment, tmp_path):
  run = tmp_path / "run"
  command = [sys.executable, "-m", "tests.slow_compiling", "diffdis_jax.train", *flags(run, num_steps=2)]
  slow = environment | slow_compiling.variables("train_step", seconds=600)
  with Terminal(command, slow, tmp_path / "stderr") as terminal:
    terminal.wait_until(lambda: slow_compiling.MESSAGE in terminal.stderr)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 75 and "nothing to save" in terminal.stderr
  assert not list(run.glob("**/*tmp*")) and not steps_logged(run)

  done = call("train", environment, *flags(run, num_steps=2))
  assert done.returncode == 0, done.stderr
  assert steps_logged(run) == [1, 2] and not (run / "lock.json").exists()
