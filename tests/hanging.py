"""Runs a module of which one process hangs once, as in a collective with a dead peer, while its other threads live on:
python -m tests.hanging diffdis_jax.train --config=... --workdir=...
"""

from __future__ import annotations

import os
import pathlib
import runpy
import sys
import threading
from typing import Any

PROCESS, STEP, MARK = "DIFFDIS_TEST_HUNG_PROCESS", "DIFFDIS_TEST_HUNG_STEP", "DIFFDIS_TEST_HUNG_MARK"


def variables(mark: pathlib.Path, *, process: int, step: int) -> dict[str, str]:
  """Environment in which that process hangs at that step, unless the file `mark` is there, which it makes."""
  return {PROCESS: str(process), STEP: str(step), MARK: str(mark)}


def patch() -> None:
  """Makes a step hang where the environment asks for it."""
  from diffdis_jax.training.metrics import Meters

  mark, left = pathlib.Path(os.environ[MARK]), [int(os.environ[STEP])]
  if os.environ.get("DIFFDIS_PROCESS_ID", "0") != os.environ[PROCESS] or mark.exists():
    return
  add = Meters.add

  def hang(*args: Any) -> Any:
    left[0] -= 1
    if not left[0]:
      mark.touch()
      threading.Event().wait()
    return add(*args)

  Meters.add = hang


if __name__ == "__main__":
  patch()
  del sys.argv[0]
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
