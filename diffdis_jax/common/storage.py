"""Storage that wavers: what cannot be read now is tried again, with growing pauses, before it ends a run.

gcsfs and TensorStore do so by themselves for each request, for half a minute and longer. This is for whole reads, from
a disk or a bucket.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from absl import logging

from diffdis_jax.common import buckets
from diffdis_jax.errors import Gone, may_pass

PATIENCE = 300.0  # seconds, of pauses
PAUSE, LONGEST = 1.0, 30.0  # seconds, the first pause, and the longest: each is twice the one before
# How ArrayRecord words what a system call answered: "open() failed: No such file or directory; opening FILE".
_OF_A_CALL = re.compile(r"\b\w+\(\) failed: ")
_Read = TypeVar("_Read")
_told: dict[str, float] = {}  # what was said to be away, and when


class Away(OSError):
  """Storage that did not come back. Verbs exit with code 1, on which launchers start them again."""


def patiently(read: Callable[[], _Read], what: str) -> _Read:
  """Call `read` until it raises nothing that may pass, and return what it returns.

  Args:
    read: may be called again.
    what: is read, for the log.

  Raises:
    Away: it has failed for PATIENCE seconds.
  """
  waited, pause = 0.0, PAUSE
  while True:
    try:
      found = read()
      break
    except Exception as error:
      # A 403 too, since this is no first access: a server that has answered before may refuse for a while.
      if not may_pass(error) and not _is_forbidden(error):
        raise
      said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
      if waited >= PATIENCE:
        raise Away(f"{what} could not be read for {waited:.0f} s: {said}") from error
    this = min(pause, PATIENCE - waited)
    now, message = time.monotonic(), f"cannot read {what}: {said}"
    if now - _told.get(message, -this) >= this:  # once, where many threads wait for the same
      _told[message] = now
      logging.warning("%s; trying again in %.3g s", message, this)
    _rest(this)
    waited, pause = waited + this, min(2 * pause, LONGEST)
  if waited:
    logging.warning("%s can be read again, after %.0f s", what, waited)
  return found


def _is_forbidden(error: Exception) -> bool:
  """Tell gcsfs's and TensorStore's error for a 403, which has no class of its own."""
  return isinstance(error, (OSError, ValueError)) and bool(
    re.search(r"^Forbidden: |HTTP response code: 403", str(error))
  )


def _rest(seconds: float) -> None:
  """Sleep, but no longer than the program runs, which waits for its loader's threads at its end."""
  end = time.monotonic() + seconds
  while (left := end - time.monotonic()) > 0:
    # While it waits for the threads of a pool, as the loader's are, the main thread still counts as alive.
    if not threading.main_thread().is_alive() or getattr(threading, "_SHUTTING_DOWN", False):
      raise Away("the program ends")
    time.sleep(min(left, 0.5))


def away(error: Exception, files: Iterable[str | os.PathLike[str]]) -> Exception | None:
  """Turn what a reader of these files has raised into an error that may pass; None where it is not storage's."""
  if may_pass(error):
    return error
  for file in files:
    if not buckets.path(file).exists():
      return Gone(f"{file} is not there")
  return Gone(" ".join(str(error).split())) if _OF_A_CALL.search(str(error)) else None
