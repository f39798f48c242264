"""Runs with near checkpoints, as a user types them, killed and resumed: they end in the same bits as one left alone."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest

from diffdis_jax.common import buckets
from diffdis_jax.run import committed
from tests.command_runs import ROOT, STEPS, call, joint_flags
from tests.test_bucket_runs import assert_same_end
from tests.test_kills import children
from tests.test_resume import kill_when

pytest_plugins = ("tests.command_runs", "tests.bucket_server")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def near_steps(folder: pathlib.Path, process: int = 0) -> list[int]:
  """Steps of its whole near checkpoints."""
  marks = folder.glob(f"*/{process}/*/{committed.COMMIT_MARK}")
  return [int(mark.parent.name) for mark in marks if mark.parent.name.isdigit()]


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--near=gs://b/near", "--near_every=2"], "--near=gs://b/near must be a local path, on a disk of each host; "),
    (["--near=near"], "--near and --near_every go together; give both"),
    (["--near_every=2"], "--near and --near_every go together; give both"),
    (["--near={file}/near", "--near_every=2"], "cannot write to --near={file}/near: Not a directory"),
    (["--near=", "--near_every=2"], "--near= is empty; give a path"),
  ],
)
def test_bad_input_is_one_line(tmp_path, environment, flags, said):
  (tmp_path / "file").write_text("")
  given = [flag.format(file=tmp_path / "file") for flag in flags]
  done = call("train", environment, "--config=tests/tiny.py:autoencoder", f"--workdir={tmp_path / 'run'}", *given)
  assert done.returncode == 2 and not (tmp_path / "run").exists()
  assert done.stderr.splitlines()[-1].startswith(f"error: {said.format(file=tmp_path / 'file')}"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("far", [True, False])
def test_a_killed_run_resumes_from_the_near_one(
  tmp_path, bucket, environment, bucket_environment, joint_run, autoencoder_run, far
):
  """Its workdir is in a bucket, where it has a checkpoint or has none yet."""
  url, near = f"{bucket}/{uuid.uuid4().hex}", tmp_path / "near"
  command = [sys.executable, "-m", "diffdis_jax.train", *joint_flags(autoencoder_run), f"--workdir={url}"]
  command += [f"--near={near}", "--near_every=3", f"--config.save_every={4 if far else 100}"]
  there = environment | bucket_environment
  ready = lambda: max(near_steps(near), default=0) >= 6 and (not far or committed.latest_step(url) is not None)
  kill_when(command, there, ready)
  kept, saved = max(near_steps(near)), committed.latest_step(url)
  assert kept < STEPS and bool(saved) == far
  done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  newest = f"resuming from step {kept}, a near checkpoint" if kept > (saved or 0) else f"resuming from step {saved}\n"
  assert newest in done.stderr
  assert_same_end(buckets.path(url), pathlib.Path(joint_run))
  assert not list(near.iterdir())


@pytest.mark.slow
def test_two_processes_one_of_which_loses_its_disk(tmp_path, environment):
  fields = {"num_steps": 24, "save_every": 5, "log_every": 1}
  train = [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py:autoencoder"]
  train += [f"--config.{name}={value}" for name, value in fields.items()]
  launch = ["launch/local.sh", "-n", "2", "-d", "1", "--restarts", "0", "--", *train]
  run, near, whole = tmp_path / "run", tmp_path / "near", tmp_path / "whole"
  subprocess.run([*launch, f"--workdir={whole}"], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)

  command = [*launch, f"--workdir={run}", f"--near={near}", "--near_every=2"]
  common = lambda: max({*near_steps(near, 0)} & {*near_steps(near, 1)}, default=0)

  def killed_after(step: int) -> str:
    with (tmp_path / "log").open("w") as log:
      launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while common() < step or (committed.latest_step(str(run)) or 0) < step - step % 5:
      assert launcher.poll() is None, (tmp_path / "log").read_text()
      time.sleep(0.002)
    for victim in children(launcher.pid):
      os.kill(victim, signal.SIGKILL)
    assert launcher.wait(60)
    return (tmp_path / "log").read_text()

  killed_after(8)
  kept = common()
  said = killed_after(kept + 6)
  assert said.count(f"resuming from step {kept}, a near checkpoint") == 2, said
  (lost,) = near.glob("*/1")
  shutil.rmtree(lost)
  saved = committed.latest_step(str(run))
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stderr.count(f"resuming from step {saved}\n") == 2, done.stderr
  assert_same_end(run, whole)
  assert not list(near.iterdir())
