from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.engines.slurm import PROGRAMS, Slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
  """Start a Slurm cluster. Skip the tests if Slurm is not installed or this user may not start it."""
  missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
  if missing:
    pytest.skip(f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
  if os.geteuid():
    pytest.skip("Slurm's daemons need root")
  os.environ["PATH"] += ":/usr/sbin"
  cluster = Slurm(tmp_path_factory.mktemp("slurm"))
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.stop()
