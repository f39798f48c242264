"""Ends a process that hangs, so that its launcher starts the run again.

A device, a collective with a dead peer or a file system can keep a step waiting for ever, while the process looks alive
from outside. A thread of each process compares how long its loop has been at one thing with how long that took before.
Of several processes all wait where one waits for storage, so that this one says so to the others.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol, runtime_checkable

from absl import logging

from diffdis_jax.common import signals

PATIENCE = 60.0  # seconds beside three medians
MEDIANS = 3.0
FIRST_TIME = 7200.0  # seconds for what has no median yet: it may compile
# Seconds beside the medians of what waits for storage, which is tried again for some minutes, or writes gigabytes, for
# which Orbax waits 1200 s (checkpoint.SAVE_TIMEOUT).
STORAGE = 1500.0
REMEMBERED = 101  # durations of one thing
LOOK = 1.0  # seconds between two looks
STOPPED = 10.0  # seconds without a look, after which all of the process was stopped, as by Ctrl-Z
CODE = 1  # as of a crash: a launcher starts the run again, MAX_RESTARTS times without a new checkpoint


@dataclasses.dataclass
class _Doing:
  """What the loop is at, since when, and how many seconds it may take. The loop replaces it, and a look that may come
  at the same moment only changes `since`."""

  what: str
  since: float
  seconds: float
  storage: bool
  alone: bool


@runtime_checkable
class Board(Protocol):
  """Where the processes of a run read what each has written, as `processes.Board`. Both may raise RuntimeError."""

  def write(self, text: str) -> None: ...

  def others(self) -> list[str]: ...


class Watchdog:
  """Watches what a loop says that it is doing.

  Args:
    patience: seconds beside three medians after which it hangs; 0 to watch nothing.
    board: of the run's processes; None for one process.
    end: is called with a sentence; does not return.
    clock: seconds.
  """

  def __init__(
    self,
    patience: float = PATIENCE,
    *,
    board: Board | None = None,
    end: Callable[[str], object] = lambda message: _end(message),
    clock: Callable[[], float] = time.monotonic,
  ):
    self._patience, self._board, self._end, self._clock = patience, board, end, clock
    self._written: str | None = None  # not known, of what a run before this one in the same process may have left
    self._durations: dict[str, collections.deque[float]] = {}
    self._doing: _Doing | None = None
    self._done = threading.Event()

  @contextlib.contextmanager
  def watching(self) -> Iterator[Watchdog]:
    """Looks until the end of the block."""
    if not self._patience:
      yield self
      return
    threading.Thread(target=self._look, name="watchdog", daemon=True).start()
    try:
      yield self
    finally:
      self._done.set()

  def at(self, what: str, *, storage: bool = False, alone: bool = False) -> None:
    """What comes before this has ended, and this begins.

    Args:
      storage: it may wait for a disk or a bucket that wavers.
      alone: it waits for no other process, so that those may wait for this one as long; or else one that hangs, and one
        that waits for it, would excuse each other.
    """
    now, before = self._clock(), self._doing
    if before is not None:
      self._durations.setdefault(before.what, collections.deque(maxlen=REMEMBERED)).append(now - before.since)
    known, patience = self._durations.get(what), max(self._patience, STORAGE) if storage else self._patience
    seconds = MEDIANS * statistics.median(known) + patience if known else max(patience, FIRST_TIME)
    self._doing = _Doing(what, now, seconds, storage, alone)

  def alive(self) -> None:
    """What takes long, such as an evaluation, has come further: its time starts again."""
    if (doing := self._doing) is not None:
      doing.since = self._clock()

  def check(self) -> None:
    """One look."""
    if (doing := self._doing) is None:
      return
    waited = self._clock() - doing.since
    # Half of the patience before the others, which began to wait at about the same time, would lose theirs.
    self._write(doing.what if doing.alone and waited > self._patience / 2 else "")
    if waited <= doing.seconds:
      return
    if others := self._others():
      logging.warning("%s has taken %.0f s, while another host is at %s", doing.what, waited, ", ".join(others))
      self.alive()
      return
    self._end(
      f"{doing.what} has taken {waited:.0f} s, where {doing.seconds:.0f} s is the most it may; the process ends"
    )

  def _write(self, text: str) -> None:
    """That this process waits for storage, or no longer. A process that dies meanwhile ends the others by itself."""
    if self._board and text != self._written:
      self._written = None  # the service may have it, and fail all the same
      with contextlib.suppress(RuntimeError):  # at the next look again
        self._board.write(text)
        self._written = text

  def _others(self) -> list[str]:
    """For what others wait, unless this process waits for storage itself, whose time is long and ends."""
    with contextlib.suppress(RuntimeError):
      if self._board and self._doing and not self._doing.storage:
        return self._board.others()
    return []

  def _look(self) -> None:
    before = self._clock()
    while not self._done.wait(LOOK):
      now = self._clock()
      if now - before > STOPPED:
        self.alive()
      before = now
      self.check()


def _end(message: str) -> NoReturn:
  """Writes where every thread stands, and ends this process."""
  faulthandler.dump_traceback(all_threads=True)
  sys.stderr.write(f"error: {message}; above is where each of its threads stands\n")
  signals.exit_at_once(CODE)
