"""Compare training, evaluation and generation by two processes with those by one. Each test compiles for minutes."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffdis_jax.run import restore, workdir
from tests import slow_compiling
from tests.command_runs import ROOT, call
from tests.test_resume import metrics, restore_training, steps_logged

pytest_plugins = ("tests.command_runs",)
pytestmark = pytest.mark.full
STEPS = 20


def flags(run: pathlib.Path, **changes) -> list[str]:
  fields = {"num_steps": STEPS, "save_every": 100, "log_every": 1, "model.unet.attention": "(False,)"}
  # With a small eps, Adam scales gradients of mere rounding up, which changes the loss by step 5.
  fields |= {"optim.eps": 1e-4, **changes}
  return ["--config=tests/tiny.py", f"--workdir={run}", *(f"--config.{name}={value}" for name, value in fields.items())]


def launch(processes: int, devices: int, verb: str, *flags: str) -> list[str]:
  start = ["launch/local.sh", "-n", str(processes), "-d", str(devices), "--max-restarts", "0", "--"]
  return [*start, sys.executable, "-m", f"diffdis_jax.{verb}", *flags]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment) -> tuple[pathlib.Path, pathlib.Path]:
  """Train the joint loss by one process with one device, and by two processes with four devices each."""
  folder = tmp_path_factory.mktemp("pods")
  one, two = folder / "one", folder / "two"
  done = call("train", environment, *flags(one))
  assert done.returncode == 0, done.stderr
  done = subprocess.run(launch(2, 4, "train", *flags(two)), cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return one, two


def test_two_processes_of_four_devices_equal_one_of_one(runs):
  one, two = runs
  expected, metrics_of_two = metrics(one), metrics(two)
  assert [line["step"] for line in metrics_of_two] == list(range(1, STEPS + 1))
  for name in ("loss", "loss_generation", "loss_discrimination"):
    np.testing.assert_allclose(
      [line[name] for line in metrics_of_two], [line[name] for line in expected], rtol=1e-5, err_msg=name
    )
  expected, params = (restore.restore_params(str(run), ema=False) for run in runs)
  for name, value in expected.items():
    # A key's bias adds the same to all scores of a query. Its gradient is mere rounding, which Adam scales up.
    if not name.endswith("attn.k.bias"):
      np.testing.assert_allclose(params[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_one_process_resumes_a_run_of_two_with_the_same_next_batch(runs):
  (_, expected), (state, batch) = restore_training(runs[0]), restore_training(runs[1])
  assert int(state.step) == STEPS
  np.testing.assert_array_equal(batch, expected)


def test_two_processes_evaluate_and_generate_like_one(runs, environment, tmp_path):
  run = runs[1]
  verbs = {
    "evaluate": ["--tasks=zero_shot", "--num_images=40", "--out={}.json"],
    "generate": ["--prompt=a red star", "--prompt=a blue ring", "--num_images=3", "--out={}"],
  }
  for verb, arguments in verbs.items():
    for name, processes in (("one", 1), ("two", 2)):
      out = [argument.format(tmp_path / name) for argument in arguments]
      command = launch(processes, 4 // processes, verb, f"--workdir={run}", *out)
      done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
      assert done.returncode == 0, done.stderr
  one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
  assert one == two
  files = sorted(path.name for path in (tmp_path / "one").iterdir())
  assert files == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(files) == 8
  for name in files:
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_one_process_may_compile_for_longer_than_a_collective_waits(environment, tmp_path):
  command = launch(2, 2, "train", *flags(tmp_path / "run", num_steps=2))
  command.insert(command.index("-m") + 1, "tests.slow_compiling")
  slow = slow_compiling.variables("train_step", process=1, seconds=75)
  done = subprocess.run(command, cwd=ROOT, env=environment | slow, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert slow_compiling.MESSAGE in done.stderr and steps_logged(tmp_path / "run") == [1, 2]


def test_sigterm_saves_and_the_run_loses_no_step(environment, tmp_path):
  run = tmp_path / "run"
  command = launch(2, 1, "train", *flags(run, num_steps=1000))
  launcher = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
  while max(steps_logged(run), default=0) < 5:
    assert launcher.poll() is None, launcher.stderr.read()
    time.sleep(0.05)
  begin = time.monotonic()
  os.kill(launcher.pid, signal.SIGTERM)
  assert launcher.wait(60) == 75, launcher.stderr.read()
  assert time.monotonic() - begin < 30
  launcher.stderr.close()
  step = workdir.latest_step(str(run))
  assert steps_logged(run)[-1] == step and not list(run.glob("lock.json"))
  assert not list((run / "checkpoints").glob("*tmp*"))

  command = launch(2, 1, "train", *flags(run, num_steps=1000))
  launcher = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
  while max(steps_logged(run), default=0) <= step + 1:
    assert launcher.poll() is None, launcher.stderr.read()
    time.sleep(0.05)
  os.kill(launcher.pid, signal.SIGTERM)
  assert launcher.wait(60) == 75
  launcher.stderr.close()
  logged = steps_logged(run)
  assert logged == list(range(1, logged[-1] + 1))
