"""Answers only what is asked for by the page's own address, and by the page itself.

A browser lets any site send requests to this machine. One whose name its owner points at this machine (DNS rebinding)
would even read the answers; the header Host then says that name.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Collection, Iterator

from diffdis_jax.app.uploads import App, Message, Receive, Send, refuse
from diffdis_jax.errors import UserError

# Nothing but a name and a port, and matched as a whole: user@name, name/path or name#name would disguise another site.
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d+)?")
ORIGIN = re.compile(rf"https?://(?P<host>{HOST.pattern})")
LOCAL = ("localhost", "127.0.0.1", "::1")


class SameSite:
  """ASGI middleware that answers 403 to another Host than the page's, and to a foreign Origin.

  Any port will do, since it may be forwarded from another one. Where the page listens at every address of the machine,
  it may be asked for by any address too: those cannot be rebound, as names can.
  """

  def __init__(self, app: App, *, listens_at: str, names: Collection[str] = ()):
    """
    Args:
      listens_at: the page's address.
      names: by which it is asked for besides, such as that of a server in front of it.
    """
    self._app = app
    self._everywhere = listens_at in ("", "0.0.0.0", "::")
    self._named = {name.lower().strip("[]") for name in names}
    machine = (socket.gethostname(), socket.getfqdn()) if self._everywhere else (listens_at,)
    self._known = {*LOCAL, *self._named, *(name.lower() for name in machine)}

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    # The server's own start and end, which have no headers.
    if scope["type"] == "lifespan" or not (reason := self._foreign(scope)):
      return await self._app(scope, receive, send)
    if scope["type"] == "websocket":
      # A websocket has no status before it is accepted; 1008 is a violated policy (RFC 6455).
      return await send({"type": "websocket.close", "code": 1008, "reason": reason})
    await refuse(send, 403, reason)

  def _foreign(self, scope: Message) -> str:
    """Why a request is none of the page's; empty where it is."""
    # As latin-1 any bytes are text; what is no name does not match below.
    hosts, origins = (
      [value.decode("latin-1") for name, value in scope["headers"] if name == wanted] for wanted in (b"host", b"origin")
    )
    # Of two headers Host a server in front may believe the other one, so that neither is believed.
    host = HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
    if host is None or not self._is_known(host["name"].strip("[]")):
      return "the page is not served by this name; --allowed_hosts adds names"
    for origin in origins:
      site = ORIGIN.fullmatch(origin.lower())
      # With its port: another port of this machine is another site. A server in front may ask by the address and hand
      # on the browser's Origin, with a name that the user gave.
      if site is None or (site["host"] != host[0] and site["name"].strip("[]") not in self._named):
        return "the page answers no other site"
    return ""

  def _is_known(self, name: str) -> bool:
    return name in self._known or (self._everywhere and _is_address(name))


@contextlib.contextmanager
def asked_directly() -> Iterator[None]:
  """Within, no proxy of the environment is used. Gradio asks the page whether it is there, which a proxy cannot reach,
  and is not even imported where httpx lacks the package for a proxy of that kind. The page asks nobody else."""
  names = ("no_proxy", "NO_PROXY")  # of which Python prefers the former, where it is there
  before = {name: os.environ.pop(name, None) for name in names}
  os.environ.update(dict.fromkeys(names, "*"))
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name)
      if value is not None:
        os.environ[name] = value


def check_names(names: Collection[str]) -> None:
  """Raises UserError: one is no name that a request could ask for, as with a scheme or a port it is none."""
  for name in names:
    if not (re.fullmatch("[a-z0-9._-]+", name.lower()) or _is_address(name.strip("[]"))):
      raise UserError(f"--allowed_hosts={name} is no host's name; give it alone, such as page.example")


def _is_address(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True
