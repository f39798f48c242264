"""Ends a process that hangs, so that its launcher starts the run again.

A device, a collective with a dead peer or a file system can keep a step waiting for ever, while the process looks alive
from outside.
"""

from __future__ import annotations

import faulthandler
import sys
import threading

from diffdis_jax.common import signals

SECONDS = 1800.0  # a save may wait 1200 s for its storage (checkpoint.SAVE_TIMEOUT), and a program may compile as long
LOOK = 1.0  # seconds between two looks
CODE = 1  # the code of a crash: a launcher starts the run again


class Watchdog:
  """Ends this process with code 1 when `alive` is not called for `seconds`. A context manager.

  Args:
    seconds: the most that one step, one batch of an evaluation or one save may take; 0 watches nothing.
  """

  def __init__(self, seconds: float = SECONDS):
    self._seconds, self._done = seconds, threading.Event()
    self._looks = self._last = 0  # the number of looks, and the one at the last sign of life

  def __enter__(self) -> Watchdog:
    if self._seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()

  def alive(self) -> None:
    """Start the time again: the process has come further."""
    self._last = self._looks

  def _watch(self) -> None:
    # Looks are counted, and not the clock's seconds, which pass also while Ctrl-Z stops the process.
    while not self._done.wait(LOOK):
      self._looks += 1
      if (waited := (self._looks - self._last) * LOOK) > self._seconds:
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.write(f"error: no step for {waited:.0f} s; above is where each thread waits; the process ends\n")
        signals.exit_at_once(CODE)
