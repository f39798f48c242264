"""What requests may send, and where uploads lie: a folder of this page alone, of bounded size, which ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from diffdis_jax.common import files

FOLDER = "GRADIO_TEMP_DIR"  # the variable that tells Gradio
BEGIN = "diffdis-page"  # of a folder's name
BLOCK = 4096  # bytes that the smallest file takes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


async def refuse(send: Send, status: int, detail: str) -> None:
  """Answers with this status, and the reason as JSON."""
  # Closed: the rest of an unread body would be taken for the next request.
  headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
  await send({"type": "http.response.start", "status": status, "headers": headers})
  await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})


class BodyLimit:
  """ASGI middleware that answers 413 to a request with too long a body, 503 while all send too much, 408 to a slow one.

  A body that says its length is refused unread; of one that does not, what comes after the limit is not kept. A client
  that leaves meanwhile is no error.
  """

  def __init__(self, app: App, *, limit: int, total: int, seconds: float):
    """
    Args:
      limit: bytes of a body.
      total: of the bodies that are being received.
      seconds: for which one may take.
    """
    self._app, self._limit, self._total, self._seconds = app, limit, total, seconds
    self._receiving = 0  # bytes

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    too_long = 413, f"more than {self._limit:,} bytes; the page takes no more at once"
    said = dict(scope["headers"]).get(b"content-length", b"0")
    # A word is no number to int(), and -1 would pass as below the limit.
    if not said.isdigit() or int(said) > self._limit:
      return await refuse(send, *too_long)
    read, started, received, end = 0, False, False, 0.0
    refusal: tuple[int, str] | None = None

    async def limited() -> Message:
      nonlocal read, received, refusal, end
      end = end or time.monotonic() + self._seconds
      try:  # after the body comes, some time, that the client has left
        message = await asyncio.wait_for(receive(), None if received else end - time.monotonic())
      except TimeoutError:
        refusal = 408, f"the request did not come within {self._seconds:g} s"
        return {"type": "http.disconnect"}
      length = len(message.get("body", b""))
      read += length
      self._receiving += length
      received = not message.get("more_body")
      if read > self._limit:
        refusal = too_long
      elif self._receiving > self._total:
        refusal = 503, "too much is being uploaded at the moment; try again"
      # As if the client had left: whoever reads the body stops, and frees what it holds.
      return {"type": "http.disconnect"} if refusal else message

    # A request has one answer: what the app says of a body that was broken off is held back.
    async def watched(message: Message) -> None:
      nonlocal started
      if not refusal:
        started = True
        await send(message)

    try:
      await self._app(scope, limited, watched)
    except ClientDisconnect:  # nobody is there to be answered
      pass
    except Exception:  # what the app says of a body that ends early
      if not refusal:
        raise
    finally:
      # However it ended: else the total would fill up for good.
      self._receiving -= read
    if refusal and not started:
      await refuse(send, *refusal)


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
  """A new folder, in $GRADIO_TEMP_DIR or the system's folder for temporary files, for what is uploaded meanwhile.

  What a killed page has left there is removed.
  """
  before = os.environ.get(FOLDER)
  if before:
    os.makedirs(before, exist_ok=True)
  # Requests may still write into it while the page ends.
  with files.temporary_folder(BEGIN, before or None) as made:
    os.environ[FOLDER] = os.fspath(made)
    try:
      yield made
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
      # After a failed upload too, whose part lies there.
      if scope["type"] == "http" and scope["path"].endswith("/upload"):
        self._prune()

  def _prune(self) -> None:
    files = [(path, status) for path, status in _files(self._folder) if path not in self._own]
    total, now = 0, time.time()
    # From the newest on, so that the oldest are beyond the limit.
    for path, status in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
      # By what it takes on the disk: else empty files could fill it without end.
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
