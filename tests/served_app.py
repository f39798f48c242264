"""Serve the app's page in another process, for tests that click on it or send it many requests."""

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

from tests.interrupting import is_alive

ROOT = pathlib.Path(__file__).parents[1]


class Served(NamedTuple):
  address: str
  pid: int
  log: pathlib.Path
  uploads: pathlib.Path

  def page(self, number: int) -> str:
    """Wait until page `number`, counted from 0, is served, and return its address."""
    end = time.monotonic() + 300
    while len(pages := re.findall(r"the page is at (\S+?)/?;", self.log.read_text())) <= number:
      assert is_alive(self.pid) and time.monotonic() < end, self.log.read_text()
      time.sleep(0.2)
    return pages[number]

  def memory(self) -> int:
    """Return the server's resident memory in MB."""
    status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024


def serve(
  workdir: str, log: pathlib.Path, environment: dict[str, str], *flags: str
) -> contextlib.AbstractContextManager[Served]:
  """Serve the page of a run."""
  return started(["-m", "diffdis_jax.app", f"--workdir={workdir}", "--port=0", *flags], log, environment)


@contextlib.contextmanager
def started(
  arguments: list[str], log: pathlib.Path, environment: dict[str, str], *, stop: signal.Signals = signal.SIGTERM
) -> Iterator[Served]:
  """Run Python with these arguments during the block, and check that it ends with code 0 and leaves no upload."""
  command, uploads = [sys.executable, *arguments], log.with_suffix(".uploads")
  environment = {**os.environ, **environment, "GRADIO_TEMP_DIR": str(uploads)}
  with log.open("w") as file:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
  try:
    served = Served("", process.pid, log, uploads)
    yield served._replace(address=served.page(0))
    process.send_signal(stop)
    assert process.wait(60) == 0, log.read_text()
    assert not any(uploads.iterdir()), "uploads are left"
  finally:
    process.kill()
    process.wait()
