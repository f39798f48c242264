"""Retry reads from storage that may fail for a while, with growing pauses, before a run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from diffdis_jax.errors import may_pass

PATIENCE = 300.0  # seconds of pauses in all
PAUSE, LONGEST = 1.0, 10.0  # seconds: the first pause and the longest; each pause is twice the previous one
_Read = TypeVar("_Read")


class Away(OSError):
  """Storage that did not come back. Commands exit with code 1, and launchers start them again."""


def patiently(read: Callable[[], _Read], what: str) -> _Read:
  """Call `read` until it raises no error that may pass, and return its result. `what` names the data in the log. Raise
  Away after PATIENCE seconds."""
  waited, pause = 0.0, PAUSE
  while True:
    try:
      return read()
    except Exception as error:
      if not may_pass(error):
        raise
      reason = getattr(error, "strerror", None) or error
      if waited >= PATIENCE:
        raise Away(f"{what} could not be read for {waited:.0f} s: {reason}") from error
      logging.warning("cannot read %s: %s; trying again in %.3g s", what, reason, pause)
    time.sleep(pause)
    waited, pause = waited + pause, min(2 * pause, LONGEST)
