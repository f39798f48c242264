"""launch/gke: the manifest that kubectl is given, and what it asks Kubernetes to do after which exit code."""

from __future__ import annotations

import pathlib

import pytest

from tests.launch.programs import Programs

pytestmark = pytest.mark.slow

yaml = pytest.importorskip("yaml")
TPU_NODES = "{cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 8x8}"
SETTINGS = {"NAME": "run", "IMAGE": "image:1", "HOSTS": "16", "CHIPS": "4", "RESOURCE": "google.com/tpu"}
SETTINGS |= {"SELECTOR": TPU_NODES, "MAX_RESTARTS": ""}
IN_ONE_POOL = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
TRAIN = ["python", "-m", "diffdis_jax.train", "--workdir=gs://b/r", "--config.a='x' \"&\\n@NAME@\"\n\ty: {z, # w"]


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> Programs:
  return Programs(tmp_path)


def applied(programs: Programs, **settings: str) -> dict:
  """The JobSet that kubectl was given."""
  done = programs.run("gke/gke.sh", "run", "--", *TRAIN, **{**SETTINGS, **settings})
  assert done.returncode == 0, done.stderr
  record = programs.records[-1]
  assert record["call"] == ["kubectl", "create", "-f", "-"]
  return yaml.safe_load(record["stdin"])


def job_of(jobset: dict) -> dict:
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert (replicated["name"], replicated["replicas"]) == ("host", 1)
  return replicated["template"]["spec"]


def test_one_pod_a_host_runs_the_command_as_it_is(programs):
  jobset = applied(programs)
  assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    {"name": "run", "annotations": IN_ONE_POOL},
  )
  job = job_of(jobset)
  assert (job["parallelism"], job["completions"], job["completionMode"]) == (16, 16, "Indexed")
  (container,) = job["template"]["spec"]["containers"]
  assert (container["command"], container["image"]) == (TRAIN, "image:1")
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"


def test_variables_are_handed_over_as_a_secret(programs):
  """By standard input, so that they show in no list of processes; the run's manifest has its name alone."""
  value = 'a "b" $(c)'
  done = programs.run("gke/gke.sh", "run", "--", *TRAIN, **SETTINGS, ENV="WANDB_API_KEY", WANDB_API_KEY=value)
  assert done.returncode == 0, done.stderr
  secret, jobset = (yaml.safe_load(record["stdin"]) for record in programs.records)
  assert (secret["kind"], secret["metadata"], secret["stringData"]) == (
    "Secret",
    {"name": "run-env"},
    {"WANDB_API_KEY": value},
  )
  (container,) = job_of(jobset)["template"]["spec"]["containers"]
  assert container["envFrom"] == [{"secretRef": {"name": "run-env"}}] and value not in str(jobset)
  assert value not in str(programs.calls)


def test_pods_find_each_other(programs):
  jobset = applied(programs, NAME="my-run", HOSTS="2")
  (container,) = job_of(jobset)["template"]["spec"]["containers"]
  values = {entry["name"]: entry["value"] for entry in container["env"]}
  assert values == {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "DIFFDIS_LAUNCHED": "1",
    "DIFFDIS_NUM_PROCESSES": "2",
    "DIFFDIS_COORDINATOR_ADDRESS": "my-run-host-0-0.my-run:8476",
  }
  assert container["ports"] == [{"containerPort": 8476}]
  assert jobset["spec"]["network"] == {"enableDNSHostnames": True}


@pytest.mark.parametrize("given, restarts", [("", 100), ("7", 7)])
def test_exit_codes_fail_restart_or_count(programs, given, restarts):
  jobset = applied(programs, MAX_RESTARTS=given)
  job = job_of(jobset)
  asked = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in job["podFailurePolicy"]["rules"]}
  assert asked == {(2, 130): "FailJob", (75, 143): "Ignore"}
  assert {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"]} == {
    job["template"]["spec"]["containers"][0]["name"]
  }
  assert jobset["spec"]["failurePolicy"] == {
    "maxRestarts": restarts,
    "rules": [{"name": "badInputOrInterrupt", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
  }
  assert (job["backoffLimit"], job["podReplacementPolicy"]) == (0, "Failed")
  assert job["template"]["spec"]["restartPolicy"] == "Never"  # which podFailurePolicy asks for
  assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 30


@pytest.mark.parametrize(
  "arguments, settings, said",
  [
    ([], {}, "no subcommand: run, logs or stop"),
    (["start"], {}, "unknown subcommand 'start'"),
    (["run"], {}, "no command; give it after --"),
    (["run", "python"], {}, "unknown argument 'python'; the command goes after --"),
    (["stop", "now"], {}, "stop takes no argument, but was given 'now'"),
    (["run", "--", "true"], {"IMAGE": ""}, "set IMAGE; --help tells what it is"),
    (["run", "--", "true"], {"HOSTS": "many"}, "HOSTS is 'many'; it should be a whole number from 1 up"),
    (["run", "--", "true"], {"NAME": "My_Run"}, "NAME is 'My_Run'; it should be lower-case letters"),
  ],
)
def test_bad_usage_is_one_line(programs, arguments, settings, said):
  done = programs.run("gke/gke.sh", *arguments, **{**SETTINGS, **settings})
  assert (done.returncode, done.stdout, done.stderr.count("\n"), programs.calls) == (2, "", 1, [])
  assert done.stderr.startswith(f"gke.sh: error: {said}")
