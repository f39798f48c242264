"""A clock that moves only by what is said to take time, and batches that one thread reads ahead by it."""

from __future__ import annotations

from typing import Any


class Clock:
  """In the place of the module `time`."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self) -> float:
    return self.now

  process_time = perf_counter

  def sleep(self, seconds: float) -> None:
    self.now += seconds


class ReadAhead:
  """`batch` again and again, each of which takes `seconds` to read, `ahead` of them before they are asked for."""

  def __init__(self, clock: Clock, *, ahead: int, seconds: float, batch: Any = None):
    self._clock, self._seconds, self._batch = clock, seconds, batch
    self._ready = [clock.now + seconds * (i + 1) for i in range(ahead)]

  def __iter__(self):
    return self

  def __next__(self) -> Any:
    self._ready.append(max(self._ready[-1], self._clock.now) + self._seconds)
    self._clock.now = max(self._clock.now, self._ready.pop(0))
    return self._batch
