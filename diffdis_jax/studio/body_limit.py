"""Refuses a request's body that is too large, before the page reads it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BodyLimit:
  """ASGI middleware that answers 413 to a request with too long a body.

  One that says its length is refused unread; of one that does not, what comes after the limit is not kept.
  """

  def __init__(self, app: App, *, limit: int):
    self._app, self._limit = app, limit

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    said = dict(scope["headers"]).get(b"content-length", b"0")
    if not said.isdigit() or int(said) > self._limit:
      return await self._refuse(send)
    read, started, refused = 0, False, False

    async def limited() -> Message:
      nonlocal read, refused
      message = await receive()
      read += len(message.get("body", b""))
      if read > self._limit:
        refused = True
        return {"type": "http.disconnect"}
      return message

    async def watched(message: Message) -> None:
      nonlocal started
      if not refused:
        started = True
        await send(message)

    try:
      await self._app(scope, limited, watched)
    except Exception:  # what the app says of a body that ends early
      if not refused:
        raise
    if refused and not started:
      await self._refuse(send)

  async def _refuse(self, send: Send) -> None:
    body = f'{{"detail": "more than {self._limit:,} bytes; the page takes no more at once"}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
