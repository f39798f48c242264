"""Doing the runs of a plan: one in this process, or one after another in processes of their own."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from diffdis_jax.ablations.folder import Folder
from diffdis_jax.ablations.plan import Plan, Run
from diffdis_jax.errors import PREEMPTED, Preempted, UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import workdir

PATIENCE = 10.0  # seconds between two looks at a run that another process has
BAD_INPUT = 2  # the exit code of a UserError


def select(plan: Plan, only: str) -> list[int]:
  """Numbers of the runs that `only` means: `K` that run, `K/N` every N-th one from the K-th on, "" all.

  Raises:
    UserError: it is something else, or no run.
  """
  number, slash, count = only.partition("/")
  if not only:
    return list(range(len(plan.runs)))
  if not number.isdecimal() or (slash and not count.isdecimal()):
    raise UserError(f"--only={only} should be K, the number of a run, or K/N, every N-th run from the K-th on")
  if slash and int(number) >= int(count):
    raise UserError(f"--only={only} should have a K from 0 to {max(int(count) - 1, 0)}, below its N")
  if not slash and int(number) >= len(plan.runs):
    raise UserError(f"--only={only}: the plan has runs 0 to {len(plan.runs) - 1}")
  return list(range(int(number), len(plan.runs), int(count))) if slash else [int(number)]


def perform(
  run: Run,
  folder: Folder,
  *,
  train: Callable[[ConfigDict, str], Any],
  measure: Callable[[Run, str, str], Any],
) -> None:
  """Trains a run, its autoencoder first, and measures it, each from where it was stopped.

  What another process is at is waited for.

  Args:
    run: of a plan.
    folder: of the ablation.
    train: (config, workdir) trains it to its end.
    measure: (run, workdir, file of results) measures it and writes the file.

  Raises:
    UserError, Preempted: as `train` and `measure` do.
  """
  if folder.state(run).is_finished:
    return
  if run.autoencoder:
    perform(run.autoencoder, folder, train=train, measure=measure)
  path = folder.workdir(run)
  _when_free(lambda: folder.state(run).is_trained, lambda: train(ConfigDict(folder.config(run)).lock(), path))

  def measured() -> None:
    with contextlib.ExitStack() as stack:
      processes.on_first(lambda: stack.enter_context(workdir.Lock(path)))
      measure(run, path, folder.results(run))

  _when_free(lambda: folder.state(run).measured, measured)


def _when_free(is_done: Callable[[], bool], action: Callable[[], Any]) -> None:
  """Does it, unless it is done; while another process has the workdir, waits for it."""
  while not is_done():
    try:
      action()
      return
    except workdir.InUse as error:
      if jax.process_count() > 1:
        raise
      logging.info("waiting: %s", error)
      time.sleep(PATIENCE)


def perform_all(plan: Plan, numbers: Sequence[int], folder: Folder, command: Callable[[int], list[str]]) -> int:
  """Does the runs of these numbers that are not finished, one after another, each in a process of its own.

  One that fails is told, and the others go on. What a process says goes to its log; with a folder in a bucket, to where
  this process writes.

  Args:
    plan: of the runs.
    numbers: of some of them.
    folder: of the ablation.
    command: of the process of a run, by its number.

  Returns:
    0, or the exit code for runs that failed: 2 if each of them had bad input, else 1.

  Raises:
    Preempted: SIGTERM came, which the run's process got too.
  """
  failed: dict[str, int] = {}
  with _Children().listening() as children:
    for number in numbers:
      run = plan.runs[number]
      state = folder.state(run)
      if state.is_finished:
        continue
      if run.autoencoder and run.autoencoder.name in failed:
        logging.error("run %d, %s: left out, since its autoencoder failed", number, run.name)
        failed[run.name] = failed[run.autoencoder.name]
        continue
      log = folder.log(run)
      logging.info("run %d of %s: %s; %s; log in %s", number, f"0 to {len(plan.runs) - 1}", run.name, state.words, log)
      code = children.run(command(number), None if "://" in str(log) else str(log))
      if code == PREEMPTED or children.asked:
        raise Preempted
      if code:
        failed[run.name] = code
        logging.error("run %d, %s: failed with code %d: %s; log in %s", number, run.name, code, _last_words(log), log)
  if failed:
    logging.error("%d of %d runs failed; the same command tries them again", len(failed), len(numbers))
  else:
    logging.info("all %d runs are finished", len(numbers))
  return 0 if not failed else BAD_INPUT if {*failed.values()} == {BAD_INPUT} else 1


class _Children:
  """Processes, one at a time, that get this one's SIGTERM."""

  def __init__(self) -> None:
    self.asked = False
    self._process: subprocess.Popen[bytes] | None = None

  @contextlib.contextmanager
  def listening(self) -> Iterator[_Children]:
    """Takes SIGTERM, where this is the main thread; leaves no process behind."""
    before = None
    if threading.current_thread() is threading.main_thread():
      before = signal.signal(signal.SIGTERM, self._on_signal)
    try:
      yield self
    finally:
      if self._process is not None and self._process.poll() is None:
        self._process.terminate()
        self._process.wait()
      if before is not None:
        signal.signal(signal.SIGTERM, before)

  def run(self, command: Sequence[str], log: str | None) -> int:
    """The exit code of a process, whose output is appended to the file `log`."""
    if self.asked:
      return PREEMPTED
    with contextlib.ExitStack() as stack:
      out = None
      if log is not None:
        pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
        out = stack.enter_context(open(log, "ab"))
      self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
      if self.asked:
        self._process.terminate()
      return self._process.wait()

  def _on_signal(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.asked = True
    if self._process is not None and self._process.poll() is None:
      self._process.terminate()


def _last_words(log: Any) -> str:
  """The last line of a log that says what was wrong."""
  said = log.read_bytes().decode(errors="replace") if log.exists() else ""
  lines = [line for line in said.splitlines() if line.strip()]
  errors = [line for line in lines if line.startswith("error: ")]
  return (errors or lines or ["nothing was said"])[-1].removeprefix("error: ")
