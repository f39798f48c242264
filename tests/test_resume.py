"""Test that a run that is killed twice and resumed ends in the same bits as one that is not killed."""

from __future__ import annotations

import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from diffdis_jax.run import checkpoint, workdir
from diffdis_jax.structs import TrainState
from diffdis_jax.training import start
from tests import command_runs, steps
from tests.command_runs import SAVE_EVERY, STEPS, joint_flags
from tests.steps import build_trainer, config_of

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)


def kill_when(command: list[str], environment: dict[str, str], ready: Callable[[], bool]) -> None:
  """Start the run, and kill it as soon as `ready()` is true."""
  process = command_runs.start(command, environment, output=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 300
    while not ready():
      assert process.poll() is None, "the run ended before it could be killed"
      assert time.monotonic() < deadline
      time.sleep(0.001)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()


def steps_logged(run: pathlib.Path) -> list[int]:
  path = run / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def metrics(run: pathlib.Path) -> list[dict[str, float]]:
  """Read every line of the metrics without its speeds."""
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  speeds = {"steps_per_sec", "images_per_sec", "data_wait"}
  return [{name: value for name, value in line.items() if name not in speeds} for line in lines]


def restore_training(run: pathlib.Path) -> tuple[TrainState, np.ndarray]:
  """Restore the last state, and the images of the batch after it."""
  config = config_of(str(run))
  trainer = build_trainer(config, steps.make_mesh())
  iterator = steps.open_batches(config)
  with checkpoint.Checkpointer(str(run)) as checkpointer:
    state, _ = start.restore_or_init(trainer, checkpointer, iterator)
  return jax.device_get(state), next(iterator)["image"]


def assert_same_end(run: pathlib.Path, whole: pathlib.Path) -> None:
  """Check that both runs have the same metrics, the same bits in their last state, and the same next batch."""
  assert metrics(run) == metrics(whole)
  (expected, next_batch), (state, own_batch) = restore_training(whole), restore_training(run)
  np.testing.assert_array_equal(own_batch, next_batch)
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(state), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def killed_twice(killed: pathlib.Path, command: list[str], environment: dict[str, str]) -> bool:
  """Kill a run after a random step, and once resumed during a save. Return true if that save was unfinished."""
  chosen = random.randint(SAVE_EVERY - 1, 2 * SAVE_EVERY - 1)
  kill_when(command, environment, lambda: chosen in steps_logged(killed))
  first = workdir.latest_step(str(killed)) or 0
  assert first < STEPS, f"killed after step {chosen}, too late"

  left_behind = unfinished(killed)
  new = lambda: [int(name.split(".")[0]) for name in unfinished(killed) - left_behind]
  kill_when(command, environment, lambda: any(step > first + SAVE_EVERY for step in new()))
  if not new():
    return False
  assert first < workdir.latest_step(str(killed)) < STEPS
  return True


def unfinished(run: pathlib.Path) -> set[str]:
  return {path.name for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")}


RUNS = {
  "one device": (1, []),
  "data 2, fsdp 2": (4, ["--config.mesh.data=2", "--config.mesh.fsdp=2"]),
  "accumulation": (1, ["--config.optim.accumulate=2"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_a_random_step_and_in_a_save_ends_in_the_same_bits(name, tmp_path, autoencoder_run, environment):
  num_devices, flags = RUNS[name]
  environment = {**environment, "JAX_NUM_CPU_DEVICES": str(num_devices)}
  train = [sys.executable, "-m", "diffdis_jax.train", *joint_flags(autoencoder_run), *flags]
  whole = tmp_path / "whole"
  done = command_runs.run([*train, f"--workdir={whole}"], environment)
  assert done.returncode == 0, done.stderr
  for attempt in range(3):  # if this process gets no core during a save, its kill comes too late
    killed = tmp_path / f"killed_{attempt}"
    command = [*train, f"--workdir={killed}"]
    if killed_twice(killed, command, environment):
      break
  else:
    raise AssertionError("each time the save was finished before the kill")

  done = command_runs.run(command, environment)
  assert done.returncode == 0, done.stderr
  assert not unfinished(killed)
  assert steps_logged(killed) == list(range(1, STEPS + 1))
  assert_same_end(killed, whole)
