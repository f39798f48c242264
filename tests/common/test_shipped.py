"""Configs by name: in another folder, beside configs of one's own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest

from diffdis_jax.common import shipped
from diffdis_jax.config import fields
from diffdis_jax.errors import UserError
from tests.command_runs import ROOT

OWN = """from configs import common, shapes{more}

def get_config():
  config = shapes.get_config()
{body}  return config
"""


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
  monkeypatch.chdir(tmp_path)
  return tmp_path


def show(*args: str, program: Sequence[str] = ("-m", "diffdis_jax")) -> subprocess.CompletedProcess[str]:
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, *program, "config", "show", *args, "--fields=batch_size"]
  return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_names_are_the_files_of_configs():
  assert {*shipped.names()} == {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
  assert shipped.names()["shapes"] == ROOT / "configs/shapes.py"


def test_a_folder_of_runs_is_no_run_and_those_below_it_are_named(elsewhere):
  """As the demo's and an ablation's."""
  assert shipped.meant("runs/demo") == ""
  for run in ("runs/demo/autoencoder", "runs/demo/diffdis", *(f"ablation/runs/{i}" for i in range(5))):
    (elsewhere / run).mkdir(parents=True)
    (elsewhere / run / "config.json").write_text("{}")
  assert shipped.meant("runs/demo") == "; below it are runs/demo/autoencoder, runs/demo/diffdis"
  runs = ", ".join(f"ablation/runs/{i}" for i in range(3))
  assert shipped.meant(elsewhere / "ablation").replace(f"{elsewhere}/", "") == f"; below it are {runs} and 2 more"
  with pytest.raises(
    UserError, match="no config.json in runs/demo; .*; below it are runs/demo/autoencoder, runs/demo/d"
  ):
    fields.read_fields("runs/demo")


def test_a_config_is_found_by_its_name_in_another_folder(elsewhere):
  (elsewhere / "shapes").mkdir()  # of a run, perhaps
  done = show("shapes")
  assert done.returncode == 0 and "batch_size = 48" in done.stdout, done.stderr


def test_ones_own_file_takes_what_the_others_have_in_common(elsewhere):
  (elsewhere / "mine.py").write_text(OWN.format(more="", body="  config.batch_size = 7\n"))
  assert "batch_size = 7" in show("mine.py").stdout


def test_ones_own_file_finds_ones_own_modules_by_either_command(elsewhere):
  (elsewhere / "bin").mkdir()
  (elsewhere / "bin/diffdis").write_text("from diffdis_jax.__main__ import run\nrun()\n")  # as pip writes it
  (elsewhere / "mysizes.py").write_text("BATCH = 11\n")
  own = OWN.format(more="", body="  config.batch_size = mysizes.BATCH\n")
  (elsewhere / "mine.py").write_text(f"import mysizes\n{own}")
  for program in (["-m", "diffdis_jax"], [str(elsewhere / "bin/diffdis")]):
    assert "batch_size = 11" in (done := show("mine.py", program=program)).stdout, done.stderr


def test_ones_own_file_may_have_dataclasses(elsewhere):
  sizes = "import dataclasses\n\n@dataclasses.dataclass\nclass Size:\n  batch: int = 9\n\n"
  own = OWN.format(more="", body="  config.batch_size = Size().batch\n")
  (elsewhere / "mine.py").write_text(f"from __future__ import annotations\n{sizes}{own}")
  assert "batch_size = 9" in (done := show("mine.py")).stdout, done.stderr


def test_a_folder_of_the_same_name_is_in_nobodys_way(elsewhere):
  """Its files find each other and the package's; the package's configs find their own."""
  (elsewhere / "configs").mkdir()
  (elsewhere / "configs/sizes.py").write_text("BATCH = 5\n")
  (elsewhere / "configs/mine.py").write_text(OWN.format(more=", sizes", body="  config.batch_size = sizes.BATCH\n"))
  assert "batch_size = 5" in show("configs/mine.py").stdout
  (elsewhere / "configs/common.py").write_text("raise AssertionError('of another project')\n")
  done = show("shapes")
  assert done.returncode == 0 and "batch_size = 48" in done.stdout, done.stderr
