"""A run of two processes that is killed again and again, and started again by launch/local.sh, ends in the same bits.

DIFFDIS_KILLS=50 pytest -m slow tests/test_kills.py --log-cli-level=INFO
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from diffdis_jax.run import committed
from tests.command_runs import ROOT
from tests.test_resume import metrics, restore_training, steps_logged

pytest_plugins = ("tests.command_runs",)
KILLS = int(os.environ.get("DIFFDIS_KILLS", "6"))
STEPS, SAVE_EVERY = 60, 10


def command(run: pathlib.Path) -> list[str]:
  fields = {"num_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 1}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py:autoencoder", f"--workdir={run}", *flags]
  return ["launch/local.sh", "-n", "2", "-d", "1", "--max-restarts", "1000", "--", *train]


def children(parent: int) -> list[int]:
  """The processes that train; not the launcher's own helpers."""
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = stat.read_text().rpartition(")")[2].split()
      if int(fields[1]) == parent and b"diffdis_jax.train" in (stat.parent / "cmdline").read_bytes():
        found.append(int(stat.parent.name))
    except OSError:
      pass
  return found


def newest(run: pathlib.Path) -> int:
  return committed.latest_step(str(run)) or 0


def wait_for_a_moment(launcher: subprocess.Popen, run: pathlib.Path, chance: random.Random) -> str:
  """Returns at some moment of the start, of the steps, or of a save."""
  kind = chance.choice(("start", "steps", "steps", "save"))
  if kind == "start":
    time.sleep(chance.uniform(0, 20))
    return kind
  unfinished = lambda: {path.name for path in (run / "checkpoints").glob("*.orbax-checkpoint-tmp*")}
  logged, left = steps_logged(run), unfinished()
  happened = {"steps": lambda: steps_logged(run) != logged, "save": lambda: unfinished() - left}[kind]
  while launcher.poll() is None and not happened():
    time.sleep(0.002)
  time.sleep(chance.uniform(0, 3.0 if kind == "steps" else 0.05))
  return kind


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path, environment):
  chance = random.Random(0)
  whole = tmp_path / "whole"
  subprocess.run(command(whole), cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

  kills, lost = 0, []
  for number in range(KILLS):
    run = tmp_path / f"run{number}"
    with (tmp_path / f"run{number}.log").open("w") as log:
      launcher = subprocess.Popen(command(run), cwd=ROOT, env=environment, stdout=log, stderr=log)
    while launcher.poll() is None:
      if kills == KILLS:
        launcher.wait()
        break
      kind = wait_for_a_moment(launcher, run, chance)
      victims = children(launcher.pid)
      if len(victims) < 2 or launcher.poll() is not None:
        continue
      if chance.random() < 0.5:
        victims = [chance.choice(victims)]
      for victim in victims:
        os.kill(victim, signal.SIGKILL)
      reached = max(steps_logged(run), default=0)
      kills += 1
      while launcher.poll() is None and set(children(launcher.pid)) & set(victims):
        time.sleep(0.01)
      while launcher.poll() is None and len(children(launcher.pid)) != 2:
        time.sleep(0.01)
      lost.append(reached - newest(run))
      logging.info("kill %d: %s, %d of 2, at step %d, kept %d", kills, kind, len(victims), reached, newest(run))
    assert launcher.returncode == 0, (tmp_path / f"run{number}.log").read_text()[-3000:]
    assert_same_end(run, whole)
    starts = len(re.findall("host 0 of 2", (tmp_path / f"run{number}.log").read_text()))
    logging.info("run %d ended in the same bits, after %d starts", number, starts)
    if kills == KILLS:
      break
  assert kills == KILLS
  logging.info("lost steps: %s", json.dumps(sorted(lost)))
  # A save runs in the background: until it is committed, the steps after it are lost with those before it.
  assert max(lost) < 2 * SAVE_EVERY


def assert_same_end(run: pathlib.Path, whole: pathlib.Path) -> None:
  """Metrics, the state restored by one process, and the batch that would be next."""
  assert metrics(run) == metrics(whole)
  (expected, next_batch), (found, next_found) = restore_training(whole), restore_training(run)
  np.testing.assert_array_equal(next_found, next_batch)
  for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
