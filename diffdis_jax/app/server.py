"""Serve the page until it is asked to end; decide which clients get an answer, and how much they may send."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import re
import signal
import socket
from collections.abc import Sequence
from typing import Any

import fastapi
import gradio as gr
import h11
import uvicorn
from absl import logging
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffdis_jax.app import page

AROUND = 100_000  # bytes of a form around the file in it
HEAD_SECONDS = 10.0  # time limit for the head of a request
BODY_SECONDS = 120.0  # time limit for the body of a request
CONNECTIONS = 256  # limit on open connections; further ones get status 503
LOCAL = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")


class KnownHost(TrustedHostMiddleware):
  """Starlette's middleware, which also accepts any numeric address when the page listens at all addresses."""

  def __init__(self, app: ASGIApp, *, host: str, names: Sequence[str]):
    self._everywhere = host in ("", "0.0.0.0", "::")
    own = (socket.gethostname(), socket.getfqdn()) if self._everywhere else (bracketed(host),)
    super().__init__(app, allowed_hosts=[*LOCAL, *own, *map(bracketed, names)], www_redirect=False)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    host = _PORT.sub("", Headers(scope=scope).get("host", "")) if "headers" in scope else ""
    is_address = self._everywhere and _is_address(host.strip("[]"))
    await (self.app if is_address else super().__call__)(scope, receive, send)


class OwnOrigin:
  """ASGI middleware that refuses requests from other sites, and requests that are too long.

  Args:
    names: host names of a server in front of the page, which passes on the browser's Origin.
    limit: largest number of bytes of a body.
  """

  def __init__(self, app: ASGIApp, *, names: Sequence[str], limit: int):
    self._app, self._limit, self._names = app, limit, {bracketed(name).lower() for name in names}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    headers = Headers(scope=scope) if "headers" in scope else Headers({})
    answer: ASGIApp = self._app
    for origin in headers.getlist("origin"):
      # With its port: another port of this machine is another site.
      site = origin.lower().partition("://")[2]
      if site != headers.get("host", "").lower() and _PORT.sub("", site) not in self._names:
        answer = JSONResponse({"detail": "the page answers no other site"}, 403)
    if int(headers.get("content-length", "0")) > self._limit:
      answer = JSONResponse({"detail": f"the page takes {self._limit:,} bytes at once"}, 413, {"connection": "close"})
    await answer(scope, receive, send)


class Impatient(H11Protocol):
  """Uvicorn's protocol, but it closes a connection whose request is too slow or longer than `limit`."""

  _timer: asyncio.TimerHandle | None = None
  _read = 0

  def __init__(self, *args: Any, limit: int, **how: Any):
    super().__init__(*args, **how)
    self._limit = limit

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._close_after(HEAD_SECONDS)

  def data_received(self, data: bytes) -> None:
    before = self.conn.their_state
    super().data_received(data)
    state = self.conn.their_state
    self._read = self._read + len(data) if state is h11.SEND_BODY else 0
    if self._read > self._limit:
      self.transport.close()
    elif state not in (h11.IDLE, h11.SEND_BODY):  # the whole request has arrived
      self._close_after(None)
    elif self._timer is None or state is not before:  # the beginning of another request, or of a body
      self._close_after(HEAD_SECONDS if state is h11.IDLE else BODY_SECONDS)

  def connection_lost(self, exc: Exception | None) -> None:
    self._close_after(None)
    super().connection_lost(exc)

  def _close_after(self, seconds: float | None) -> None:
    if self._timer is not None:
      self._timer.cancel()
    self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.close)


async def _unknown(request: fastapi.Request, error: Exception) -> JSONResponse:
  """Answer a request for a function or session that the page does not have, or of a client that has left."""
  del request
  return JSONResponse({"detail": f"the page has no {error}"}, 404)


def application(blocks: gr.Blocks, upload: int, *, host: str, allowed_hosts: Sequence[str] = ()) -> fastapi.FastAPI:
  """Return the page behind both middlewares, as an ASGI application. `upload` is the largest file size in bytes."""
  # The first one is called first: a foreign request is refused before its body is read.
  middleware = [
    Middleware(KnownHost, host=host, names=allowed_hosts),
    Middleware(OwnOrigin, names=allowed_hosts, limit=upload + AROUND),
  ]
  handlers: Any = {KeyError: _unknown, ClientDisconnect: _unknown}
  app = fastapi.FastAPI(middleware=middleware, openapi_url=None, exception_handlers=handlers)
  # By default Gradio would keep 10,000 sessions, and each takes memory.
  blocks.state_session_capacity = 2 * page.WAITING
  return gr.mount_gradio_app(
    app,
    blocks,
    path="/",
    max_file_size=upload,
    footer_links=[],
    # By default Gradio stores requests in the browser, where they outlive the page.
    run_history=False,
    # Rendering on the server would start a second server, of Node.
    ssr_mode=False,
    theme=page.theme(),
    css=page.CSS,
    app_kwargs={"exception_handlers": handlers},
  )


def serve(
  blocks: gr.Blocks, upload_mb: float, *, listener: socket.socket, host: str, allowed_hosts: Sequence[str] = ()
) -> None:
  """Serve until SIGINT or SIGTERM, at an open port of the host."""
  upload = int(upload_mb * 1e6)
  app = application(blocks, upload, host=host.strip("[]"), allowed_hosts=allowed_hosts)
  protocol: Any = functools.partial(Impatient, limit=upload + AROUND)
  how: Any = dict(log_level="error", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=5)
  server = uvicorn.Server(uvicorn.Config(app, http=protocol, **how))
  name = bracketed(host) or "localhost"
  logging.info("the page is at http://%s:%d; Ctrl-C ends it", name, listener.getsockname()[1])
  # Uvicorn ends at either signal, and raises it again afterwards.
  before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    server.run(sockets=[listener])
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def bracketed(name: str) -> str:
  """Write an IPv6 address with brackets, as in a request's Host header."""
  return f"[{name.strip('[]')}]" if ":" in name else name


def _is_address(name: str) -> bool:
  with contextlib.suppress(ValueError):
    return bool(ipaddress.ip_address(name))
  return False
