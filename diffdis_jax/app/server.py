"""Serves the page on this machine until it is asked to end."""

from __future__ import annotations

import pathlib
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import gradio as gr
from absl import logging
from starlette.middleware import Middleware

from diffdis_jax.app import address, page
from diffdis_jax.app.limits import Limits
from diffdis_jax.app.same_site import SameSite
from diffdis_jax.app.uploads import BodyLimit, Quota
from diffdis_jax.errors import UserError

AROUND = 100_000  # bytes of a form around the file in it


def serve(
  blocks: gr.Blocks, limits: Limits, *, folder: pathlib.Path, host: str, port: int, allowed_hosts: Sequence[str]
) -> None:
  """Serves until SIGINT or SIGTERM.

  Args:
    blocks: the page, with its queue.
    limits: of uploads.
    folder: of them.
    host: address to listen at.
    port: 0 for any that is free.
    allowed_hosts: names by which the page is asked for, beside its address.

  Raises:
    UserError: nobody can listen there.
  """
  stop = threading.Event()

  def asked(number: int, frame: FrameType | None) -> None:
    del number, frame
    stop.set()

  host = host.strip("[]")  # with or without, as addresses have them
  # Before the launch, so that a signal during it is not lost either.
  before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
  upload, uploads = int(limits.upload_mb * 1e6), int(limits.uploads_mb * 1e6)
  # The first one is asked first: a foreign request is refused before its body is read, a long body before it is on the
  # disk.
  middleware: list[Any] = [
    Middleware(SameSite, listens_at=host, names=allowed_hosts),
    Middleware(BodyLimit, limit=upload + AROUND, total=uploads + AROUND, seconds=limits.seconds),
    Middleware(Quota, folder=folder, limit=uploads, seconds=limits.seconds),
  ]
  try:
    _, found, _ = blocks.launch(
      # Gradio puts both into the page's address.
      server_name=f"[{host}]" if ":" in host else host,
      server_port=port or address.free_port(host),
      # The server has a thread of its own; signals reach this one, which waits below.
      prevent_thread_lock=True,
      quiet=True,
      share=False,
      # Rendering on the server would start a second one, of Node.
      ssr_mode=False,
      max_file_size=upload,
      footer_links=[],
      # Else Gradio keeps a record of what was asked in the browser, which outlives the page.
      run_history=False,
      # Gradio would keep 10,000 sessions, and each takes memory.
      state_session_capacity=limits.at_once + limits.waiting,
      theme=page.theme(),
      css=page.CSS,
      app_kwargs={"middleware": middleware},
    )
    logging.info("the page is at %s; Ctrl-C ends it", found)
    stop.wait()
  except OSError as error:
    raise UserError(f"cannot listen at {host}, port {port}: {error}; take another --port or --host") from error
  finally:
    blocks.close(verbose=False)
    for number, handler in before.items():
      signal.signal(number, handler)
