"""What comes before the first step: a run that is stopped there, and one that need not compile."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys

from tests import slow_compiling
from tests.command_runs import ROOT, call
from tests.test_resume import steps_logged

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


def test_a_run_begins_with_what_preflight_saved_and_refuses_anothers(environment, autoencoder_run, tmp_path):
  config, saved, run = "--config=tests/tiny.py:autoencoder", tmp_path / "saved", tmp_path / "run"
  done = call("preflight", environment, config, f"--save={saved}")
  assert done.returncode == 0, done.stderr
  alone = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "empty")}
  done = call("train", alone, config, f"--workdir={run}", f"--compiled={saved}")
  assert done.returncode == 0, done.stderr
  for name in ("the initialisation", "the state", "the training step"):
    assert f"loaded {name}" in done.stderr and f"compiled {name}" not in done.stderr
  # To the last bit of what is printed, the run of a process that compiled.
  losses = [
    [
      (line["step"], line["loss"], line["grad_norm"])
      for line in map(json.loads, file.read_text().splitlines())
      if "loss" in line
    ]
    for file in (run / "metrics.jsonl", pathlib.Path(autoencoder_run, "metrics.jsonl"))
  ]
  assert losses[0] == losses[1] != []

  other = tmp_path / "other"
  done = call("train", alone, config, f"--workdir={other}", f"--compiled={saved}", "--config.optim.rates.new=0.5")
  assert done.returncode == 2 and not other.exists(), done.stderr
  assert "was compiled for other config: optim.rates.new is" in done.stderr.splitlines()[-1]
