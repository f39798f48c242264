"""launch/slurm.sbatch as Slurm runs it: a copy, in a job, with programs that record what they are asked."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from diffdis_jax.ablate import run as running
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.ablate.run import Folder
from tests.launch.programs import ROOT, Answer, Programs, wait_for

TRAIN = ["python", "-m", "diffdis_jax.train", "--workdir=/runs/a", "--config.a=x 'y'"]
SRUN = ["srun", "--wait=60", "--kill-on-bad-exit=0", "--label", *TRAIN]
REQUEUE = ["scontrol", "requeue", "17"]


def ended(code: int, *, returned: int | None = None) -> Answer:
  """srun's answer when a process ended with a code, and the highest of all processes was `returned`."""
  said = f"srun: error: node2: tasks 1-3: Exited with exit code {code}\n"
  return Answer(code=code if returned is None else returned, stderr=said, stdout="0: step 5\n")


class Job:
  """The script in a Slurm job."""

  def __init__(self, folder: pathlib.Path):
    (folder / "bin").mkdir()
    self.programs = Programs(folder / "bin")
    self._script = folder / "slurm_script"  # where Slurm keeps its copy
    shutil.copy(ROOT / "launch" / "slurm.sbatch", self._script)
    self._folder = folder

  def start(self, restarts: int = 3, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
      ["bash", self._script, "--", *TRAIN],
      cwd=ROOT,  # as of a job that was submitted there, or elsewhere with --chdir
      env=self.programs.environment(
        SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(self._folder), MAX_RESTARTS=str(restarts), **variables
      ),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *answers: Answer, restarts: int = 3, **variables: str) -> tuple[int, str, str]:
    self.programs.answer({"srun": answers})
    job = self.start(restarts, **variables)
    out, err = job.communicate(timeout=30)
    return job.returncode, out, err


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Job:
  return Job(tmp_path)


def test_runs_the_command_as_one_step(job):
  code, out, _ = job.run(Answer(stdout="0: done\n"))
  assert (code, out) == (0, "0: done\n")
  assert job.programs.calls == [SRUN]


def test_further_flags_go_to_srun(job, tmp_path):
  flags = "--container-image=a.sqsh --container-mounts=/a:/b"
  assert job.run(Answer(), SRUN_FLAGS=flags, SLURM_CPUS_PER_TASK="16")[0] == 0  # which srun itself does not read
  (call,) = job.programs.calls
  assert [word for word in call if word not in SRUN] == ["--cpus-per-task=16", *flags.split()]
  assert call[-len(TRAIN) :] == list(TRAIN)
  # Submitted from within a job that asked for cores, this one is told of 1, to which srun would hold each task.
  (tmp_path / "bin" / "srun").write_text('#!/bin/bash\n{ echo "$@"; env; } | grep -i "per.task" || true\n')
  assert job.run(SLURM_CPUS_PER_TASK="1", SLURM_TRES_PER_TASK="cpu=1")[:2] == (0, "")


@pytest.mark.parametrize("returned", [75, 134])
def test_a_preempted_job_is_queued_again_whatever_others_died_of(job, returned):
  code, _, err = job.run(ended(75, returned=returned))
  assert (code, job.programs.calls) == (75, [SRUN, REQUEUE])
  assert "the job is queued again" in err and "Exited with exit code 75" in err


@pytest.mark.parametrize("code, returned", [(2, 2), (2, 134), (130, 130), (130, 134)])
def test_bad_input_or_ctrl_c_ends_it_whatever_others_died_of(job, code, returned):
  assert job.run(ended(code, returned=returned))[0] == code
  assert job.programs.calls == [SRUN]


def test_a_code_that_only_begins_alike_is_a_crash(job):
  code, _, _ = job.run(ended(23), Answer())
  assert (code, job.programs.calls) == (0, [SRUN, SRUN])


def test_a_crash_starts_the_step_again_in_the_same_job(job):
  code, _, err = job.run(Answer(code=137), Answer(code=1), Answer())
  assert (code, job.programs.calls) == (0, [SRUN] * 3)
  assert "ended with code 137; starting again (1 of 3" in err


