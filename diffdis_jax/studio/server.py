"""Serves the page on this machine until it is asked to end."""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType

import gradio as gr
from absl import logging
from starlette.middleware import Middleware

from diffdis_jax.errors import UserError
from diffdis_jax.studio import page
from diffdis_jax.studio.body_limit import BodyLimit
from diffdis_jax.studio.limits import Limits

AROUND = 100_000  # bytes of a form around the file in it


def serve(blocks: gr.Blocks, limits: Limits, *, host: str, port: int) -> None:
  """Serves until SIGINT or SIGTERM.

  Args:
    blocks: the page, with its queue.
    limits: of uploads.
    host: address to listen at.
    port: 0 for any that is free.

  Raises:
    UserError: nobody can listen there.
  """
  stop = threading.Event()

  def asked(number: int, frame: FrameType | None) -> None:
    del number, frame
    stop.set()

  before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
  upload = int(limits.upload_mb * 1e6)
  try:
    _, address, _ = blocks.launch(
      server_name=host,
      server_port=port or _free_port(host),
      prevent_thread_lock=True,
      quiet=True,
      share=False,
      ssr_mode=False,
      max_file_size=upload,
      footer_links=[],
      run_history=False,
      state_session_capacity=limits.at_once + limits.waiting,
      theme=page.theme(),
      css=page.CSS,
      app_kwargs={"middleware": [Middleware(BodyLimit, limit=upload + AROUND)]},
    )
    logging.info("the page is at %s; Ctrl-C ends it", address)
    stop.wait()
  except OSError as error:
    raise UserError(f"cannot listen at {host}, port {port}: {error}; take another --port or --host") from error
  finally:
    blocks.close(verbose=False)
    for number, handler in before.items():
      signal.signal(number, handler)


def _free_port(host: str) -> int:
  with socket.create_server((host, 0)) as server:
    return server.getsockname()[1]
