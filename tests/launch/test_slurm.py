"""What the scripts for Slurm say to a wrong command line; tests/engines runs them in a real Slurm."""

from __future__ import annotations

import pytest

from tests.launch.programs import Programs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
  "arguments, said",
  [
    (["--", "true"], "not in a Slurm job; start it with sbatch"),
    (["--dry-run"], "no command; give it after --"),
    (["python"], "unknown argument 'python'"),
  ],
)
def test_bad_usage_is_one_line(tmp_path, arguments, said):
  done = Programs(tmp_path).run("slurm.sbatch", *arguments)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert done.stderr.startswith(f"slurm.sbatch: error: {said}")
