"""Ctrl-C as a terminal sends it: to every process of a group of its own, in which it is not ignored."""

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
  """Ctrl-C, in this process and in those that it starts.

  A shell without job control has what it runs in the background ignore SIGINT, and so would all that is started here. A
  signal with a handler has its default again in a program that is started.
  """
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def is_alive(pid: int | str) -> bool:
  """Return whether this process runs. A zombie does not."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


class Terminal:
  """A command in a terminal. Its stderr goes to a file, which anybody may keep writing to.

  Args:
    command: what is typed.
    environment: its variables.
    stderr: of the command and its children.
  """

  def __init__(self, command: Sequence[str], environment: Mapping[str, str], stderr: pathlib.Path):
    self._stderr = stderr
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
    """Until `ready()`, while the command runs."""
    deadline = time.monotonic() + seconds
    while not ready():
      assert self.process.poll() is None, self.said
      assert time.monotonic() < deadline, self.said
      time.sleep(0.005)

  def ctrl_c(self) -> None:
    """Send SIGINT to the whole group."""
    os.killpg(self.process.pid, signal.SIGINT)

  def end(self, *, seconds: float = 60) -> int:
    """Wait for the end and return the exit code."""
    return self.process.wait(seconds)

  @property
  def said(self) -> str:
    """Return the text of stderr."""
    return self._stderr.read_text()
