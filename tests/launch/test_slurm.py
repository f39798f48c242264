"""launch/slurm.sbatch as Slurm runs it: a copy, in a job, with programs that record what they are asked."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

from tests.launch.programs import ROOT, Answer, Programs

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("returned", [75, 134])
def test_a_preempted_job_is_queued_again_whatever_others_died_of(job, returned):
  code, _, err = job.run(ended(75, returned=returned))
  assert (code, job.programs.calls) == (75, [SRUN, REQUEUE])
  assert "the job is queued again" in err and "Exited with exit code 75" in err


@pytest.mark.parametrize("code, returned", [(2, 2), (2, 134), (130, 130), (130, 134)])
def test_bad_input_or_ctrl_c_ends_it_whatever_others_died_of(job, code, returned):
  assert job.run(ended(code, returned=returned))[0] == code
  assert job.programs.calls == [SRUN]


def test_a_crash_starts_the_step_again_in_the_same_job(job):
  code, _, err = job.run(Answer(code=137), Answer(code=1), Answer())
  assert (code, job.programs.calls) == (0, [SRUN] * 3)
  assert "ended with code 137; starting again (1 of 3" in err


def test_gives_up_without_queueing_again(job):
  code, _, _ = job.run(Answer(code=1), restarts=1)
  assert (code, job.programs.calls) == (1, [SRUN] * 2)


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


ABLATE = ["python", "-m", "diffdis_jax.ablate", "run", "--out=/runs/a"]
TASK = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "5", "SLURM_SUBMIT_DIR": str(ROOT)}


def test_a_task_of_an_array_does_its_run(tmp_path):
  programs = Programs(tmp_path)
  done = programs.run("ablate.sbatch", "--", *ABLATE, **TASK)
  assert done.returncode == 0, done.stderr
  assert programs.calls == [["srun", "--wait=60", "--kill-on-bad-exit=0", "--label", *ABLATE, "--only=5"]]
