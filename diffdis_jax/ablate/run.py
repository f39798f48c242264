"""Do the runs of a plan: one in this process, or several in processes of their own."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from diffdis_jax import config as run_config
from diffdis_jax.ablate.folder import Folder, to_do
from diffdis_jax.ablate.plan import Plan, Run
from diffdis_jax.common import buckets, files, signals
from diffdis_jax.errors import INTERRUPTED, PREEMPTED, Interrupted, Preempted, UserError
from diffdis_jax.parallel import processes
from diffdis_jax.run import lock

PATIENCE = 10.0  # seconds between two looks at a run that another process has
BAD_INPUT = 2  # the exit code of a UserError


def select(plan: Plan, only: str) -> list[int]:
  """Return the numbers of the runs that `only` means: `K` that run, `K/N` every N-th one from the K-th on, "" all.

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
  # Nothing for a K beyond the last run: a job of an array that is larger than the plan.
  return list(range(int(number), len(plan.runs), int(count))) if slash else [int(number)]


def is_needed(one: Run, plan: Plan, folder: Folder) -> bool:
  """Return, for a run that is a start alone, whether a row that starts from it is left to do. Return true for others,
  since `run` leaves them alone where they are finished. The answer is the same on every process."""
  return bool(one.evals) or _as_first_sees(lambda: one in to_do(plan, {run: folder.state(run) for run in plan.runs}))


def run(
  one: Run,
  folder: Folder,
  *,
  train: Callable[[run_config.Run, str], Any],
  measure: Callable[[Run, str, str], Any],
) -> None:
  """Train a run, what it starts from first, and measure it, each from where it was stopped.

  What another process is at is waited for.

  Args:
    one: of a plan.
    folder: of the ablation.
    train: (its record, workdir) trains it to its end.
    measure: (run, workdir, file of results) measures it and writes the file.

  Raises:
    UserError, Preempted: as `train` and `measure` do.
  """
  # Before its start: where the results are, no workdir has to be.
  if _as_first_sees(lambda: folder.state(one).is_finished):
    return
  # The start first: a run begins from its last checkpoint.
  if one.start:
    run(one.start, folder, train=train, measure=measure)
  path = folder.workdir(one)
  _when_free(lambda: folder.state(one).is_trained, lambda: train(run_config.Run.of(folder.config(one)), path))

  def measured() -> None:
    # Training locks the workdir itself; measuring needs the same lock, or two processes would write one file.
    with contextlib.ExitStack() as stack:
      processes.on_first(lambda: stack.enter_context(lock.Lock(path)))
      measure(one, path, folder.results(one))

  _when_free(lambda: folder.state(one).measured, measured)


def _when_free(is_done: Callable[[], bool], action: Callable[[], Any]) -> None:
  """Do it, unless it is done; while another process has the workdir, wait for it."""
  while not _as_first_sees(is_done):
    try:
      action()
      return
    except lock.InUse as error:
      # One of several processes cannot wait alone: the others are on their way to what all of them do together.
      if jax.process_count() > 1:
        raise
      logging.info("waiting: %s", error)
      time.sleep(PATIENCE)


def _as_first_sees(look: Callable[[], bool]) -> bool:
  """Return on every process what process 0 sees. A shared file system may show a new file to some processes later, and
  all of them do together what follows."""
  return bool(processes.from_first(np.uint8(look() if processes.is_first() else False)))


def run_all(
  plan: Plan, numbers: Sequence[int], folder: Folder, command: Callable[[int], list[str]], *, jobs: int = 1
) -> int:
  """Do the runs of these numbers that are not finished, each in a process of its own; starts first.

  One that fails is reported, and the others continue. What a process says goes to its log, in a bucket at its end.

  Args:
    plan: of the runs.
    numbers: of some of them.
    folder: of the ablation.
    command: of the process of a run, by its number.
    jobs: how many at a time. Each has its share of this process's cores, however few are left: on other cores its sums
      would have another order.

  Returns:
    0, or the exit code for runs that failed: 2 if each of them had bad input, else 1.

  Raises:
    Preempted: SIGTERM or, as Interrupted, Ctrl-C came, to this process or to one of the runs', and all of them have
      saved and ended.
  """
  failed: dict[str, int] = {}

  def one(number: int, cores: set[int] | None) -> None:
    if children.asked:  # before it is announced as one that begins
      raise Preempted
    run, log = plan.runs[number], folder.log(plan.runs[number])
    words, last = folder.state(run).words, len(plan.runs) - 1
    logging.info("run %d of 0 to %d: %s; %s; log in %s", number, last, run.name, words, log)
    code = children.run(command(number), log, cores)
    if code == INTERRUPTED:
      raise Interrupted
    # Also of a run that ended well after the signal: no other one is to begin.
    if code == PREEMPTED or children.asked:
      raise Preempted
    if code:
      failed[run.name] = code
      logging.error("run %d, %s: failed with code %d: %s; log in %s", number, run.name, code, _last_words(log), log)

  with _Children().listening() as children:
    # Look at all runs, whichever are asked for: a start is done where any row still needs it.
    wanted = to_do(plan, {run: folder.state(run) for run in plan.runs})
    left = [number for number in numbers if plan.runs[number] in wanted]
    # All of a wave before any of the next one: a run starts from the last checkpoint of one before it.
    for wave in _waves(plan, left):
      ready = []
      for number in wave:
        run = plan.runs[number]
        if run.start and run.start.name in failed:
          logging.error("run %d, %s: left out, since its start %s failed", number, run.name, run.start.name)
          # With its code: where the start's input was bad, this run needs no other cause.
          failed[run.name] = failed[run.start.name]
        else:
          ready.append(number)
      _side_by_side(one, ready, jobs, children)
  if failed:
    logging.error("%d of %d runs failed; the same command tries them again", len(failed), len(numbers))
  else:
    logging.info("all %d runs are finished", len(numbers))
  return 0 if not failed else BAD_INPUT if {*failed.values()} == {BAD_INPUT} else 1


