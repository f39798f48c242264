"""Send good and bad requests to the page of a small run, through the interface that the page itself uses."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests import studio_pictures as pictures
from tests.served_app import serve

pytest_plugins = ("tests.untrained",)
REQUESTS, AT_ONCE = 33, 6
UPLOADS = {"image": pictures.png(64, 48), "empty": b"", "large": bytes(11_000_000), "bomb": pictures.bomb(30_000)}
NAMES, TEMPLATE = "red star, blue ring, green heart", "a {}"
# Each row: the function's name, its inputs, what is uploaded, and the expected answer or words of the error message.
KINDS = (
  ("draw", ["a red star", 2, 0, 6, 3.0], "", "answer"),
  ("classify", [NAMES, TEMPLATE, 0], "image", "answer"),
  ("classify", [NAMES, TEMPLATE, 0], "empty", "the file is empty"),
  ("search_text", ["a blue ring"], "", "answer"),
  ("classify", [NAMES, TEMPLATE, 0], "large", "413"),
  ("classify", [NAMES, TEMPLATE, 0], "bomb", "too many pixels"),
  ("search_image", [], "image", "answer"),
  ("draw", ["x" * 1_000_000, 1, 0, 6, 3.0], "", "1,000,000 characters"),
  ("draw", ["a ring", 1, 0, 10**9, 3.0], "", "steps is 1000000000"),
  ("classify", ["<img src=x>, <img src=x>", TEMPLATE, 0], "image", "&lt;img src=x&gt;"),
  ("classify", [NAMES, TEMPLATE, 0], "/etc/passwd", "error"),
)


def ask(client: httpx.Client, name: str, data: list) -> str | list:
  """Return the values of an answer's stream, or its error's message."""
  started = client.post(f"/gradio_api/call/{name}", json={"data": data})
  started.raise_for_status()
  event = ""
  with client.stream("GET", f"/gradio_api/call/{name}/{started.json()['event_id']}") as stream:
    for line in stream.iter_lines():
      if line.startswith("event: "):
        event = line.removeprefix("event: ")
      elif line.startswith("data: ") and event == "error":
        return f"error: {line}"
      elif line.startswith("data: ") and event == "complete":
        return json.loads(line.removeprefix("data: "))
  return "the stream ended"


def outcome(address: str, number: int) -> tuple[str, str]:
  """Return the expected outcome of a request and the actual one."""
  name, inputs, upload, expected = KINDS[number % len(KINDS)]
  with httpx.Client(base_url=address, timeout=120) as client:
    if upload:
      path = upload
      if upload in UPLOADS:
        response = client.post("/gradio_api/upload", files={"files": ("a.png", UPLOADS[upload])})
        if response.status_code != 200:
          return expected, str(response.status_code)
        (path,) = response.json()
      inputs = [{"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}, *inputs]
    values = ask(client, name, inputs)
    is_answer = isinstance(values, list) and isinstance(values[0], str) and all(values[1:])
    return expected, "answer" if is_answer else str(values)


@pytest.mark.slow
def test_no_request_is_lost_bad_ones_are_messages_and_a_drawn_image_goes_to_classify(run, tmp_path):
  """At the end SIGTERM stops the page, and it leaves no upload behind."""
  with serve(run, tmp_path / "log", {}) as served, ThreadPoolExecutor(AT_ONCE) as pool:
    end = time.monotonic() + 120
    while "images can be searched" not in served.log.read_text() and time.monotonic() < end:
      time.sleep(0.2)
    outcomes = list(pool.map(lambda number: outcome(served.address, number), range(REQUESTS)))
    with httpx.Client(base_url=served.address, timeout=120) as client:
      parts = [{**part["props"], "type": part["type"]} for part in client.get("/config").json()["components"]]
      picture, tab = ask(client, "take", [next(part["value"] for part in parts if part["type"] == "gallery")])
      line, shares = ask(client, "classify", [picture, NAMES, TEMPLATE, 0])
      prompt, back = ask(client, "likeliest", [shares, TEMPLATE])
  assert [pair for pair in outcomes if pair[0] not in pair[1]] == []
  (example,) = [part["value"] for part in parts if part.get("elem_id") == "classify-line"]
  assert "%" in example, "the example that is classified before the first click"
  assert tab["selected"] == "classify" and "%" in line and len(shares["confidences"]) == 3
  assert prompt == f"a {shares['label']}" and back["selected"] == "draw"
  log = (tmp_path / "log").read_text()
  assert log.count("Traceback") <= REQUESTS // len(KINDS), log[-3000:]
