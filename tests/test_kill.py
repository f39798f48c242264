"""A run killed by SIGKILL, twice, once in the middle of a save, ends in the same bits as one left alone."""

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

from diffdis_jax import checkpoint

STEPS = 8


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path_factory.mktemp("xla"))
  return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_NUM_CPU_DEVICES": "1"}


def command(workdir: pathlib.Path) -> list[str]:
  flags = (f"--config.num_steps={STEPS}", "--config.save_every=1", "--config.log_every=1")
  return [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py", f"--workdir={workdir}", *flags]


def finish(workdir: pathlib.Path, environment: dict[str, str]) -> None:
  done = subprocess.run(command(workdir), env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr


def kill_when(workdir: pathlib.Path, environment: dict[str, str], ready) -> None:
  """Starts the run and kills it, with its threads in whatever state, as soon as `ready()`."""
  process = subprocess.Popen(command(workdir), env=environment, stderr=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 300
    while not ready():
      assert process.poll() is None, "the run ended before it could be killed"
      assert time.monotonic() < deadline
      time.sleep(0.001)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()


def losses(workdir: pathlib.Path) -> list[tuple[int, float, float]]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_killed_twice_ends_in_the_same_bits(tmp_path: pathlib.Path, environment: dict[str, str]):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(whole, environment)

  saves = killed / "checkpoints"
  kill_when(killed, environment, lambda: checkpoint.latest_step(str(killed)) is not None)
  first = checkpoint.latest_step(str(killed))
  in_a_save = lambda: any("tmp" in path.name and path.name[0] > str(first) for path in saves.iterdir())
  kill_when(killed, environment, in_a_save)
  assert first <= checkpoint.latest_step(str(killed)) < STEPS
  finish(killed, environment)

  assert losses(killed) == losses(whole)
  assert [step for step, *_ in losses(whole)] == list(range(1, STEPS + 1))
  for ema in (False, True):
    expected = checkpoint.restore_params(str(whole), ema=ema)
    found = checkpoint.restore_params(str(killed), ema=ema)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)
