"""Errors as a user sees them, and which errors of storage may pass. No jax, so that data workers may import it."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

PREEMPTED = 75  # EX_TEMPFAIL: launchers start the same command again
INTERRUPTED = 130  # 128 + SIGINT, as shells say it: launchers do not
TERMINATED = 143  # 128 + SIGTERM, of a command that had nothing to save
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
# Errors of a network, of a server at its other end, or of a disk.
_OF_STORAGE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ETIMEDOUT}
_OF_STORAGE |= {errno.EIO, errno.ESTALE, errno.ENOTCONN}
_NETWORKING = ("aiohttp.", "gcsfs.", "google.auth.", "requests.")  # packages whose errors are all of a network


class UserError(Exception):
  """Bad input. Its message is one line: what is wrong, and what would be right. Commands exit with `code`."""

  code = 2


class Preempted(Exception):
  """The run was asked to stop, and has saved. Commands exit with `code`, on which launchers start them again."""

  code = PREEMPTED


class Interrupted(Preempted):
  """The run was stopped by Ctrl-C, and has saved. Nothing starts it again."""

  code = INTERRUPTED


class Gone(OSError):
  """A file that was there is absent now; it may come back."""


class Diverged(Exception):
  """Too many steps in a row were not finite. Commands exit with `code`, on which launchers resume the run."""

  code = 1

  def __init__(self, step: int, count: int, saved: int | None):
    what = f"the last {count} steps up to {step} changed nothing, since loss or gradient was not finite"
    mend = "lower optim.rates, or set optim.clip_norm or model.dtype='float32', in a new workdir"
    super().__init__(f"{what}; the last checkpoint is {'none' if saved is None else saved}; {mend}")


def install(extra: str) -> str:
  """Say how to get the packages of an extra of pyproject.toml. The project itself is on no package index."""
  return f"pip install -e '.[{extra}]' in the repository's folder"


def not_installed(who: str, package: str, extra: str) -> UserError:
  """Return the error for a missing package of an extra."""
  return UserError(f"{who} needs {package}, which is not installed; {install(extra)}")


def may_pass(error: BaseException) -> bool:
  """Say whether an error is of a network, a server or a disk that may be reached the next time."""
  known = isinstance(error, (ConnectionError, TimeoutError, Gone)) or getattr(error, "errno", None) in _OF_STORAGE
  return known or type(error).__module__.startswith(_NETWORKING)


def full_disk(error: BaseException | None) -> int | None:
  """Return which number of FULL_DISK a library's error quotes; None if it quotes none."""
  return next((number for number in FULL_DISK if os.strerror(number) in str(error)), None)


def parse_json(text: str | bytes, name: str) -> Any:
  """Return the value of JSON text. Raise UserError, with the text's `name`, where it is no JSON."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:  # the latter of a text that is nested too deep
    raise UserError(f"{name} is not JSON: {error}") from error
