"""Lines that say how far a long piece of work is, and how long the rest will take."""

from __future__ import annotations

import time

from absl import logging

EVERY = 10.0  # seconds between two lines


class Progress:
  """A line now and then, with what is left.

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

  def pass_over(self, count: int) -> None:
    """So many that were there already."""
    self._done += count

  def add(self, count: int) -> None:
    """So many that have just been made."""
    self._done, self._new = self._done + count, self._new + count
    now = time.monotonic()
    if now - self._said < self._every:
      return
    self._said = now
    each = (now - self._begin) / self._new
    logging.info(
      "%s %d of %d %s, %s each, %s left",
      *(self._what, self._done, self._total, self._unit),
      *(f"{each:.2f} s" if each >= 0.1 else f"{1000 * each:.2g} ms", _duration((self._total - self._done) * each)),
    )


def _duration(seconds: float) -> str:
  if seconds < 100:
    return f"{seconds:.0f} seconds"
  return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
