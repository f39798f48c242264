"""Reads a batch's records side by side where storage answers slowly, as a bucket or a network file system does.

Each of the loader's threads prepares one batch, record after record. That is fastest where reading takes less time
than decoding. A bucket takes tens of milliseconds for any record, so there only more reads at a time help.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeVar

SLOW = 0.005  # seconds that a record is waited for
AT_ONCE = 128  # records: 2,560 images/s at 50 ms each
_LAST, _CACHED = 32, 2  # records by which it is judged, and how many of them may come at once
_Example = TypeVar("_Example")


class Reads:
  """Makes the examples of batches: in the thread that asks, or, while storage is slow, in AT_ONCE threads that all
  batches share. Examples and their order are the same.

  Args:
    may_share: whether there may be further threads.
  """

  def __init__(self, *, may_share: bool):
    self._may_share = may_share
    # Of the last records, in any order. Threads write to it at the same time: each sets one number.
    self._waits, self._count = [0.0] * _LAST, itertools.count()
    self._threads = futures.ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reads")  # starts none yet

  def __reduce__(self) -> Any:
    # A process that prepares batches has threads of its own.
    return functools.partial(Reads, may_share=self._may_share), ()

  @property
  def are_slow(self) -> bool:
    """Say whether nearly all of the last records were waited for. Threads that compete for a processor wait too, but
    not for each record."""
    return sorted(self._waits)[_CACHED] > SLOW

  def of(self, make: Callable[[int], _Example], places: Sequence[int]) -> list[_Example]:
    """make(place) for each of them. Raises what the first of them has raised."""
    made: list[_Example] = []
    # Asked before each record: a first batch would take seconds otherwise.
    while len(made) < len(places) and not (self._may_share and self.are_slow):
      made.append(self._timed(make, places[len(made)]))
    return made + list(self._threads.map(lambda place: self._timed(make, place), places[len(made) :]))

  def _timed(self, make: Callable[[int], _Example], place: int) -> _Example:
    begin, own = time.perf_counter(), time.thread_time()
    try:
      return make(place)
    finally:
      # Without the thread's own work, such as decoding, which further threads make no faster.
      self._waits[next(self._count) % _LAST] = time.perf_counter() - begin - (time.thread_time() - own)
