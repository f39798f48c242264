"""Test the Dockerfile under a real builder, buildah, as root. It takes minutes, since it installs the packages.

The base image python:3.12-slim is in a registry; here the same Debian with its own Python replaces it.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.command_runs import ROOT

pytestmark = pytest.mark.full
PROGRAMS = ("buildah", "mmdebstrap")
BASE = "localhost/python"
_BASE = "FROM scratch\nADD base.tar /\nRUN python3 -m venv /usr/local\n"
# A sandbox cannot raise limits, and a host may be behind a proxy with its own certificate.
_LIMITS = ("--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")
_BUILDS = (*_LIMITS, "--volume=/etc/ssl/certs:/etc/ssl/certs:ro")


class Builder:
  """Run buildah, with its images in a folder of its own."""

  def __init__(self, folder: pathlib.Path):
    self._stores = [f"--root={folder / 'images'}", f"--runroot={folder / 'run'}"]

  def __call__(self, *arguments: str | os.PathLike, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    command = ["buildah", *self._stores, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
  """Return a builder that has the base image. Skip the tests if buildah cannot be started."""
  missing = [name for name in PROGRAMS if shutil.which(name) is None]
  if missing:
    pytest.skip(f"no {', '.join(missing)}: apt-get install buildah netavark mmdebstrap")
  if os.geteuid():
    pytest.skip("images are built as root")
  folder = tmp_path_factory.mktemp("images")
  packages = "--include=python3,python3-venv,ca-certificates"
  subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", packages, "trixie", folder / "base.tar"], check=True)
  (folder / "Dockerfile").write_text(_BASE)
  buildah = Builder(folder)
  try:
    buildah("build", *_BUILDS, f"--tag={BASE}", folder)
    yield buildah
  finally:
    buildah("rm", "--all")
    buildah("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def container(builder: Builder) -> str:
  builder("build", *_BUILDS, f"--from={BASE}", "--build-arg=EXTRAS=tpu", "--tag=localhost/diffdis", ".")
  name = builder("from", *_LIMITS, "localhost/diffdis").stdout.strip()
  builder("config", "--env=JAX_PLATFORMS=cpu", name)
  return name


def test_an_extra_without_a_processor_is_refused(builder):
  done = builder("build", *_BUILDS, f"--from={BASE}", "--build-arg=EXTRAS=wandb", ".", check=False)
  assert done.returncode and "EXTRAS is 'wandb'; it should have cuda or tpu" in done.stderr


def test_the_image_trains_in_its_working_directory(builder, container):
  flags = ["--config=configs/shapes.py:autoencoder", "--workdir=/tmp/run", "--config.num_steps=2"]
  builder("run", container, "--", "python", "-m", "diffdis_jax.train", *flags)
  output = builder("run", container, "--", "sh", "-c", "pwd; ls /tmp/run/checkpoints; python -c 'import libtpu'")
  assert output.stdout.splitlines()[:2] == ["/diffdis", "2"]


def test_the_image_holds_the_launchers_and_no_tests(builder, container):
  output = builder("run", container, "--", "sh", "-c", "launch/gke/gke.sh --help | head -1; ls")
  assert output.stdout.startswith("A run on GKE as a JobSet") and "tests" not in output.stdout.split()
