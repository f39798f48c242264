"""Runs in a bucket whose server fails, and runs that are killed inside a save to it: they end in the same bits.

DIFFDIS_KILLS=30 pytest -m full tests/test_bucket_faults.py --log-cli-level=INFO
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import pytest

from diffdis_jax.common import buckets
from diffdis_jax.run import digests
from tests import bucket_proxy
from tests.command_runs import ROOT, joint_flags
from tests.test_bucket_runs import assert_same_end

pytest_plugins = ("tests.command_runs",)
pytestmark = [
  pytest.mark.full,
  pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
KILLS = int(os.environ.get("DIFFDIS_KILLS", "10"))


@pytest.fixture
def root(tmp_path):
  (tmp_path / "bucket").mkdir()
  return tmp_path


def reach(address, monkeypatch):
  """This process, and what it starts, reach gs://bucket there; returns the variables for that."""
  there = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
  for name, value in there.items():
    monkeypatch.setenv(name, value)
  buckets.path("gs://bucket")  # first, since it says how gcsfs is imported
  from gcsfs import GCSFileSystem

  GCSFileSystem.clear_instance_cache()
  return there


def marks(root):
  return list(root.glob(f"bucket/run*/checkpoints/*/{digests.COMMIT_MARK}"))


@contextlib.contextmanager
def started(command, environment):
  running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
  try:
    yield running
  finally:
    running.kill()
    running.communicate()


def end_of(running):
  said = running.communicate(timeout=500)[1]
  assert running.returncode == 0, said
  return said


def test_a_server_that_answers_503(root, monkeypatch, environment, joint_run, autoencoder_run):
  """For 20 s from a save on, and for 10 s where the next process starts."""
  with bucket_proxy.serving(root) as proxy:
    there = environment | reach(proxy.address, monkeypatch)
    command = [sys.executable, "-m", "diffdis_jax.train", *joint_flags(autoencoder_run), "--workdir=gs://bucket/run"]
    with started(command, there) as running:
      while not marks(root):
        assert running.poll() is None
        time.sleep(0.01)
      proxy.refuses = True
      time.sleep(20)
      assert running.poll() is None and proxy.refused > 5
      proxy.refuses = False
      end_of(running)
    assert_same_end(buckets.path("gs://bucket/run"), pathlib.Path(joint_run))
    proxy.refuses, before = True, proxy.refused
    with started(command, there) as running:  # of a finished run, which looks for its checkpoints
      while proxy.refused == before:
        assert running.poll() is None
        time.sleep(0.05)
      threading.Timer(10, lambda: setattr(proxy, "refuses", False)).start()
      assert "finished at step" in end_of(running)


def test_a_server_that_answers_slowly(root, monkeypatch, environment, joint_run, autoencoder_run):
  with bucket_proxy.serving(root) as proxy:
    there = environment | reach(proxy.address, monkeypatch)
    proxy.delay = 0.2
    flags = [*joint_flags(autoencoder_run), "--workdir=gs://bucket/run"]
    with started([sys.executable, "-m", "diffdis_jax.train", *flags], there) as running:
      end_of(running)
    proxy.delay = 0.0
    assert proxy.delayed > 100
    assert_same_end(buckets.path("gs://bucket/run"), pathlib.Path(joint_run))


def test_killed_at_random_points_of_saves(root, monkeypatch, environment):
  """Each kill falls into a save that is not committed; the run resumes from the one before."""
  chance, fields = random.Random(0), {"num_steps": 40, "save_every": 2, "log_every": 1}
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py:autoencoder"]
  train += [f"--config.{name}={value}" for name, value in fields.items()]
  whole = root / "whole"
  subprocess.run([*train, f"--workdir={whole}"], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

  with bucket_proxy.serving(root) as proxy:
    there = environment | reach(proxy.address, monkeypatch)
    proxy.delay = 0.02  # of a bucket that is not on this machine: a save has time to be killed in
    kills, runs = 0, 0
    while kills < KILLS:
      run = root / "bucket" / f"run{runs}"
      command, runs = [*train, f"--workdir=gs://bucket/{run.name}"], runs + 1
      resumed = False
      while not resumed:
        with started(command, there) as running:
          inside = kills < KILLS and wait_for_a_save(running, run, chance)
          if inside:
            running.kill()
            running.wait()
          if inside and (left := unfinished(run)):
            kills += 1
            logging.info("kill %d: run %d, in the save of step %s, %s of it there", kills, runs, *left)
          elif not inside:
            end_of(running)
            resumed = True
      assert_same_end(buckets.path(f"gs://bucket/{run.name}"), whole)
      logging.info("run %d ended in the same bits", runs)


def unfinished(run: pathlib.Path) -> tuple[int, int] | None:
  """Step and number of objects of the newest checkpoint, where it is not committed; older ones may be under removal."""
  steps = [int(path.name) for path in (run / "checkpoints").glob("[0-9]*") if any(path.rglob("*"))]
  newest = run / "checkpoints" / str(max(steps, default=0))
  if not steps or (newest / digests.COMMIT_MARK).exists():
    return None
  return int(newest.name), sum(each.is_file() for each in newest.rglob("*"))


def wait_for_a_save(running: subprocess.Popen, run: pathlib.Path, chance: random.Random) -> bool:
  """Returns at some moment after another save has begun; False where the run has ended before."""
  left, skipped = unfinished(run), chance.randint(0, 2)
  while skipped >= 0:
    while (now := unfinished(run)) is None or now == left or (left and now[0] == left[0]):
      if running.poll() is not None:
        return False
      if now is None:
        left = None
      time.sleep(0.001)
    left, skipped = now, skipped - 1
  time.sleep(chance.uniform(0, 0.5))
  return True
