"""Test the scripts for Slurm under a real one. It takes minutes: each job starts Python and compiles."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time

import pytest

from tests.engines.slurm import Slurm, command_of, pids, wait_until
from tests.test_resume import steps_logged

pytest_plugins = ("tests.command_runs",)
pytestmark = pytest.mark.full
MANY = 100_000


def train(run: pathlib.Path, **changes) -> list[str]:
  fields = {"num_steps": MANY, "save_every": 100, "log_every": 1, "eval_every": MANY, **changes}
  config = [f"--config.{name}={value}" for name, value in fields.items()]
  return [sys.executable, "-m", "diffdis_jax.train", "--config=tests/tiny.py", f"--workdir={run}", *config]


def events(run: pathlib.Path) -> list[dict]:
  path = run / "history.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(run: pathlib.Path, count: int) -> None:
  wait_until(lambda: max(steps_logged(run), default=0) >= count, 240, f"step {count}")


def wait_for_starts(run: pathlib.Path, count: int) -> list[dict]:
  started = lambda: [event for event in events(run) if event["event"] == "start"]
  wait_until(lambda: len(started()) >= count, 240, f"start {count} of the run")
  return started()


@pytest.fixture
def run(tmp_path: pathlib.Path, slurm: Slurm) -> pathlib.Path:
  yield tmp_path / "run"
  slurm.run("scancel", "--user=root")
  wait_until(lambda: not slurm.run("squeue", "-h"), 90, "an empty queue")


def test_two_tasks_of_a_node_find_each_other(slurm, environment, run):
  job = slurm.submit(environment, "--ntasks-per-node=2", command=train(run, num_steps=4, batch_size=16))
  facts = slurm.wait_for_end(job)
  assert facts["JobState"] == "COMPLETED" and facts["Restarts"] == "0", slurm.log(job)
  assert "host 0 of 2" in slurm.log(job) and "host 1 of 2" in slurm.log(job)
  assert steps_logged(run) == [1, 2, 3, 4]


def test_bad_input_is_never_queued_again(slurm, environment, run):
  job = slurm.submit(environment, command=train(run, batchsize=4))
  facts = slurm.wait_for_end(job)
  assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
  assert "batch_size" in slurm.log(job) and not run.exists()


def test_a_killed_rank_starts_all_again_within_the_job(slurm, environment, run):
  job = slurm.submit(environment, "--ntasks-per-node=2", command=train(run, save_every=20))
  wait_for_steps(run, 45)
  ranks = [pid for pid in pids(str(run)) if command_of(pid).startswith(sys.executable)]
  os.kill(ranks[0], signal.SIGKILL)
  started = wait_for_starts(run, 2)
  assert started[1]["step"] % 20 == 0 and started[1]["step"] >= 20, "from a checkpoint"
  wait_for_steps(run, started[1]["reached"] + 1)
  assert slurm.facts(job)["Restarts"] == "0" and slurm.facts(job)["JobState"] == "RUNNING"


def test_a_preempted_job_saves_and_loses_no_step(slurm, environment, run):
  job = slurm.submit(environment, command=train(run))
  wait_for_steps(run, 5)
  other = slurm.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
  wait_until(lambda: slurm.facts(job)["Restarts"] == "1", 120, "another start")
  slurm.hasten(job)
  first, second = wait_for_starts(run, 2)
  assert (first["step"], second["step"]) == (0, second["reached"]), "a step ran twice"
  assert events(run)[1]["why"] == "stopped"
  assert slurm.facts(other)["JobState"] == "COMPLETED"


def test_out_of_time_it_saves_and_is_queued_again(slurm, environment, run):
  job = slurm.submit(environment, "--time=1", "--signal=TERM@30", command=train(run))
  wait_for_steps(run, 5)
  wait_until(lambda: slurm.facts(job)["Restarts"] == "1", 120, "another start")
  slurm.hasten(job)
  _, second = wait_for_starts(run, 2)
  assert second["step"] == second["reached"] and events(run)[1]["why"] == "stopped"


def test_scancel_saves_and_nothing_is_queued_again(slurm, environment, run):
  job = slurm.submit(environment, command=train(run))
  wait_for_steps(run, 5)
  slurm.run("scancel", job)
  facts = slurm.wait_for_end(job)
  assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
  wait_until(lambda: len(events(run)) == 2, 30, "end of the run")
  saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
  assert events(run)[1]["why"] == "stopped" and saved == max(steps_logged(run))
  time.sleep(3)
  assert not slurm.run("squeue", "-h")


def test_after_a_dead_node_the_job_is_queued_again(slurm, environment, run):
  job = slurm.submit(environment, command=train(run, save_every=20))
  wait_for_steps(run, 45)
  slurm.kill_node(run)
  wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING", 120, f"job {job} queued again")
  slurm.start_node()
  slurm.hasten(job)
  _, second = wait_for_starts(run, 2)
  assert second["step"] % 20 == 0 and second["step"] >= 20
  wait_for_steps(run, second["reached"] + 1)


def test_an_array_takes_a_run_each(slurm, environment, tmp_path, run):
  flags = ["--base=tests/tiny_ablation.py", "--grid=loss.ita_weight=0.01,0.3", "--seeds=0", f"--out={tmp_path / 'out'}"]
  command = [sys.executable, "-m", "diffdis_jax.ablate", "run", *flags, "--config.num_steps=4"]
  job = slurm.submit(environment, "--array=0-2", script="ablate.sbatch", command=command)
  wait_until(lambda: not slurm.run("squeue", "-h"), 400, "an empty queue")
  done = [
    path.name for path in sorted((tmp_path / "out" / "runs").iterdir()) if max(steps_logged(path), default=0) >= 4
  ]
  assert len(done) == 3, f"an autoencoder, and two runs from it: {job}"