def _waves(plan: Plan, numbers: Sequence[int]) -> list[list[int]]:
  """Cut the runs, in their order, wherever one starts from another of the same wave."""
  waves: list[list[int]] = [[]]
  for number in numbers:
    start = plan.runs[number].start
    if start and start.name in {plan.runs[other].name for other in waves[-1]}:
      waves.append([])
    waves[-1].append(number)
  return waves


def _side_by_side(
  one: Callable[[int, set[int] | None], None], numbers: Sequence[int], jobs: int, children: _Children
) -> None:
  """Call `one` for each number, `jobs` of them at a time, with cores of its own. Raises what it raises."""
  # As many shares as threads, so that a thread always finds one.
  free: queue.SimpleQueue[set[int] | None] = queue.SimpleQueue()
  for share in _shares(jobs):
    free.put(share)

  def with_share(number: int) -> None:
    share = free.get()
    try:
      one(number, share)
    finally:
      free.put(share)

  with futures.ThreadPoolExecutor(jobs) as pool:
    submitted = [pool.submit(with_share, number) for number in numbers]
    try:
      for done in futures.as_completed(submitted):
        done.result()
    except BaseException:  # else the pool would start the next run
      children.stop()
      raise


def _shares(count: int) -> list[set[int] | None]:
  """Divide this process's cores into shares; None, all of them, for one, or where a process cannot be kept to some."""
  if count == 1 or not hasattr(os, "sched_getaffinity"):
    return [None] * count
  cores = sorted(os.sched_getaffinity(0))
  # With more jobs than cores some share one.
  return [{*cores[share::count]} or {cores[share % len(cores)]} for share in range(count)]


class _Children:
  """Processes that get SIGTERM, and save, when this one gets a signal; at a second Ctrl-C they are killed."""

  def __init__(self) -> None:
    self.asked = self._interrupted = False
    self._running: set[subprocess.Popen[bytes]] = set()

  @contextlib.contextmanager
  def listening(self) -> Iterator[_Children]:
    """Take the signals, if this is the main thread; leave no process behind."""
    with signals.handled(self._hear):
      try:
        yield self
      except Preempted:
        if self._interrupted:
          raise Interrupted from None
        raise
      finally:
        self.stop()

  def _hear(self, number: int) -> None:
    if number == signal.SIGINT and self._interrupted:
      for process in tuple(self._running):
        process.kill()
      signals.end_interrupted()
    if number == signal.SIGINT:
      self._interrupted = True
      signals.say("interrupted: what runs saves and ends; a second Ctrl-C ends it at once, without a save")
    self.stop()

  def run(self, command: Sequence[str], log: epath.Path, cores: set[int] | None) -> int:
    """Return the exit code of a process on these cores, whose output is appended to the file `log`."""
    if self.asked:
      return PREEMPTED
    with buckets.appended(log) as out:
      # Without a standard input: several processes would read one terminal.
      process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
      # Before the second look at `asked`: a signal since the first one has stopped only the processes that were in the
      # set.
      self._running.add(process)
      if cores is not None:
        os.sched_setaffinity(process.pid, cores)  # before it has a second thread
      if self.asked:
        process.terminate()
      try:
        return process.wait()
      finally:
        self._running.discard(process)

  def stop(self) -> None:
    """Send SIGTERM to those that run, and start no other."""
    self.asked = True
    for process in tuple(self._running):
      process.terminate()


def _last_words(log: Any) -> str:
  """Return the last line of a log that says what was wrong."""
  lines = [line for line in files.lines(log) if line.strip()]
  errors = [line for line in lines if line.startswith("error: ")]
  return (errors or lines or ["nothing was said"])[-1].removeprefix("error: ")
