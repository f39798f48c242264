"""A run that is stopped before its first step."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests import slow_compiling
from tests.command_runs import ROOT, call
from tests.test_resume import steps_logged

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)


def test_sigterm_while_the_first_step_compiles_ends_the_run_at_once(environment, tmp_path):
  run = tmp_path / "run"
  flags = ["--config=tests/tiny.py:autoencoder", f"--workdir={run}", "--config.num_steps=2", "--config.log_every=1"]
  command = [sys.executable, "-m", "tests.slow_compiling", "diffdis_jax.train", *flags]
  slow = environment | slow_compiling.variables("train_step", seconds=600)
  process = subprocess.Popen(command, cwd=ROOT, env=slow, text=True, stderr=subprocess.PIPE)
  try:
    for line in process.stderr:
      if slow_compiling.MESSAGE in line:
        break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 75, err
  assert "nothing to save" in err
  assert not list(run.glob("**/*tmp*")) and not steps_logged(run)

  done = call("train", environment, *flags)
  assert done.returncode == 0, done.stderr
  assert steps_logged(run) == [1, 2] and not (run / "lock.json").exists()
