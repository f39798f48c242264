"""Ends a process that hangs, so that its launcher starts the run again.

A device, a collective with a dead peer or a file system can keep a step waiting for ever, while the process looks alive
from outside. A thread of each process compares how long its loop has been at one thing with how long that took before.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from diffdis_jax.common import signals

MEDIANS = 3.0
FIRST_TIME = 3600.0  # seconds for what has no median yet: it may compile
# Seconds beside the medians of what waits for storage, which is tried again for some minutes, or writes gigabytes.
STORAGE = 900.0
REMEMBERED = 101  # durations of one thing
LOOK = 1.0  # seconds between two looks
CODE = 1  # as of a crash: a launcher starts the run again, MAX_RESTARTS times without a new checkpoint


class Watchdog:
  """Watches what the loop says it is doing.

  Args:
    patience: seconds beside three medians after which a step hangs; 0 to watch nothing.
    end: is called with a sentence; does not return.
    clock: seconds.
  """

  def __init__(
    self,
    patience: float,
    *,
    end: Callable[[str], object] = lambda message: _end(message),
    clock: Callable[[], float] = time.monotonic,
  ):
    self._patience, self._end, self._clock = patience, end, clock
    self._durations = collections.defaultdict[str, collections.deque[float]](
      lambda: collections.deque(maxlen=REMEMBERED)
    )
    self._now: tuple[str, float, float] | None = None  # what, since when, and seconds that it may take
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

  @contextlib.contextmanager
  def during(self, what: str, *, storage: bool = False) -> Iterator[None]:
    """Around a step, a save or an evaluation. `storage`: it may wait for a disk or a bucket that wavers."""
    self._begin(what, storage)
    try:
      yield
    finally:
      ended = self._now
      self._now = None
    assert ended is not None
    self._durations[what].append(self._clock() - ended[1])

  def alive(self) -> None:
    """What takes long, such as an evaluation, has come further: its time starts again."""
    if self._now is not None:
      what, _, seconds = self._now
      self._now = what, self._clock(), seconds

  def check(self) -> None:
    """One look."""
    if (now := self._now) is None:
      return
    what, since, seconds = now
    if (waited := self._clock() - since) > seconds:
      self._end(f"{what} has taken {waited:.0f} s, where {seconds:.0f} s is the most it may; the process ends")

  def _begin(self, what: str, storage: bool) -> None:
    before = self._durations[what]
    patience = max(self._patience, STORAGE) if storage else self._patience
    seconds = MEDIANS * statistics.median(before) + patience if before else max(patience, FIRST_TIME)
    self._now = what, self._clock(), seconds

  def _look(self) -> None:
    while not self._done.wait(LOOK):
      self.check()


def _end(message: str) -> NoReturn:
  """Writes where every thread stands, and ends this process."""
  faulthandler.dump_traceback(all_threads=True)
  sys.stderr.write(f"error: {message}; above is where each of its threads stands\n")
  signals.exit_at_once(CODE)
