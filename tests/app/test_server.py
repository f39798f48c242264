"""Send two hundred hostile requests to the server of the page, without a model behind it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from diffdis_jax.app.__main__ import listen
from tests.served_app import started

pytestmark = pytest.mark.slow

REQUESTS, AT_ONCE = 200, 10
GROWTH = 20  # MB that memory may still grow by after the first quarter of the requests
SERVER = """
import sys
from absl import logging
from diffdis_jax.app.__main__ import listen, uploads

logging.set_verbosity(logging.INFO)
with uploads():
  import gradio as gr
  from diffdis_jax.app import page, server

  server.HEAD_SECONDS = server.BODY_SECONDS = 2.0
  for host in sys.argv[1:]:  # one after the other, each until it is asked to end
    with page.Page(analytics_enabled=False) as blocks:
      gr.Textbox("the page").submit(lambda text: text, api_name="say")
    server.serve(blocks, 0.5, listener=listen(host, 0), host=host, allowed_hosts=["page.example"])
"""
HOST = "127.0.0.1"
EVIL = "http://evil.example"
CALL, JOIN, UPLOAD = "/gradio_api/call/say", "/gradio_api/queue/join", "/gradio_api/upload"
# Each row: headers, path, what is uploaded, and the expected status.
KINDS = (
  ({"host": "evil.example"}, "/config", b"", 400),
  ({"origin": EVIL}, "/config", b"", 403),
  ({"origin": "null"}, CALL, b'{"data": ["a"]}', 403),
  ({"origin": EVIL, "content-type": "text/plain"}, CALL, b'{"data": ["a"]}', 403),
  ({"host": "evil.example:7860", "origin": EVIL + ":7860"}, CALL, b'{"data": ["a"]}', 400),
  ({"origin": EVIL}, UPLOAD, bytes(1000), 403),
  ({}, UPLOAD, bytes(700_000), 413),
  ({}, UPLOAD, b"large", 200),
  ({}, "/gradio_api/file=/etc/passwd", b"", 403),
  ({}, CALL, b"{", 422),
  ({}, JOIN, b'{"data": ["a"], "fn_index": 99, "session_hash": "s"}', 404),
  ({}, CALL, b"leaves", 0),
  ({}, UPLOAD, b"leaves", 0),
  ({"host": "localhost:9999", "origin": "http://localhost:9999"}, "/config", b"", 200),  # as forwarded by ssh -L
  ({"host": "page.example", "origin": "https://page.example"}, "/config", b"", 200),
)


def status(address: str, number: int) -> tuple[int, int]:
  """Return the expected status of a request and the actual one."""
  headers, path, body, expected = KINDS[number % len(KINDS)]
  if body == b"leaves":
    return expected, leave(address, path)
  with httpx.Client(base_url=address, timeout=30, headers=headers) as client:
    if path == UPLOAD:
      data = number.to_bytes(4, "big") * 100_000 if body == b"large" else body
      return expected, client.post(path, files={"files": (f"{number}.png", data)}).status_code
    kind = {"content-type": headers.get("content-type", "application/json")}
    return expected, (client.post(path, content=body, headers=kind) if body else client.get(path)).status_code


def leave(address: str, path: str) -> int:
  """Begin to send a body, then close the connection."""
  place = urlsplit(address)
  with socket.create_connection((place.hostname, place.port), 30) as connection:
    head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 100000\r\n"
    head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    part = 'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    connection.sendall((head + part).encode() + bytes(50_000))
  return 0


def size(folder: pathlib.Path) -> int:
  """Return the total size of a folder's files. The server may still be deleting files of a request that was aborted."""
  total = 0
  for place, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.stat(os.path.join(place, name)).st_size
  return total


def test_hostile_requests_are_refused_and_nothing_of_them_stays(tmp_path):
  with started(["-c", SERVER, HOST], tmp_path / "log", {}) as served:
    every(served.address, range(REQUESTS // 4))
    before = served.memory()
    every(served.address, range(REQUESTS // 4, REQUESTS))
    after = served.memory()
    remaining = size(served.uploads)
  assert after - before < GROWTH, f"{before} MB, then {after} MB"
  assert 0 < remaining
  assert "Traceback" not in served.log.read_text(), served.log.read_text()[-2000:]


def test_it_serves_at_addresses_of_ipv6_and_again_and_ends_by_ctrl_c(tmp_path):
  """SIGTERM ends the first three of four servers, and Ctrl-C the last, after hostile requests."""
  hosts = "::1", "[::1]", "::", HOST
  with started(["-c", SERVER, *hosts], tmp_path / "log", {}, stop=signal.SIGINT) as served:
    for number, host in enumerate(hosts):
      address = served.page(number)
      port = urlsplit(address).port
      assert address == f"http://{host if host == HOST else '[' + host.strip('[]') + ']'}:{port}"
      if host != HOST:
        assert httpx.get(f"http://[::1]:{port}/config").status_code == 200
        os.kill(served.pid, signal.SIGTERM)
    every(address, range(len(KINDS)))
    assert 0 < size(served.uploads)
  assert "Traceback" not in served.log.read_text(), served.log.read_text()[-2000:]


def test_a_browser_that_comes_before_the_server_waits_for_it():
  with contextlib.closing(listen(HOST, 0)) as listener:
    socket.create_connection(listener.getsockname(), 5).close()


def test_a_request_whose_head_or_body_does_not_come_is_cut_off(tmp_path):
  """While some clients hold back their head or body, others get answers; and the message names no path."""
  with started(["-c", SERVER, HOST], tmp_path / "log", {}) as served:
    place = urlsplit(served.address)
    begin = b"GET /config HTTP/1.1\r\nHost: " + place.netloc.encode()
    with contextlib.ExitStack() as stack:
      connect = lambda: stack.enter_context(socket.create_connection((place.hostname, place.port), 30))
      slow, again, body, endless = [connect() for _ in range(240)], connect(), connect(), connect()
      again.sendall(begin + b"\r\n\r\n")
      assert again.recv(12) == b"HTTP/1.1 200"
      again.sendall(begin)  # the beginning of a second request
      for connection in slow:
        connection.sendall(begin)
      post = b"POST /gradio_api/call/say HTTP/1.1\r\nHost: localhost\r\n"
      body.sendall(post + b"Content-Length: 9\r\n\r\n")
      with contextlib.suppress(ConnectionError):  # the server closes after 600 kB
        endless.sendall(post + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(9):
          endless.sendall(b"20000\r\n" + bytes(2**17) + b"\r\n")
      assert httpx.get(f"{served.address}/config").status_code == 200
      assert {connection.recv(1) for connection in slow} == {b""}, "the server closes them"
      while again.recv(65536):
        pass
      assert body.recv(1) == b""
      with contextlib.suppress(ConnectionResetError):
        assert endless.recv(1) == b""
    assert httpx.get(f"{served.address}/config").status_code == 200
  assert "Traceback" not in served.log.read_text(), served.log.read_text()[-2000:]


def every(address: str, numbers: range) -> None:
  """Check that each of these requests gets its expected status."""
  with ThreadPoolExecutor(AT_ONCE) as pool:
    statuses = list(pool.map(lambda number: status(address, number), numbers))
  assert [pair for pair in statuses if pair[0] != pair[1]] == [] and len(statuses) == len(numbers)
