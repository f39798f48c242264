"""Refuses requests' bodies that are too large, too many at once, or too slow, before the page reads them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


async def refuse(send: Send, status: int, detail: str) -> None:
  """Answers with this status, and the reason as JSON."""
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
    said = dict(scope["headers"]).get(b"content-length", b"0")
    if not said.isdigit() or int(said) > self._limit:
      return await self._refuse_long(send)
    read, started, received, end = 0, False, False, 0.0
    refusal: Callable[[Send], Awaitable[None]] | None = None

    async def limited() -> Message:
      nonlocal read, received, refusal, end
      end = end or time.monotonic() + self._seconds
      try:  # after the body comes, some time, that the client has left
        message = await asyncio.wait_for(receive(), None if received else end - time.monotonic())
      except TimeoutError:
        refusal = self._refuse_slow
        return {"type": "http.disconnect"}
      length = len(message.get("body", b""))
      read += length
      self._receiving += length
      received = not message.get("more_body")
      if read > self._limit:
        refusal = self._refuse_long
      elif self._receiving > self._total:
        refusal = self._refuse_many
      return {"type": "http.disconnect"} if refusal else message

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
      self._receiving -= read
    if refusal and not started:
      await refusal(send)

  async def _refuse_long(self, send: Send) -> None:
    await refuse(send, 413, f"more than {self._limit:,} bytes; the page takes no more at once")

  async def _refuse_slow(self, send: Send) -> None:
    await refuse(send, 408, f"the request did not come within {self._seconds:g} s")

  async def _refuse_many(self, send: Send) -> None:
    await refuse(send, 503, "too much is being uploaded at the moment; try again")
