"""Test what all launchers share: shellcheck, --help, XLA's flags, and a one-line message for a wrong command."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import uuid

import pytest

from diffdis_jax.common import buckets
from diffdis_jax.preflight import targets
from tests.launch.programs import ROOT, Programs

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.bucket_server",)
SCRIPTS = sorted(path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch"))
FLAGS = sorted((ROOT / "launch/flags").iterdir())
TPU_FLAGS = {
  "v5p": "--xla_tpu_scoped_vmem_limit_kib=50000",
  "tpu_fsdp": "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
  " --xla_tpu_enable_windowed_einsum_for_reduce_scatter=false",
}
STARTED = [path for path in SCRIPTS if path.name != "supervise.sh"]  # scripts that a user starts


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> Programs:
  return Programs(tmp_path)


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT / "launch"))


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("no shellcheck: pip install -e '.[test]'")
  done = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FLAGS, ids=name_of)
def test_xla_knows_each_flag_of_a_file_which_keeps_those_of_the_user(programs, path):
  """XLA ends the process if it does not know a flag."""
  user_flag = "--xla_cpu_enable_fast_math=false"
  devices = f"import jax, os; print(jax.device_count(), '{user_flag}' in os.environ['XLA_FLAGS'].split())"
  command = ["bash", "-c", 'set -ae; . "$1"; set +a; exec "$2" -c "$3"', "bash", path, sys.executable, devices]
  environment = programs.environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1", XLA_FLAGS=user_flag)
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "1 True\n"), done.stderr


@pytest.mark.parametrize("given, kept", [({}, ""), ({"LIBTPU_INIT_ARGS": "--xla_a=1"}, "--xla_a=1 ")])
def test_a_tpus_flags_come_behind_those_of_the_user(programs, given, kept):
  """A shell may source both files, one after the other."""
  command = [
    "bash",
    "-c",
    f"set -ae; {''.join(f'. launch/flags/{name}.env; ' for name in TPU_FLAGS)}set +a; printenv LIBTPU_INIT_ARGS",
  ]
  done = subprocess.run(command, cwd=ROOT, env=programs.environment(**given), capture_output=True, text=True)
  expected = f"{kept}{' '.join(TPU_FLAGS.values())}\n"
  assert (done.returncode, done.stdout) == (0, expected), done.stderr


@pytest.mark.full
@pytest.mark.skipif(not targets.is_installed("tpu"), reason="libtpu is not installed")
def test_the_tpu_compiler_knows_its_flags():
  """The compiler ends the process if it does not know a flag."""
  compiled = (
    "from diffdis_jax.preflight import chips; from diffdis_jax.preflight import targets;"
    "print(len(targets.tpu_devices(chips.parse('v5p:2x2x1'), 1)))"
  )
  environment = {**os.environ, "LIBTPU_INIT_ARGS": " ".join(TPU_FLAGS.values()), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", compiled], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.stdout == "4\n", done.stderr


@pytest.mark.parametrize("version, code", [("3 2", 2), ("4 3", 2), ("4 4", 0), ("5 0", 0)])
def test_an_older_bash_is_refused_in_one_line(version, code):
  """macOS has bash 3.2, with which a launcher would fail halfway."""
  older = f"OLD=({version}); source <(sed s/BASH_VERSINFO/OLD/g launch/supervise.sh)"
  done = subprocess.run(["bash", "-c", older], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr.count("\n")) == (code, code // 2)
  assert not code or "error: bash 4.4 or newer is needed" in done.stderr


@pytest.mark.parametrize(
  "given, expected",
  [
    ({}, ["", "0.9"]),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, ["", "0.5"]),
    ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, ["0.5", ""]),  # JAX refuses the older variable beside the new one
  ],
)
def test_jax_may_take_as_much_of_a_gpu_as_preflight_counts_on(programs, given, expected):
  environment = programs.environment(**{"XLA_CLIENT_MEM_FRACTION": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": "", **given})
  command = ["bash", "-c", "source launch/supervise.sh; env | grep MEM_FRACTION"]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  values = dict(line.split("=") for line in done.stdout.splitlines())
  assert [values[name] for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")] == expected
  assert targets.GPU_MEMORY == 0.9 and "MEM_FRACTION=0.9" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("path", STARTED, ids=name_of)
def test_help_is_the_comment_at_the_top(path, programs):
  done = programs.run(name_of(path), "--help")
  assert (done.returncode, done.stderr, programs.calls) == (0, "", []) and os.access(path, os.X_OK)
  assert f"launch/{name_of(path)}" in done.stdout and "--dry-run" in done.stdout and "#" not in done.stdout


TPU = dict(NAME="run", ZONE="us-west4-a", TYPE="v5litepod-64", RUNTIME="v2")
GKE = dict(NAME="run", IMAGE="image:1", HOSTS="16", CHIPS="4", RESOURCE="google.com/tpu", SELECTOR="{}")


@pytest.mark.parametrize(
  "script, arguments, settings, message",
  [
    ("slurm.sbatch", ["--", "true"], {}, "not in a Slurm job; start it with sbatch"),
    ("slurm.sbatch", ["--dry-run"], {}, "no command; give it after --"),
    ("tpu_pod.sh", [], TPU, "no subcommand: create, setup"),
    ("tpu_pod.sh", ["--spot", "create"], TPU, "unknown argument '--spot'"),
    ("tpu_pod.sh", ["run", "python"], TPU, "unknown argument 'python'; the command goes after --"),
    ("tpu_pod.sh", ["create"], {**TPU, "ZONE": ""}, "set ZONE, as in"),
    ("tpu_pod.sh", ["run", "--", "true"], {**TPU, "MAX_RESTARTS": "x"}, "MAX_RESTARTS is 'x'"),
    ("gke/gke.sh", ["start"], GKE, "unknown subcommand 'start'"),
    ("gke/gke.sh", ["stop", "now"], GKE, "stop takes no argument, but was given 'now'"),
    ("gke/gke.sh", ["run", "--", "true"], {**GKE, "IMAGE": ""}, "set IMAGE; --help tells what it is"),
    ("gke/gke.sh", ["run", "--", "true"], {**GKE, "HOSTS": "many"}, "HOSTS is 'many'; it should be a whole number"),
    ("gke/gke.sh", ["run", "--", "true"], {**GKE, "NAME": "My_Run"}, "NAME is 'My_Run'; it should be lower-case"),
  ],
)
def test_bad_usage_is_one_line(programs, script, arguments, settings, message):
  done = programs.run(script, *arguments, **settings)
  assert (done.returncode, done.stdout, done.stderr.count("\n"), programs.calls) == (2, "", 1, [])
  assert done.stderr.startswith(f"{pathlib.Path(script).name}: error: {message}")


def test_a_run_on_gke_is_restarted_by_its_exit_code_and_its_secret_stands_in_no_manifest(programs):
  yaml = pytest.importorskip("yaml")
  command = ["python", "-m", "diffdis_jax.train", "--config.a='x' \"&\\n@NAME@\"\n\ty: {z, # w"]
  done = programs.run("gke/gke.sh", "run", "--", *command, **GKE, ENV="WANDB_API_KEY", WANDB_API_KEY='a "b" $(c)')
  assert done.returncode == 0, done.stderr
  secret, jobset = (yaml.safe_load(record["stdin"]) for record in programs.records)
  assert secret["stringData"] == {"WANDB_API_KEY": 'a "b" $(c)'}
  assert 'a "b"' not in str(jobset) and 'a "b"' not in str(programs.calls)
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  (container,) = job["template"]["spec"]["containers"]
  assert (job["parallelism"], container["command"]) == (16, [word.replace("$", "$$") for word in command])
  actions = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in job["podFailurePolicy"]["rules"]}
  assert actions == {(2, 130): "FailJob", (75, 143): "Ignore"} and job["backoffLimit"] == 0
  values = {entry["name"]: entry["value"] for entry in container["env"]}
  assert values["DIFFDIS_COORDINATOR_ADDRESS"] == "run-host-0-0.run:8476" and values["DIFFDIS_NUM_PROCESSES"] == "16"


def newest_step(*command: str) -> int:
  """Return the newest step that a launcher with this command sees."""
  words = shlex.join([sys.executable, "-m", *command])
  code = f"source launch/supervise.sh; workdir=$(workdir_of {words}); python=$(python_of {words}); newest_step"
  done = subprocess.run(["bash", "-euc", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and done.stderr == ""
  return int(done.stdout)


# A thread of gcsfs holds its sessions until the process ends.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_newest_checkpoint_is_seen_on_a_disk_and_in_a_bucket(tmp_path, bucket):
  for out in (f"{tmp_path}/all runs", f"{bucket}/{uuid.uuid4().hex}"):
    ablation = ("diffdis_jax.ablate", "run", "--base=shapes", f"--out={out}", "--only=3")
    assert newest_step(*ablation) == 0
    for run, names in {"a run": ("8", "100", "0020", "300.uncommitted"), "b": ("9", "10"), "c": ("x",)}.items():
      for name in names:
        mark = buckets.path(out) / "runs" / run / "checkpoints" / name / "commit_success.txt"
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
    (buckets.path(out) / "runs" / "a run" / "checkpoints" / "200").mkdir()
    assert newest_step("diffdis_jax", "train", "--workdir", f"{out}/runs/a run") == 100
    assert newest_step(*ablation) == 110, "the sum: it grows with each run"
  assert newest_step("diffdis_jax", "ablate", "run", "--out", f"{tmp_path}/all runs") == 110
  assert newest_step("diffdis_jax.train") == newest_step("diffdis_jax.evaluate", f"--out={out}") == 0
