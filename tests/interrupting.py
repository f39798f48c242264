"""Send Ctrl-C as a terminal does: to all processes of a group."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.command_runs import ROOT


@contextlib.contextmanager
def not_ignored() -> Iterator[None]:
  """Handle SIGINT also where a shell without job control started this process in the background, ignoring it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def is_alive(pid: int | str) -> bool:
  """Return true if this process exists and is no zombie."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


class Terminal:
  """Run a command in a terminal; its stderr goes to a file."""

  def __init__(self, command: Sequence[str], environment: Mapping[str, str], stderr: pathlib.Path):
    self._file = stderr
    with not_ignored(), stderr.open("wb") as file:
      self.process = subprocess.Popen(
        command, cwd=ROOT, env={**environment}, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
      )

  def __enter__(self) -> Terminal:
    return self

  def __exit__(self, *_: object) -> None:
    try:
      os.killpg(self.process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    self.process.communicate()

  def wait_until(self, ready: Callable[[], object], *, seconds: float = 120) -> None:
    """Wait until `ready()` is true, while the command runs."""
    deadline = time.monotonic() + seconds
    while not ready():
      assert self.process.poll() is None, self.stderr
      assert time.monotonic() < deadline, self.stderr
      time.sleep(0.005)

  def ctrl_c(self) -> None:
    """Send SIGINT to the whole process group."""
    os.killpg(self.process.pid, signal.SIGINT)

  def end(self, *, seconds: float = 60) -> int:
    """Wait until the command ends, and return its exit code."""
    return self.process.wait(seconds)

  @property
  def stderr(self) -> str:
    """Read the file of stderr."""
    return self._file.read_text()