def test_gives_up_without_queueing_again(job):
  code, _, _ = job.run(Answer(code=1), restarts=1)
  assert (code, job.programs.calls) == (1, [SRUN] * 2)


def ended_by_sigterm(job: Job, folder: pathlib.Path, code: int, **variables: str) -> tuple[int, list[list[str]]]:
  """Of a job that is sent SIGTERM while its step, which then ends with `code`, runs: its code, what Slurm was asked."""
  waits = f"touch {folder}/begun; until [ -e {folder}/told ]; do sleep 0.05; done"
  lines = [waits, f"echo 'srun: error: a: task 0: Exited with exit code {code}' >&2"]
  (folder / "bin" / "srun").write_text("\n".join(["#!/bin/bash", *lines, f"exit {code}", ""]))
  started = job.start(**variables)
  wait_for(folder / "begun")
  os.kill(started.pid, signal.SIGTERM)
  (folder / "told").touch()
  started.communicate(timeout=60)
  return started.returncode, job.programs.calls


@pytest.mark.parametrize(
  "code, left, calls",
  [(75, None, []), (75, 3600, []), (143, 3600, []), (75, 0, [REQUEUE]), (143, 0, [REQUEUE]), (2, 0, []), (0, 0, [])],
)
def test_a_job_out_of_time_is_queued_again_and_a_cancelled_one_is_not(job, tmp_path, code, left, calls):
  end = {} if left is None else {"SLURM_JOB_END_TIME": str(int(time.time()) + left)}
  assert ended_by_sigterm(job, tmp_path, code, **end) == (code, calls)


def test_a_job_out_of_time_is_queued_again_by_an_older_bash_too(job, tmp_path):
  """That of RHEL 8 is 4.4, which lacks a variable for the time."""
  (tmp_path / "older").write_text("unset EPOCHSECONDS\n")
  variables = {"SLURM_JOB_END_TIME": str(int(time.time())), "BASH_ENV": str(tmp_path / "older")}
  assert ended_by_sigterm(job, tmp_path, 75, **variables) == (75, [REQUEUE])


def test_asks_slurm_for_a_warning_and_for_another_start():
  asked = re.findall(r"^#SBATCH (.*)$", (ROOT / "launch/slurm.sbatch").read_text(), re.MULTILINE)
  assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)


def test_dry_run_prints_the_commands(tmp_path):
  programs = Programs(tmp_path)
  done = programs.run("slurm.sbatch", "--dry-run", "--", *TRAIN)
  assert (done.returncode, programs.calls) == (0, [])
  step, requeue = done.stdout.splitlines()
  assert step.startswith("srun --wait=60 --kill-on-bad-exit=0 --label python -m diffdis_jax.train")
  assert requeue.split() == ["scontrol", "requeue", "JOB_ID"]


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["--", "true"], "not in a Slurm job; start it with sbatch"),
    (["--dry-run"], "no command; give it after --"),
    (["python"], "unknown argument 'python'"),
  ],
)
def test_bad_usage_is_one_line(tmp_path, arguments, said):
  done = Programs(tmp_path).run("slurm.sbatch", *arguments)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert done.stderr.startswith(f"slurm.sbatch: error: {said}")


@pytest.mark.parametrize("script", ["slurm.sbatch", "ablate.sbatch"])
def test_a_job_that_was_submitted_elsewhere_says_where_it_belongs(tmp_path, script):
  """Slurm runs a copy, which does not know where it lay."""
  copy = shutil.copy(ROOT / "launch" / script, tmp_path / "slurm_script")
  given = {**os.environ, **TASK, "SLURM_SUBMIT_DIR": str(tmp_path)}
  done = subprocess.run(["bash", copy, "--", *TRAIN], cwd=tmp_path, env=given, capture_output=True, text=True)
  said = f"error: {tmp_path} has no launch/supervise.sh; submit the job in the repository's folder\n"
  assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize("path", ["launch/ablate.sbatch", "docs/ablations.md"])
