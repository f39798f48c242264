"""Progress of long work, and the time that is left: a bar on a terminal, a line now and then in a log.

With --quiet neither. No jax, since the processes that prepare data import this file too.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from absl import logging
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

EVERY = 10.0  # seconds between two lines of a log
DELAY = 2.0  # seconds after which a bar shows: what takes less has none


class _Log(io.StringIO):
  """Turn what a bar writes into lines of the log."""

  def write(self, text: str) -> int:
    if line := text.strip("\r\n "):
      logging.info("%s", line)
    return len(text)


class Progress(tqdm):
  """A bar that ends when all is done; where there is no terminal, a line now and then, with the time that is left.

  Args:
    what: is done, such as `embedded`.
    total: how many there are.
    unit: what they are, such as `images`.
    done: how many are there already.
    every: seconds between two lines of a log; None for no line, where the caller logs lines of its own.
  """

  monitor_interval = 0  # no thread of tqdm's

  def __init__(self, what: str, total: int, unit: str, *, done: int = 0, every: float | None = EVERY):
    shows, handler = sys.stderr.isatty(), logging.get_absl_handler().python_handler
    options: dict[str, Any] = dict(total=total, initial=done, desc=what, unit=f" {unit}", leave=False, delay=DELAY)
    if not shows:
      form = "{desc} {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left"
      options |= dict(file=_Log(), bar_format=form, mininterval=every or 0, miniters=1, delay=every or 0)
    elif not isinstance(handler.stream, DummyTqdmFile):
      handler.setStream(DummyTqdmFile(handler.stream))  # which writes a line above the bars
    is_quiet = logging.get_verbosity() < logging.INFO
    super().__init__(dynamic_ncols=True, disable=is_quiet or not (shows or every is not None), **options)

  def add(self, count: int = 1) -> None:
    """Count so many that have just been made."""
    ends = bool(self.total) and self.n + count >= self.total
    if ends:  # the last update is shown, however soon it follows another
      self.miniters = self.mininterval = 0
    self.update(count)
    if ends:
      self.close()
