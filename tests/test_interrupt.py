"""Ctrl-C to a real run in a terminal, data workers included, and another config for one that has saved nothing."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

from diffdis_jax.run import committed, history
from tests.command_runs import call
from tests.interrupting import Terminal
from tests.test_kills import steps_logged

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
  assert committed.latest_step(run) is None

  other = {"seed": 1, "data.loader.num_workers": 1}
  with Terminal([*train, *flags(run, **other)], environment, tmp_path / "stderr") as terminal:
    # Its own steps, not those that are about to be set aside.
    terminal.wait_until(lambda: (run / "replaced_1" / "metrics.jsonl").exists() and len(steps_logged(run)) > 2)
    terminal.ctrl_c()
    assert terminal.end() == 130
    said = terminal.said
  assert "Traceback" not in said and "KeyboardInterrupt" not in said
  assert "the config of a run without a checkpoint is replaced: data.loader.num_workers is 0 there and 1 here," in said
  step = committed.latest_step(run)
  assert step and steps_logged(run) == list(range(1, step + 1)) and f"saving step {step}" in said
  assert [event.get("why", "") for event in history.read(run)] == ["", "stopped"]
  assert len(history.read(run / "replaced_1")) == 1 and steps_logged(run / "replaced_1")[:3] == [1, 2, 3]
  assert json.loads((run / "config.json").read_text())["seed"] == 1 and not (run / "lock.json").exists()

  done = call("train", environment, *flags(run, **other | {"seed": 2}))
  assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("take its config or a new --workdir")
