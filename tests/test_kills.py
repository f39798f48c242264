"""Test that a run of two processes that is killed at random moments ends like one that is not killed.

DIFFDIS_KILLS is the number of kills, and DIFFDIS_KILLS_SEED the seed of the moments.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from diffdis_jax.run import workdir
from tests.command_runs import ROOT
from tests.test_resume import assert_same_end, steps_logged

pytestmark = pytest.mark.full

pytest_plugins = ("tests.command_runs",)
KILLS, SEED = (int(os.environ.get(f"DIFFDIS_KILLS{name}", count)) for name, count in (("", 6), ("_SEED", 0)))
STEPS, SAVE_EVERY = 60, 10


def command(run: pathlib.Path) -> list[str]:
  fields = {"num_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1, "eval_every": SAVE_EVERY}
  flags = [f"--config.{name}={value}" for name, value in {**fields, "train_evals": ("test",)}.items()]
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py", f"--workdir={run}", *flags]
  return ["launch/local.sh", "-n", "2", "-d", "1", "--max-restarts", "1000", "--", *train]


def children(parent: int) -> list[int]:
  """Return the launcher's training processes."""
  pids = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[1]) == parent and b"diffdis_jax.train" in (stat.parent / "cmdline").read_bytes():
        pids.append(int(stat.parent.name))
    except OSError:
      pass
  return pids


def wait_for_a_moment(launcher: subprocess.Popen, run: pathlib.Path, chance: random.Random) -> None:
  """Wait for a random moment in the start, in the steps, in a save or in an evaluation."""
  kind = chance.choice(("start", "steps", "steps", "save", "evaluation"))
  state = {
    "start": lambda: 0,
    "steps": lambda: steps_logged(run),
    "save": lambda: {path.name for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")},
    "evaluation": lambda: [step for step in steps_logged(run) if step % SAVE_EVERY == 0],
  }[kind]
  before = state()
  while kind != "start" and launcher.poll() is None and state() == before:
    time.sleep(0.002)
  time.sleep(chance.uniform(0, {"start": 20.0, "steps": 3.0, "save": 0.05, "evaluation": 0.5}[kind]))


def test_two_processes_killed_at_random_moments_end_in_the_same_bits(tmp_path, environment):
  """launch/local.sh restarts the processes. If a run ends before all kills are done, another run follows."""
  chance, whole = random.Random(SEED), tmp_path / "whole"
  subprocess.run(command(whole), cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
  lost = []
  for number in range(KILLS):
    run, log = tmp_path / f"run{number}", tmp_path / f"run{number}.log"
    with log.open("w") as file:
      launcher = subprocess.Popen(command(run), cwd=ROOT, env=environment, stdout=file, stderr=file)
    while launcher.poll() is None and len(lost) < KILLS:
      wait_for_a_moment(launcher, run, chance)
      victims = children(launcher.pid)
      if len(victims) < 2 or launcher.poll() is not None:
        continue
      victims = victims if chance.random() < 0.5 else [chance.choice(victims)]
      for victim in victims:
        os.kill(victim, signal.SIGKILL)
      reached = max(steps_logged(run), default=0)
      while launcher.poll() is None and (len(now := children(launcher.pid)) != 2 or set(now) & set(victims)):
        time.sleep(0.01)
      lost.append(reached - (workdir.latest_step(str(run)) or 0))
    assert launcher.wait() == 0, log.read_text()[-3000:]
    assert_same_end(run, whole)
    if len(lost) == KILLS:
      break
  assert len(lost) == KILLS
  # A save runs in the background: a kill before it is committed also loses the steps before it.
  assert max(lost) < 2 * SAVE_EVERY, lost
