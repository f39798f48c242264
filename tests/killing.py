"""Runs a command in a folder of its own, and kills it at some moment."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
from typing import Any, NamedTuple

from tests import command_runs
from tests.command_runs import ROOT
from tests.killed_commands import OUT, Case


class Ended(NamedTuple):
  code: int
  said: str
  seconds: float


class Course(NamedTuple):
  """The course of an undisturbed command: when it begins to write and ends, in seconds, and what it has written."""

  begun: float
  end: float
  written: dict[str, Any]


class Killer:
  """Runs a case's command in a folder of its own, again and again."""

  def __init__(self, case: Case, folder: pathlib.Path, environment: dict[str, str]):
    self.case, self.folder = case, folder
    self.out = folder / case.name
    self.environment = {"GLIBC_TUNABLES": "", **environment}

  def start(self) -> subprocess.Popen[str]:
    command = [word.replace(OUT, str(self.out)) for word in self.case.command]
    if "diffdis_jax.ablate" in command:  # in a group of its own, of which a scheduler kills all
      pipe = subprocess.PIPE
      options: Any = dict(cwd=ROOT, env=self.environment, text=True, start_new_session=True)
      return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, **options)
    return command_runs.start(command, self.environment)

  def clear(self) -> None:
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir()

  def undisturbed(self) -> Course:
    self.clear()
    self.finish()  # which compiles
    self.clear()
    begin, begun = time.monotonic(), None
    with self.start() as process:
      reading = threading.Thread(target=process.communicate)
      reading.start()
      while reading.is_alive():
        if begun is None and any(self.folder.iterdir()):
          begun = time.monotonic() - begin
        time.sleep(0.01)
    assert process.returncode == 0 and begun is not None
    return Course(begun, time.monotonic() - begin, self.case.written(self.out))

  def finish(self) -> None:
    with self.start() as process:
      _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said

  def kill(self, at: float, number: int, *, deadline: float, group: bool) -> Ended | None:
    """Send a command the signal at a moment, and SIGKILL after the deadline. Return None if it had ended before."""
    with self.start() as process:
      try:
        process.communicate(timeout=at)
        return None
      except subprocess.TimeoutExpired:
        pass
      begin = time.monotonic()
      os.killpg(process.pid, number) if group else process.send_signal(number)
      try:
        _, said = process.communicate(timeout=deadline)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
        _, said = process.communicate()
      return Ended(process.returncode, said, time.monotonic() - begin)

  def litter(self) -> list[str]:
    """Return the half-written files, there or where the command writes."""
    return sorted(
      str(path.relative_to(self.folder))
      for path in self.folder.rglob("*")
      if path.name.startswith(".") or "tmp" in path.suffix
    )
