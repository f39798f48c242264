"""Serves the page until it is asked to end: whom it answers, and how much it lets be sent."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

import fastapi
import gradio as gr
import h11
import uvicorn
from absl import logging
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffdis_jax.app import page
from diffdis_jax.app.limits import Limits, is_address

AROUND = 100_000  # bytes of a form around the file in it
HEAD_SECONDS = 10.0  # within which the head of a request must come
CONNECTIONS = 256  # open at a time; further ones get status 503
LOCAL = ("localhost", "127.0.0.1", "[::1]")
ORIGIN = re.compile(r"https?://(?P<host>(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d+)?)")


class KnownHost(TrustedHostMiddleware):
  """Starlette's middleware, which takes any address where the page listens at all: no site can rebind one."""

  def __init__(self, app: ASGIApp, *, host: str, names: Sequence[str]):
    self._everywhere = host in ("", "0.0.0.0", "::")
    own = (socket.gethostname(), socket.getfqdn()) if self._everywhere else (bracketed(host),)
    super().__init__(app, allowed_hosts=[*LOCAL, *own, *map(bracketed, names)], www_redirect=False)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] in ("http", "websocket") and self._everywhere:
      host = Headers(scope=scope).get("host", "")
      if is_address(re.sub(r":\d+$", "", host).strip("[]") if host.startswith("[") else host.split(":")[0]):
        return await self.app(scope, receive, send)
    await super().__call__(scope, receive, send)


class Walls:
  """ASGI middleware that refuses a foreign Origin, and a body that is too long or too slow."""

  def __init__(self, app: ASGIApp, *, names: Sequence[str], limit: int, seconds: float):
    """
    Args:
      names: by which a server in front of the page is asked for; it hands on the browser's Origin.
      limit: bytes of a body.
      seconds: for which one may take.
    """
    self._app, self._names = app, {bracketed(name).lower() for name in names}
    self._limit, self._seconds = limit, seconds

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] not in ("http", "websocket"):
      return await self._app(scope, receive, send)
    headers = Headers(scope=scope)
    if any(self._is_foreign(origin.lower(), headers.get("host", "").lower()) for origin in headers.getlist("origin")):
      return await JSONResponse({"detail": "the page answers no other site"}, 403)(scope, receive, send)
    too_long = f"more than {self._limit:,} bytes; the page takes no more at once"
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > self._limit:
      return await JSONResponse({"detail": too_long}, 413, {"connection": "close"})(scope, receive, send)
    read, complete, end = 0, False, time.monotonic() + self._seconds

    async def limited() -> Message:
      nonlocal read, complete
      try:  # after the body comes, some time, that the client has left
        message = await asyncio.wait_for(receive(), None if complete else end - time.monotonic())
      except TimeoutError as error:
        raise HTTPException(408, "the request takes too long", {"connection": "close"}) from error
      read, complete = read + len(message.get("body", b"")), not message.get("more_body")
      if read > self._limit:
        raise HTTPException(413, too_long, {"connection": "close"})
      return message

    await self._app(scope, limited, send)

  def _is_foreign(self, origin: str, host: str) -> bool:
    site = ORIGIN.fullmatch(origin)
    # With its port: another port of this machine is another site.
    return site is None or (site["host"] != host and site["name"] not in self._names)


class Impatient(H11Protocol):
  """Uvicorn's protocol, which closes a connection where the head of a request does not come in HEAD_SECONDS."""

  _timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._timer = self.loop.call_later(HEAD_SECONDS, transport.close)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.conn.their_state is not h11.IDLE:
      self._cancel()
    elif self._timer is None and not self.transport.is_closing():  # the beginning of another request
      self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

  def connection_lost(self, exc: Exception | None) -> None:
    self._cancel()
    super().connection_lost(exc)

  def _cancel(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None


async def _left(request: fastapi.Request, error: Exception) -> Response:
  """Answer nobody: the client has left while its body was read."""
  del request, error
  return Response(status_code=400)


async def _unknown(request: fastapi.Request, error: Exception) -> JSONResponse:
  """Answer for a function, a session or a component that the page does not have, which Gradio looks up in a dict."""
  del request
  return JSONResponse({"detail": f"the page has no {error}"}, 404)


def application(blocks: gr.Blocks, limits: Limits, *, host: str, allowed_hosts: Sequence[str] = ()) -> fastapi.FastAPI:
  """Return the page with its walls, as an ASGI application."""
  upload = int(limits.upload_mb * 1e6)
  # The first one is asked first: a foreign request is refused before its body is read.
  middleware = [
    Middleware(KnownHost, host=host, names=allowed_hosts),
    Middleware(Walls, names=allowed_hosts, limit=upload + AROUND, seconds=limits.seconds),
  ]
  handlers: Any = {KeyError: _unknown, ClientDisconnect: _left}
  app = fastapi.FastAPI(middleware=middleware, openapi_url=None, exception_handlers=handlers)
  # Gradio would keep 10,000 sessions, and each takes memory.
  blocks.state_session_capacity = 2 * limits.waiting
  return gr.mount_gradio_app(
    app,
    blocks,
    path="/",
    max_file_size=upload,
    footer_links=[],
    # Else Gradio keeps a record of what was asked in the browser, which outlives the page.
    run_history=False,
    # Rendering on the server would start a second one, of Node.
    ssr_mode=False,
    theme=page.theme(),
    css=page.CSS,
    app_kwargs={"exception_handlers": handlers},
  )


def serve(
  blocks: gr.Blocks, limits: Limits, *, listener: socket.socket, host: str, allowed_hosts: Sequence[str] = ()
) -> None:
  """Serve until SIGINT or SIGTERM.

  Args:
    blocks: the page, with its queue.
    limits: of uploads.
    listener: where to listen, as `limits.listen` gives it; closed at the end.
    host: address that it was given.
    allowed_hosts: names by which the page is asked for, beside its address.
  """
  app = application(blocks, limits, host=host.strip("[]"), allowed_hosts=allowed_hosts)
  config = uvicorn.Config(
    app, http=Impatient, log_level="error", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=5
  )
  server = uvicorn.Server(config)
  listener.listen(CONNECTIONS)
  name = f"[{host.strip('[]')}]" if ":" in host else host or "localhost"
  logging.info("the page is at http://%s:%d; Ctrl-C ends it", name, listener.getsockname()[1])
  # Uvicorn ends at either signal, and raises it again afterwards.
  before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    server.run(sockets=[listener])
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def bracketed(name: str) -> str:
  """Write an address of IPv6 as a request's Host has it."""
  return f"[{name.strip('[]')}]" if ":" in name else name
