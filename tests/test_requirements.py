"""Test that requirements.txt and every extra resolve to wheels for every Python and machine that is claimed."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
LINUX = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
NEWER_LINUX = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_31")  # libtpu's wheels need this glibc
MACHINES = [(python, machine) for python in PYTHONS for machine in LINUX]
CI = ROOT / ".github" / "workflows" / "ci.yml"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def resolve(machine: tuple[str, str], more: Sequence[str] = ()) -> dict[str, str] | str:
  """Return each package's version, or the error, for requirements.txt and `more`."""
  python, platform = machine
  command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
  # tensorflow-datasets needs promise, which is pure Python and has no wheel.
  command += ["--only-binary=:all:", "--no-binary=promise", f"--python-version={python}"]
  command += [f"--python-platform={platform}", "requirements.txt", "-"]
  done = subprocess.run(command, cwd=ROOT, input="\n".join(more), capture_output=True, text=True, timeout=300)
  return dict(re.findall(r"^([\w.\-]+)==(\S+)$", done.stdout, re.M)) if done.returncode == 0 else done.stderr


def resolve_all(machines: Sequence[tuple[str, str]], more: Sequence[str] = ()) -> dict[tuple[str, str], dict[str, str]]:
  with concurrent.futures.ThreadPoolExecutor(len(machines)) as pool:
    versions = dict(zip(machines, pool.map(functools.partial(resolve, more=more), machines), strict=True))
  errors = {machine: error for machine, error in versions.items() if isinstance(error, str)}
  if re.search("error sending request|dns error|Failed to fetch|Could not connect", " ".join(errors.values())):
    pytest.skip("no package index can be reached")
  assert not errors, errors
  return versions


@pytest.fixture(scope="module")
def resolved() -> dict[tuple[str, str], dict[str, str]]:
  return resolve_all(MACHINES)


@pytest.mark.parametrize("machine", MACHINES, ids="-".join)
def test_a_fresh_machine_resolves(resolved, machine):
  versions = resolved[machine]
  numbers = lambda name: tuple(map(int, re.findall(r"\d+", versions[name])[:2]))
  assert (0, 10) <= numbers("jax") < (0, 13) and numbers("array-record") >= (0, 8)
  assert {"flax", "optax", "orbax-checkpoint", "transformers", "grain", "clu", "ml-collections"} <= versions.keys()
  assert not [name for name in versions if name in ("tensorflow", "tensorflow-cpu", "torch")]


def test_ci_tests_every_python_that_is_claimed():
  claimed = re.findall(r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
  (tested,) = re.findall(r"python: (\[.+\])", CI.read_text())
  assert tuple(claimed) == PYTHONS == tuple(json.loads(tested))


def test_the_actions_of_ci_and_the_base_image_are_pinned():
  """They are pinned to a commit or a digest, which nobody can change later."""
  used = re.findall(r"uses: (\S+)", CI.read_text())
  assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)
  dockerfile = (ROOT / "Dockerfile").read_text()
  assert re.findall(r"^FROM (.+)$", dockerfile, re.M) == re.findall(
    r"python:3\.12-slim@sha256:[0-9a-f]{64}", dockerfile
  )
  assert "--constraint=requirements.lock" in dockerfile and "requirements.lock" in CI.read_text()
  assert re.findall(r"^USER (.+)$", dockerfile, re.M)[-1] not in ("root", "0")


def test_the_lock_has_a_version_of_every_requirement():
  """`make lock` writes the lock again."""
  lock = (ROOT / "requirements.lock").read_text()
  assert "://" not in lock
  lines = [Requirement(line) for line in lock.splitlines() if not line.startswith("#")]
  locked = {line.name: line for line in lines if line.marker is None or line.marker.evaluate()}
  asked = [
    *(ROOT / "requirements.txt").read_text().splitlines(),
    *(line for lines in EXTRAS.values() for line in lines),
  ]
  for text in asked:
    if text.startswith(("#", "diffdis_jax[")):
      continue
    wanted = Requirement(text)
    if wanted.marker is None or wanted.marker.evaluate():
      (version,) = locked[canonicalize_name(wanted.name)].specifier
      assert version.operator == "==" and wanted.specifier.contains(version.version), text


@pytest.mark.full
def test_every_extra_resolves():
  """If all extras resolve together, any choice of them does."""
  asked = [line for lines in EXTRAS.values() for line in lines if not line.startswith("diffdis_jax[")]
  machines = [(python, machine) for python in PYTHONS for machine in NEWER_LINUX]
  for (_, machine), versions in resolve_all(machines, asked).items():
    assert {"jax-cuda12-plugin", "torch", "gradio", "wandb", "mkdocs", "pyright"} <= versions.keys()
    assert ("libtpu" in versions) == machine.startswith("x86_64")


def run(command: Sequence[str | pathlib.Path], **environment: str) -> str:
  asked = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
  done = subprocess.run([*command], cwd=ROOT, env=asked, capture_output=True, text=True, timeout=1800)
  if re.search("error sending request|dns error|Failed to fetch|Could not connect", done.stderr):
    pytest.skip("no package index can be reached")
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout + done.stderr


@pytest.mark.full
def test_the_lowest_versions_prepare_train_resume_and_generate(tmp_path):
  """A machine may have these versions already: pip keeps a version that a range allows."""
  python = tmp_path / "venv" / "bin" / "python"
  run([sys.executable, "-m", "uv", "venv", f"--python={sys.version_info[0]}.{sys.version_info[1]}", tmp_path / "venv"])
  install = ["-m", "uv", "pip", "install", "--resolution=lowest-direct", "--python", str(python)]
  run([sys.executable, *install, "-r", "requirements.txt"], UV_HTTP_TIMEOUT="300")
  (tmp_path / "own").mkdir()
  for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
    Image.new("RGB", (32, 32), colour).save(tmp_path / "own" / f"{name}.png")
    (tmp_path / "own" / f"{name}.txt").write_text(f"a {name} square")

  def diffdis(verb: str, *flags: str) -> str:
    return run([python, "-m", f"diffdis_jax.{verb}", *flags])

  diffdis("prepare_data", "files", f"--source={tmp_path / 'own'}", f"--out={tmp_path / 'data'}", "--held_out=0")
  autoencoder = ["--config=tests/tiny.py:autoencoder", f"--workdir={tmp_path / 'autoencoder'}"]
  diffdis("train", *autoencoder, "--config.num_steps=2", "--config.save_every=2")
  resumed = diffdis("train", *autoencoder, "--config.num_steps=4", "--config.save_every=2")
  assert "resuming from step 2" in resumed
  joint = ["--config=tests/tiny.py", f"--config.init_from={tmp_path / 'autoencoder'}", "--config.num_steps=2"]
  diffdis("train", *joint, f"--workdir={tmp_path / 'joint'}")
  drawn = ["--prompt=a red square", "--steps=2", f"--out={tmp_path / 'drawn'}"]
  diffdis("generate", f"--workdir={tmp_path / 'joint'}", *drawn)
  assert [*(tmp_path / "drawn").glob("*.png")]
  diffdis("export_weights", f"--workdir={tmp_path / 'joint'}", f"--out={tmp_path / 'x.safetensors'}")
