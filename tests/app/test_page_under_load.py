"""Two hundred requests, ten at a time, good and bad, by the interface that the page itself uses."""

from __future__ import annotations

import collections
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests import studio_pictures as pictures
from tests.served_app import Served, serve

pytestmark = pytest.mark.slow
pytest_plugins = ("tests.untrained",)
REQUESTS, AT_ONCE = 200, 10
LONGEST = 120  # seconds that an answer may take
GROWTH = 40  # MB that may be added after the first quarter
TEXT = "x" * 1_000_000
UPLOADS = {
  "image": pictures.png(64, 48),
  "empty": b"",
  "large": b"\x00" * 100_000_000,
  "bomb": pictures.bomb(30_000),
  "noise": bytes(range(256)) * 40,
}
NAMES, TEMPLATE = "red star, blue ring, green heart", "a {}"
# Name, what is asked, what is uploaded, and what must come back: an answer, or a message with these words.
KINDS = (
  ("draw", lambda: ["a red star", 0, 6, 3.0], "", "answer"),
  ("classify", lambda: [NAMES, TEMPLATE, 8, 0], "image", "answer"),
  ("classify", lambda: [NAMES, TEMPLATE, 8, 0], "empty", "the file is empty"),
  ("search_text", lambda: ["a blue ring"], "", "answer"),
  ("classify", lambda: [NAMES, TEMPLATE, 8, 0], "large", "413"),
  ("inside", lambda: [NAMES, TEMPLATE, 4, 8, 0], "image", "answer"),
  ("classify", lambda: [NAMES, TEMPLATE, 8, 0], "bomb", "too many pixels"),
  ("search_image", lambda: [], "image", "answer"),
  ("draw", lambda: [TEXT, 0, 6, 3.0], "", "1,000,000 characters"),
  ("search_image", lambda: [], "noise", "no image that can be read"),
  ("draw", lambda: ["a ring", 0, 10**9, 3.0], "", "steps is 1000000000"),
)


def ask(client: httpx.Client, name: str, data: list) -> str:
  """What the stream of an answer ends with: `answer`, or the error's message."""
  started = client.post(f"/gradio_api/call/{name}", json={"data": data})
  started.raise_for_status()
  event = ""
  with client.stream("GET", f"/gradio_api/call/{name}/{started.json()['event_id']}") as stream:
    for line in stream.iter_lines():
      if line.startswith("event: "):
        event = line.removeprefix("event: ")
      elif line.startswith("data: ") and event == "error":
        return line
      elif line.startswith("data: ") and event == "complete":
        line_of_text, *values = json.loads(line.removeprefix("data: "))
        return "answer" if isinstance(line_of_text, str) and all(values) else line
  return "the stream ended"


def outcome(address: str, number: int) -> tuple[str, str, str, float]:
  """Kind of request, what was to come back, what came, and after how many seconds."""
  name, data, upload, expected = KINDS[number % len(KINDS)]
  begin = time.monotonic()
  try:
    with httpx.Client(base_url=address, timeout=LONGEST) as client:
      inputs = data()
      if upload:
        sent = client.post("/gradio_api/upload", files={"files": ("a.png", UPLOADS[upload])})
        if sent.status_code != 200:
          return f"{name} {upload}", expected, str(sent.status_code), time.monotonic() - begin
        file = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
        inputs = [file, *inputs]
      came = ask(client, name, inputs)
  except httpx.HTTPError as error:
    came = repr(error)
  return f"{name} {upload}", expected, came, time.monotonic() - begin


def test_no_request_is_lost_none_hangs_and_memory_is_flat(run, tmp_path):
  with serve(run, tmp_path / "log", {}, f"--seconds={LONGEST}") as served:
    first = every(served, range(REQUESTS // 4))
    before = served.memory()
    rest = every(served, range(REQUESTS // 4, REQUESTS))
    after = served.memory()
    seconds = sorted(each[3] for each in first + rest)
  wrong = [each for each in first + rest if each[1] not in each[2]]
  assert not wrong, collections.Counter(each[:3] for each in wrong)
  assert len(seconds) == REQUESTS and seconds[-1] < LONGEST
  assert after - before < GROWTH, f"{before} MB after {REQUESTS // 4} requests, {after} MB after {REQUESTS}"
  assert "Traceback" not in served.log.read_text()
  (tmp_path / "figures.json").write_text(
    json.dumps({"memory": [before, after], "median": seconds[REQUESTS // 2], "slowest": seconds[-1]})
  )


def every(served: Served, numbers: range) -> list[tuple[str, str, str, float]]:
  with ThreadPoolExecutor(AT_ONCE) as pool:
    return list(pool.map(lambda number: outcome(served.address, number), numbers))
