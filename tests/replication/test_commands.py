"""Test the replication's commands as a user types them in a checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.command_runs import ROOT

pytestmark = pytest.mark.slow

pytest_plugins = ("tests.command_runs",)
BASE = "--base=tests/tiny_ablation.py"


def command(module: str, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
  line = [sys.executable, "-m", module, *flags]
  return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def ablate(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
  return command("replication.ablate", environment, *flags)


def test_a_command_of_the_package_knows_what_the_replication_adds(environment):
  tasks = [command(name, environment, "evaluate", "--help").stdout for name in ("replication", "diffdis_jax")]
  assert [bool(re.search(r"\bhog\b", text)) for text in tasks] == [True, False]


@pytest.mark.full
def test_arms_start_from_each_other(tmp_path, environment):
  """Two seeds have four runs each. A second call does nothing, and the table has the comparison."""
  flags = [BASE, "--arms=tests/replication/tiny_arms.py", "--seeds=0,1", f"--out={tmp_path / 'out'}"]
  done = ablate(environment, "run", *flags)
  assert done.returncode == 0, done.stderr
  assert ablate(environment, "run", *flags).returncode == 0
  assert ablate(environment, "plan", *flags).stdout.splitlines()[-1] == "8 runs, 8 finished"
  assert ablate(environment, "table", *flags).returncode == 0
  table = json.loads((tmp_path / "out" / "tables.json").read_text())
  (claim,) = table["claims"]
  assert (claim["row"], claim["verdict"]["difference"]["n"]) == ("generation first", 2)
  runs = {name.partition("-seed_")[0]: run for name, run in table["runs"].items() if "seed_1" in name}
  chain = runs["generation_first"]["provenance"]["init_from"]
  assert [start["objectives"] for start in chain] == [["generation"], ["reconstruction"]]
  assert {start["seed"] for start in chain} == {1} and runs["alone"]["minutes"] > 0
