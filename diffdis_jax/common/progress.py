"""Show the progress of long work and the remaining time: a bar on a terminal, or a line now and then in a log.

With --quiet, show neither. No jax, since the processes that prepare data import this file too.
"""

from __future__ import annotations

import io
import sys
from typing import Any

from absl import logging
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

EVERY = 10.0  # seconds between two lines of a log
DELAY = 2.0  # seconds before a bar appears, so that short work has none


class _Log(io.StringIO):
  """Turns a bar's output into lines of the log."""

  def write(self, text: str) -> int:
    if line := text.strip("\r\n "):
      logging.info("%s", line)
    return len(text)


class Progress(tqdm):
  """A progress bar, or, without a terminal, a line in the log now and then with the remaining time.

  Args:
    what: past participle of the work, such as `embedded`.
    total: number of items.
    unit: name of the items, such as `images`.
    done: number of items already done.
    every: seconds between two lines of a log; None if the caller logs its own lines.
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
    """Count newly finished items."""
    ends = bool(self.total) and self.n + count >= self.total
    if ends:  # show the last update, however soon it follows another
      self.miniters = self.mininterval = 0
    self.update(count)
    if ends:
      self.close()
