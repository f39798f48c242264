"""The page as a process of its own, for the tests that click and those that ask it much."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Served(NamedTuple):
  address: str
  pid: int
  log: pathlib.Path

  def memory(self) -> int:
    """Resident, MB."""
    status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


@contextlib.contextmanager
def serve(workdir: str, log: pathlib.Path, environment: dict[str, str], *flags: str) -> Iterator[Served]:
  """Until the block is left; the process must then end by itself, with code 0."""
  command = [sys.executable, "-m", "diffdis_jax.app", f"--workdir={workdir}", "--port=0", *flags]
  environment = {**os.environ, **environment, "GRADIO_TEMP_DIR": str(log.with_suffix(".uploads"))}
  with log.open("w") as file:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
  try:
    end = time.monotonic() + 300
    while not (found := re.search(r"the page is at (\S+?)/?;", log.read_text())):
      assert process.poll() is None and time.monotonic() < end, log.read_text()
      time.sleep(0.2)
    yield Served(found[1], process.pid, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()
    assert not any(log.with_suffix(".uploads").iterdir()), "uploads are left"
  finally:
    process.kill()
    process.wait()
