from __future__ import annotations

import asyncio

from diffdis_jax.studio.body_limit import BodyLimit


def ask(body: list[bytes], *, limit: int, length: bytes | None = None, kind: str = "http") -> tuple[list, list]:
  """What the client gets, and the parts of the body that the application has read."""
  sent, read, parts = [], [], iter(body)

  async def app(scope, receive, send):
    while part := (await receive()).get("body"):
      read.append(part)
    await send({"type": "http.response.start", "status": 200, "headers": []})

  async def receive():
    return {"type": "http.request", "body": next(parts, b"")}

  async def send(message):
    sent.append(message)

  headers = [] if length is None else [(b"content-length", length)]
  asyncio.run(BodyLimit(app, limit=limit)({"type": kind, "headers": headers}, receive, send))
  return sent, read


def test_a_body_within_the_limit_is_read():
  sent, read = ask([b"12345", b"67890"], limit=10, length=b"10")
  assert sent[0]["status"] == 200 and read == [b"12345", b"67890"]


def test_a_body_that_says_that_it_is_longer_is_not_read():
  for length in (b"11", b"much", b"-1"):
    sent, read = ask([b"12345"], limit=10, length=length)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 413 and not read and b"more than 10 bytes" in sent[1]["body"]


def test_a_body_that_does_not_say_so_is_read_to_the_limit_alone():
  sent, read = ask([b"12345", b"67890", b"1", b"2"], limit=10)
  assert sent[0]["status"] == 413 and read == [b"12345", b"67890"]


def test_what_is_no_request_passes():
  sent, read = ask([b"x" * 100], limit=10, kind="websocket")
  assert sent[0]["status"] == 200 and read == [b"x" * 100]