def test_tasks_of_an_array_are_submitted_with_more_than_one_core(path):
  """As many as Slurm gives a task, whatever GPUs it has."""
  (command,) = re.findall(r"sbatch (.*) launch/ablate\.sbatch", (ROOT / path).read_text())
  assert {"--exclusive", "--gpus-per-node=8"} <= set(command.split())


ABLATE = ["python", "-m", "diffdis_jax.ablate", "run", "--out=/runs/a"]
TASK = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "5", "SLURM_SUBMIT_DIR": str(ROOT)}


def test_a_task_of_an_array_does_its_run(tmp_path):
  programs = Programs(tmp_path)
  done = programs.run("ablate.sbatch", "--", *ABLATE, **TASK)
  assert done.returncode == 0, done.stderr
  assert programs.calls == [["srun", "--wait=60", "--kill-on-bad-exit=0", "--label", *ABLATE, "--only=5"]]


def test_a_task_that_is_out_of_time_is_queued_again_alone(tmp_path):
  """The first task's job number is also the array's, all of which scontrol would queue again."""
  programs = Programs(tmp_path)
  programs.answer({"srun": [ended(75)]})
  assert programs.run("ablate.sbatch", "--", *ABLATE, **TASK).returncode == 75
  assert programs.calls[-1] == ["scontrol", "requeue", "17_5"]


def test_a_task_of_an_array_gives_up_whatever_other_tasks_save(tmp_path):
  """Their checkpoints lie beside its own, and are none of its progress."""
  programs, runs = Programs(tmp_path), tmp_path / "all runs" / "runs"
  listed = tuple(
    Run(f"run-{i}", {"objectives": ("contrastive",), "num_steps": 9, "inference": {}}, None, {}) for i in range(16)
  )
  plan = Plan(base={}, tables=(), seeds=(0,), rows={}, runs=listed)
  (tmp_path / "plan").write_text("\n".join(running.lines(plan, Folder(runs.parent), None)))
  for name, code in {
    "diffdis": f"[[ $* == 'ablate plan --out={runs.parent}' ]] && cat {tmp_path}/plan",
    "srun": f"""echo . >>{tmp_path}/calls; n=$(wc -l <{tmp_path}/calls); ((n < 7)) || exit 0
      mark='{runs}'/run-15/checkpoints/$n/commit_success.txt; mkdir -p "${{mark%/*}}"; touch "$mark"; exit 1""",
  }.items():
    (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
    (tmp_path / name).chmod(0o755)
  command = ["--", "diffdis", "ablate", "run", f"--out={runs.parent}"]
  done = programs.run("ablate.sbatch", *command, **TASK, MAX_RESTARTS="1")
  assert (done.returncode, (tmp_path / "calls").read_text()) == (1, ".\n.\n"), done.stderr
  assert "1 restarts brought no new checkpoint; giving up" in done.stderr
  saved = runs / "run-5" / "checkpoints"
  for name in ("9", "10"):  # what it saves itself is
    (saved / name).mkdir(parents=True)
    (saved / name / "commit_success.txt").touch()
  code = f"source launch/supervise.sh; workdir=$(workdir_of {shlex.join(command)}); newest_step"
  asked = ["env", "ABLATION_RUN=run-5", "bash", "-euc", code]
  assert subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout == "10\n"


@pytest.mark.parametrize("given", [(), ("--",), ("--dry-run",), ("--dry-run", "--")])
def test_an_ablation_without_a_command_is_refused(tmp_path, given):
  done = Programs(tmp_path).run("ablate.sbatch", *given, **TASK)
  assert (done.returncode, done.stderr) == (2, "ablate.sbatch: error: no command; give it after --\n")


def test_an_ablation_without_an_array_is_refused(tmp_path):
  done = Programs(tmp_path).run("ablate.sbatch", "--", *ABLATE, SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(ROOT))
  assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert done.stderr.startswith("ablate.sbatch: error: not a task of an array")
  dry = Programs(tmp_path).run("ablate.sbatch", "--dry-run", "--", *ABLATE)
  assert dry.returncode == 0 and dry.stdout.splitlines()[0].split()[-1] == "--only=TASK"
