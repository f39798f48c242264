"""Progress of long work, and the time that is left: a bar on a terminal, a line now and then in a log.

With --quiet neither. No jax, since the processes that prepare data import this file too.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from absl import logging
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

EVERY = 10.0  # seconds between two lines
DELAY = 2.0  # seconds after which a bar shows: what takes less has none


class Progress:
  """A bar that ends when all is done; where there is no terminal, a line now and then, with what is left.

  Args:
    what: is done, such as `embedded`.
    total: how many there are.
    unit: of them, such as `images`.
    every: seconds, at least, from the beginning or one line to the next.
  """

  def __init__(self, what: str, total: int, unit: str, *, every: float = EVERY):
    self._what, self._total, self._unit, self._every = what, total, unit, every
    self._begin = self._said = time.monotonic()
    self._done = self._new = 0
    self._bar = bar(what, total, unit)

  def pass_over(self, count: int) -> None:
    """Count so many that were there already."""
    self._done += count
    if not self._bar.disable:
      self._bar.initial += count  # so that they do not count as fast ones
      self._advance(count)

  def add(self, count: int) -> None:
    """Count so many that have just been made."""
    self._done, self._new = self._done + count, self._new + count
    if not self._bar.disable:
      self._advance(count)
      return
    now = time.monotonic()
    if now - self._said < self._every:
      return
    self._said = now
    each = (now - self._begin) / self._new  # of those made here: those passed over took no time
    logging.info(
      "%s %d of %d %s, %s each, %s left",
      *(self._what, self._done, self._total, self._unit),
      *(f"{each:.2f} s" if each >= 0.1 else f"{1000 * each:.2g} ms", duration((self._total - self._done) * each)),
    )

  def _advance(self, count: int) -> None:
    self._bar.update(count)
    if self._done >= self._total:
      self._bar.refresh()  # the last of many in short order would not be seen
      self._bar.close()


def bar(what: str, total: int, unit: str, *, done: int = 0) -> tqdm:
  """Return a bar for work that writes its own log lines, of which `done` were there before. It shows on a terminal."""
  handler = logging.get_absl_handler().python_handler
  if (shows := shows_bars()) and not isinstance(handler.stream, DummyTqdmFile):
    handler.setStream(DummyTqdmFile(handler.stream))  # which writes a line above the bars
  options: Any = dict(leave=False, delay=DELAY, dynamic_ncols=True, disable=not shows)
  return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", **options)


def shows_bars() -> bool:
  """Return whether a person looks: stderr is a terminal, and --quiet was not given."""
  return sys.stderr.isatty() and logging.get_verbosity() >= logging.INFO


def duration(seconds: float) -> str:
  """Say seconds in words: `80 seconds`, `12 minutes`, `2.5 hours`."""
  if seconds < 100:
    return f"{seconds:.0f} seconds"
  return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
