"""A command asks for huge pages before its imports, and nothing else does."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from diffdis_jax.common import huge_pages
from tests.command_runs import ROOT

SAYS = "import os, sys\nopen({file!r}, 'w').write(repr((os.environ.get('GLIBC_TUNABLES'), os.getpid())))\nsys.exit(3)\n"


def started(tmp_path: pathlib.Path, *args: str, **environment: str) -> tuple[str | None, bool]:
  """What the environment says where the command imports jax, and whether it is the process that was started."""
  file = tmp_path / "said"
  (tmp_path / "jax.py").write_text(SAYS.format(file=str(file)))
  clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
  process = subprocess.Popen([sys.executable, *args], env={**clean, **path, **environment}, cwd=tmp_path)
  assert process.wait(60) == 3
  said, pid = eval(file.read_text())
  return said, pid == process.pid


@pytest.mark.parametrize("how", [["-m", "diffdis_jax.generate"], ["-m", "diffdis_jax", "generate"]])
def test_a_command_asks_for_them_in_its_own_process(tmp_path, how):
  if not huge_pages.is_left_to_programs():
    pytest.skip("this kernel gives huge pages to all programs, or to none")
  assert started(tmp_path, *how, "--workdir=x") == ("glibc.malloc.hugetlb=1", True)


@pytest.mark.parametrize("given", ["glibc.malloc.hugetlb=0", ""])
def test_what_is_set_stays(tmp_path, given):
  assert started(tmp_path, "-m", "diffdis_jax.generate", "--workdir=x", GLIBC_TUNABLES=given) == (given, True)


def test_a_program_that_imports_the_package_is_left_alone(tmp_path):
  assert started(tmp_path, "-c", "import diffdis_jax; import jax") == (None, True)
