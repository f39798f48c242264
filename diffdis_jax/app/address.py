"""Where the page listens. Without Gradio, so that it is known before the run is loaded."""

from __future__ import annotations

import socket

from diffdis_jax.errors import UserError


def check(host: str, port: int) -> None:
  """Raises UserError: nobody can listen there, such as another page that does already."""
  try:
    _bound(host, port).close()
  except (OSError, TypeError) as error:  # the latter of what is no name of a host
    said = getattr(error, "strerror", None) or error
    raise UserError(f"cannot listen at {host}, port {port}: {said}; take another --port or --host") from error


def free_port(host: str) -> int:
  """One that nobody listens at."""
  with _bound(host, 0) as server:
    return server.getsockname()[1]


def _bound(host: str, port: int) -> socket.socket:
  host = host.strip("[]")  # with or without, as addresses have them
  server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  try:
    # As servers ask for it: a port whose last connections are not forgotten yet is free.
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, port))
  except BaseException:
    server.close()
    raise
  return server
