"""A proxy before a server of a bucket, which answers 503 or slowly while it is told to."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import pathlib
import threading
import time
from collections.abc import Iterator

from tests import bucket_server

_OF_A_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Proxy(http.server.ThreadingHTTPServer):
  """Sets how it answers from now on.

  Attributes:
    address: its own, as clients type it.
    refuses: whether every answer is 503.
    delay: seconds before each answer.
    refused, delayed: answers so far.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, port: int, behind: int):
    super().__init__(("127.0.0.1", port), _Handler)
    self.address, self.behind = f"http://127.0.0.1:{port}", behind
    self.refuses, self.delay = False, 0.0
    self.refused = self.delayed = 0


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Proxy

  def _answer(self) -> None:
    body = self._body()
    if self.server.delay:
      time.sleep(self.server.delay)
      self.server.delayed += 1
    if self.server.refuses:
      self.server.refused += 1
      self._send(503, [], b"")
      return
    behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
    try:
      headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_A_HOP}
      behind.request(self.command, self.path, body, headers)  # `Host` too, by which the server answers
      found = behind.getresponse()
      kept = [(name, value) for name, value in found.getheaders() if name.lower() not in _OF_A_HOP]
      self._send(found.status, kept, found.read())
    finally:
      behind.close()

  do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer  # noqa: N815

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    parts = []
    while size := int(self.rfile.readline().split(b";")[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
    self.send_response(status)
    for name, value in headers:
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def log_message(self, *_: object) -> None:
    pass


@contextlib.contextmanager
def serving(root: pathlib.Path) -> Iterator[Proxy]:
  """A proxy before a server whose buckets are the folders in `root`."""
  port, behind = bucket_server.free_port(), bucket_server.free_port()
  with bucket_server.serving(root, behind, public=port), Proxy(port, behind) as proxy:
    threading.Thread(target=proxy.serve_forever, name="proxy", daemon=True).start()
    try:
      yield proxy
    finally:
      proxy.shutdown()
