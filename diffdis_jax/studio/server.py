"""Serves the page on this machine: refuses bodies that are too large before they are read, and ends when asked to."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from types import FrameType
from typing import Any

import gradio as gr
from absl import logging
from starlette.middleware import Middleware

from diffdis_jax.errors import UserError
from diffdis_jax.studio import page
from diffdis_jax.studio.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
AROUND = 100_000  # bytes of a form around the file in it


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


def serve(blocks: gr.Blocks, limits: Limits, *, host: str, port: int) -> None:
  """Serves until SIGINT or SIGTERM.

  Args:
    blocks: the page, with its queue.
    limits: of uploads.
    host: address to listen at.
    port: 0 for any that is free.

  Raises:
    UserError: nobody can listen there.
  """
  stop = threading.Event()

  def asked(number: int, frame: FrameType | None) -> None:
    del number, frame
    stop.set()

  before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
  upload = int(limits.upload_mb * 1e6)
  try:
    _, address, _ = blocks.launch(
      server_name=host,
      server_port=port or _free_port(host),
      prevent_thread_lock=True,
      quiet=True,
      share=False,
      ssr_mode=False,
      max_file_size=upload,
      footer_links=[],
      theme=page.theme(),
      css=page.CSS,
      app_kwargs={"middleware": [Middleware(BodyLimit, limit=upload + AROUND)]},
    )
    logging.info("the page is at %s; Ctrl-C ends it", address)
    stop.wait()
  except OSError as error:
    raise UserError(f"cannot listen at {host}, port {port}: {error}; take another --port or --host") from error
  finally:
    blocks.close(verbose=False)
    for number, handler in before.items():
      signal.signal(number, handler)


def _free_port(host: str) -> int:
  with socket.create_server((host, 0)) as server:
    return server.getsockname()[1]
