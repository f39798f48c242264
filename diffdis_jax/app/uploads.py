"""Where uploads lie: a folder of this page alone, of bounded size, which is gone when the page ends."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

from diffdis_jax.app.body_limit import App, Message, Receive, Send

FOLDER = "GRADIO_TEMP_DIR"  # the variable that tells Gradio
BLOCK = 4096  # bytes that the smallest file takes


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
  """A new folder, in $GRADIO_TEMP_DIR or the system's folder for temporary files, for what is uploaded meanwhile."""
  before = os.environ.get(FOLDER)
  if before:
    os.makedirs(before, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix="diffdis-", dir=before, ignore_cleanup_errors=True) as made:
    os.environ[FOLDER] = made
    try:
      yield pathlib.Path(made)
    finally:
      os.environ.pop(FOLDER)
      if before is not None:
        os.environ[FOLDER] = before


class Quota:
  """ASGI middleware that deletes the oldest files once those of all uploads are too large together.

  What lay in the folder before the first request is the page's own, and stays.
  """

  def __init__(self, app: App, *, folder: pathlib.Path, limit: int, seconds: float):
    """
    Args:
      folder: of the uploads. A file that is being received lies there directly, a whole one in a folder of its own.
      limit: bytes of all of them.
      seconds: for which one may be received.
    """
    self._app, self._folder, self._limit, self._seconds = app, folder, limit, seconds
    self._own = {path for path, _ in _files(folder)}

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    try:
      await self._app(scope, receive, send)
    finally:
      if scope["type"] == "http" and scope["path"].endswith("/upload"):
        self._prune()

  def _prune(self) -> None:
    files = [(path, status) for path, status in _files(self._folder) if path not in self._own]
    total, now = 0, time.time()
    for path, status in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
      total += max(status.st_size, BLOCK)
      being_received = path.parent == self._folder and now - status.st_mtime < self._seconds
      if total > self._limit and not being_received:
        path.unlink(missing_ok=True)
        if path.parent != self._folder:
          with contextlib.suppress(OSError):  # another file lies in it
            path.parent.rmdir()


def _files(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, os.stat_result]]:
  for root, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
        yield (path := pathlib.Path(root, name)), path.lstat()
