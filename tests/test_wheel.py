"""Test that the wheel contains the command and the configs, which work by name in any folder."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from diffdis_jax.common import cli, one_file
from tests.command_runs import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Build the wheel from the files that git tracks, and unpack it."""
  copy, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
  archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE)
  if archive.returncode:
    pytest.skip("no checkout of git")
  subprocess.run(["tar", "-x", "-C", copy], input=archive.stdout, check=True)
  pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-build-isolation"]
  subprocess.run([*pip, "--no-deps", "--no-index", f"--wheel-dir={folder}", str(copy)], check=True)
  (wheel,) = folder.glob("*.whl")
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder / "packages")
  return folder / "packages"


def test_the_wheel_has_the_command_and_every_config(installed):
  (entry,) = installed.glob("*.dist-info/entry_points.txt")
  assert "diffdis = diffdis_jax.__main__:run" in entry.read_text().splitlines()
  names = {path.stem for path in (installed / "diffdis_jax/configs").glob("*.py")}
  assert names == {*cli.config_names(), "__init__", "common"}
  assert {path.stem for path in (installed / "diffdis_jax/shipped").iterdir()} == {*one_file.models()} == {"shapes"}
  assert {path.name for path in installed.iterdir() if path.is_dir() and ".dist-info" not in path.name} == {
    "diffdis_jax"
  }
  assert not [*installed.rglob("replication*")]


def test_a_config_is_trained_by_its_name_in_another_folder(installed, tmp_path):
  """The command stops at the first check that needs data, after it has read the config."""
  script = tmp_path / "bin" / "diffdis"  # the script that pip writes
  script.parent.mkdir()
  script.write_text("import sys\nfrom diffdis_jax.__main__ import run\nsys.exit(run())\n")
  environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

  def diffdis(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *args]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

  shown = diffdis("config", "show", "shapes", "--fields=batch_size")
  assert shown.returncode == 0 and shown.stdout.startswith("batch_size = 48"), shown.stderr
  answered = diffdis("generate", "--workdir=shape", "--prompt=a red star", "--out=stars")
  assert answered.returncode == 2 and "did you mean shapes?" in answered.stderr, answered.stderr
  refused = diffdis("train", "--config=diffdis_cc3m:path=nowhere", "--workdir=run")
  assert refused.returncode == 2 and "error: no prepared data set in 'nowhere'" in refused.stderr, refused.stderr
  assert "diffdis_jax" in diffdis("--version").stdout and not (tmp_path / "run").exists()
