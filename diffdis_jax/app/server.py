"""Serves the page until it is asked to end: whom it answers, and how much it lets be sent."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Sequence
from typing import Any

import fastapi
import gradio as gr
import uvicorn
from absl import logging
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from diffdis_jax.app import page

UPLOAD = 10_000_000  # bytes of the largest file
AROUND = 100_000  # bytes of a form around the file in it
CONNECTIONS = 256  # open at a time; further ones get status 503
LOCAL = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")


class OwnOrigin:
  """ASGI middleware that refuses requests from another site, long ones, and those that do not state their length.

  Args:
    names: by which a server in front of the page is asked for; it hands on the browser's Origin.
    limit: bytes of a body.
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
    if "transfer-encoding" in headers:  # which browsers never send
      answer = JSONResponse({"detail": "a request states the length of its body"}, 411, {"connection": "close"})
    if int(headers.get("content-length", "0")) > self._limit:
      answer = JSONResponse({"detail": f"the page takes {self._limit:,} bytes at once"}, 413, {"connection": "close"})
    await answer(scope, receive, send)


async def _unknown(request: fastapi.Request, error: Exception) -> JSONResponse:
  """Answer for a function or a session that the page does not have, and for a client that has left meanwhile."""
  del request
  return JSONResponse({"detail": f"the page has no {error}"}, 404)


def known_hosts(host: str, names: Sequence[str]) -> list[str]:
  """Return the names by which the page may be asked for: no other site can rebind its own name to this machine."""
  own = (socket.gethostname(), socket.getfqdn()) if host in ("", "0.0.0.0", "::") else (bracketed(host),)
  return [*LOCAL, *own, *map(bracketed, names)]


def application(blocks: gr.Blocks, *, host: str, allowed_hosts: Sequence[str]) -> fastapi.FastAPI:
  """Return the page behind both middlewares, as an ASGI application."""
  # The first one is asked first: a foreign request is refused before its body is read.
  middleware = [
    Middleware(TrustedHostMiddleware, allowed_hosts=known_hosts(host, allowed_hosts), www_redirect=False),
    Middleware(OwnOrigin, names=allowed_hosts, limit=UPLOAD + AROUND),
  ]
  handlers: Any = {KeyError: _unknown, ClientDisconnect: _unknown}
  app = fastapi.FastAPI(middleware=middleware, openapi_url=None, exception_handlers=handlers)
  return gr.mount_gradio_app(
    app,
    blocks,
    path="/",
    max_file_size=UPLOAD,
    footer_links=[],
    # Else Gradio keeps a record of what was asked in the browser, which outlives the page.
    run_history=False,
    # Rendering on the server would start a second one, of Node.
    ssr_mode=False,
    theme=page.theme(),
    css=page.CSS,
    app_kwargs={"exception_handlers": handlers},
  )


def serve(blocks: gr.Blocks, *, listener: socket.socket, host: str, allowed_hosts: Sequence[str] = ()) -> None:
  """Serve until SIGINT or SIGTERM, at an open port of the host."""
  app = application(blocks, host=host.strip("[]"), allowed_hosts=allowed_hosts)
  how: Any = dict(log_level="error", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=5)
  server = uvicorn.Server(uvicorn.Config(app, **how))
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
  """Write an address of IPv6 as a request's Host has it."""
  return f"[{name.strip('[]')}]" if ":" in name else name
