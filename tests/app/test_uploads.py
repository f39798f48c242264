"""What requests may send; the folder of uploads: its size, and that it goes."""

from __future__ import annotations

import asyncio
import os
import pathlib
import time

import pytest
from starlette.requests import Request

from diffdis_jax.app import uploads
from diffdis_jax.app.uploads import BodyLimit


def size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_folder_is_there_for_a_while(tmp_path, monkeypatch):
  monkeypatch.setenv(uploads.FOLDER, str(tmp_path / "given"))
  with pytest.raises(KeyboardInterrupt), uploads.folder() as folder:
    assert folder.parent == tmp_path / "given" and os.environ[uploads.FOLDER] == str(folder)
    (folder / "hash").mkdir()
    (folder / "hash" / "a.png").write_bytes(b"a")
    raise KeyboardInterrupt
  assert os.listdir(tmp_path / "given") == [] and os.environ[uploads.FOLDER] == str(tmp_path / "given")
  monkeypatch.delenv(uploads.FOLDER)
  with uploads.folder() as folder:
    assert folder.is_dir()
  assert not folder.exists() and uploads.FOLDER not in os.environ


def test_the_oldest_uploads_are_deleted_and_the_pages_own_files_stay(tmp_path):
  (tmp_path / "own").mkdir()
  (tmp_path / "own" / "pick.png").write_bytes(bytes(50_000))
  number = 0

  async def app(scope, receive, send):
    folder = tmp_path / f"hash{number}"
    folder.mkdir()
    (folder / "a.png").write_bytes(bytes(10_000))
    os.utime(folder / "a.png", (now := time.time() - 1000 + number, now))
    if number == 3:
      raise ValueError("after the upload")

  async def upload() -> None:
    await quota({"type": "http", "method": "POST", "path": "/gradio_api/upload"}, None, None)

  quota = uploads.Quota(app, folder=tmp_path, limit=45_000, seconds=60)
  for number in range(25):
    try:
      asyncio.run(upload())
    except ValueError:
      assert number == 3
    assert size(tmp_path) <= 50_000 + 45_000
  assert sorted(os.listdir(tmp_path)) == ["hash21", "hash22", "hash23", "hash24", "own"]


def test_uploads_that_were_broken_off_go_and_those_that_are_received_stay(tmp_path):
  async def app(scope, receive, send):
    pass

  quota = uploads.Quota(app, folder=tmp_path, limit=15_000, seconds=60)
  for name, age in (("tmpold", 100), ("tmpnew", 30), ("tmpnewer", 10)):
    (tmp_path / name).write_bytes(bytes(10_000))
    os.utime(tmp_path / name, (now := time.time() - age, now))
  asyncio.run(quota({"type": "http", "method": "POST", "path": "/gradio_api/upload"}, None, None))
  assert sorted(os.listdir(tmp_path)) == ["tmpnew", "tmpnewer"]


def test_many_small_files_count_by_what_they_take_on_disk(tmp_path):
  async def app(scope, receive, send):
    for i in range(100):
      (tmp_path / f"hash{i}").mkdir()
      (tmp_path / f"hash{i}" / "a").touch()

  quota = uploads.Quota(app, folder=tmp_path, limit=10 * uploads.BLOCK, seconds=60)
  asyncio.run(quota({"type": "http", "method": "POST", "path": "/gradio_api/upload"}, None, None))
  assert len(os.listdir(tmp_path)) == 10


def ask(
  body: list[bytes], *, limit: int, length: bytes | None = None, kind: str = "http", total: int = 10**6
) -> tuple[list, list]:
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
  asyncio.run(BodyLimit(app, limit=limit, total=total, seconds=60)({"type": kind, "headers": headers}, receive, send))
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


class Body:
  """Of a request, whose parts come when they are sent."""

  def __init__(self):
    self.parts: asyncio.Queue[dict] = asyncio.Queue()
    self.sent: list[dict] = []

  def send(self, part: bytes, *, more: bool = True) -> None:
    self.parts.put_nowait({"type": "http.request", "body": part, "more_body": more})

  def ask(self, limited: BodyLimit) -> asyncio.Task:
    async def send(message):
      self.sent.append(message)

    return asyncio.create_task(limited({"type": "http", "headers": []}, self.parts.get, send))


async def reads_all(scope, receive, send):
  """As Starlette reads a body."""
  async for _ in Request(scope, receive).stream():
    pass
  await send({"type": "http.response.start", "status": 200, "headers": []})


def test_bodies_are_limited_together_and_the_next_ones_are_read_again():
  async def run() -> list[int]:
    limited = BodyLimit(reads_all, limit=10, total=15, seconds=60)
    bodies, tasks = [Body() for _ in range(3)], []
    for number, body in enumerate(bodies):
      tasks.append(body.ask(limited))
      body.send(b"x" * 8)
      await asyncio.sleep(0.01)
      if number == 1:
        await tasks[1]
        bodies[0].send(b"", more=False)
        await tasks[0]
    bodies[2].send(b"", more=False)
    await tasks[2]
    return [body.sent[0]["status"] for body in bodies]

  assert asyncio.run(run()) == [200, 503, 200]


def test_a_slow_body_is_refused():
  async def run() -> dict:
    body = Body()
    task = body.ask(BodyLimit(reads_all, limit=10, total=15, seconds=0.05))
    body.send(b"x")
    await asyncio.wait_for(task, 5)
    return body.sent[0]

  assert asyncio.run(run())["status"] == 408


def test_waiting_after_the_body_has_no_limit():
  """As an answer's stream does, to hear that its client has left."""

  async def waits(scope, receive, send):
    await receive()
    await asyncio.sleep(0.1)
    assert (await receive())["type"] == "http.disconnect"
    await send({"type": "http.response.start", "status": 200, "headers": []})

  async def run() -> list[dict]:
    body = Body()
    task = body.ask(BodyLimit(waits, limit=10, total=15, seconds=0.05))
    body.send(b"", more=False)
    body.parts.put_nowait({"type": "http.disconnect"})
    await task
    return body.sent

  assert asyncio.run(run())[0]["status"] == 200


def test_a_client_that_leaves_is_no_error_and_any_other_is():
  async def run(app) -> list[dict]:
    body = Body()
    task = body.ask(BodyLimit(app, limit=10, total=15, seconds=60))
    body.send(b"x")
    body.parts.put_nowait({"type": "http.disconnect"})
    await task
    return body.sent

  async def fails(scope, receive, send):
    raise ValueError("of the app")

  assert asyncio.run(run(reads_all)) == []
  with pytest.raises(ValueError, match="of the app"):
    asyncio.run(run(fails))
