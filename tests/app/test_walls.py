"""Test which Host and Origin headers are accepted, and how long a body may be."""

from __future__ import annotations

import asyncio

import pytest

from diffdis_jax.app.server import KnownHost, OwnOrigin

pytestmark = pytest.mark.filterwarnings("default")  # Gradio's own imports warn

HERE = "127.0.0.1:7860"


async def answers(scope, receive, send):
  await send({"type": "http.response.start", "status": 200})


def answer(
  host: str | None,
  origin: str | None = None,
  *,
  at: str = "127.0.0.1",
  names=(),
  kind: str = "http",
  length: str | None = None,
) -> int:
  messages = []

  async def send(message):
    messages.append(message)

  header_values = {b"host": host, b"origin": origin, b"content-length": length}
  headers = [(name, value.encode()) for name, value in header_values.items() if value is not None]
  page = KnownHost(OwnOrigin(answers, names=names, limit=9), host=at, names=names)
  asyncio.run(page({"type": kind, "headers": headers, "path": "/"}, None, send))
  return messages[0].get("status", 0)


@pytest.mark.parametrize("host", [HERE, "LOCALHOST", "[::1]:7860", "localhost:9999", "127.0.0.1", "page.example:80"])
def test_the_page_is_asked_for_by_its_own_names_at_any_port(host):
  """For example, ssh -L forwards another port."""
  names = ("Page.example",)
  assert answer(host, names=names) == 200
  for scheme in ("http", "https"):
    assert answer(host, f"{scheme}://{host}".lower(), names=names) == 200


FOREIGN_HOSTS = (
  "evil.example",
  "evil.example:7860",
  "127.0.0.1.evil.example",
  "localhost.evil.example",
  "[::1",
  "",
  None,
)
FOREIGN_HOSTS += ("", "evil.example@127.0.0.1.x", "192.168.0.7:7860", "0.0.0.0:7860", "127.0.0.1:7860, evil.example")
FOREIGN_ORIGINS = (
  "http://evil.example",
  "null",
  "",
  "http://127.0.0.1:3000",
  "http://localhost:7860",
  "file://",
  "http://[",
)
FOREIGN_ORIGINS += ("http://[", "http://127.0.0.1:7860.evil.example", "http://evil.example#127.0.0.1:7860")


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_another_host_is_refused(host):
  assert answer(host) == answer(host, kind="websocket") == 400


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_foreign_origin_is_refused(origin):
  assert answer(HERE, origin) == answer(HERE, origin, kind="websocket") == 403


def test_at_every_address_any_address_may_be_asked_for_and_no_other_name():
  for at in ("0.0.0.0", "::"):
    for host in ("192.168.0.7:7860", "[fe80::1]:7860", "localhost"):
      assert answer(host, f"http://{host}", at=at) == 200
    assert answer("evil.example", at=at) == 400
    assert answer("192.168.0.7:7860", "http://evil.example", at=at) == 403
  assert answer("machine.example:7860", at="machine.example") == 200


@pytest.mark.parametrize(
  "host, name", [(HERE, "page.example"), ("[fd00::1]:80", "[fd00::1]"), ("[fd00::1]:80", "FD00::1")]
)
def test_a_proxy_may_hand_on_an_allowed_origin(host, name):
  site = f"[{name.strip('[]').lower()}]" if ":" in name else name
  assert answer(host, f"https://{site}", names=(name,)) == 200
  assert answer(host, "https://other.example", names=(name,)) == 403


def test_a_body_that_says_it_is_too_long_is_refused_and_the_servers_start_passes():
  assert [answer(HERE, length=length) for length in ("9", "10")] == [200, 413]
  assert answer(None, kind="lifespan") == 200
