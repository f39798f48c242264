"""Signals that end a command: Ctrl-C, SIGTERM, which announces a preemption, and SIGHUP, of a terminal that is closed.

Python calls a handler in the main thread, as soon as that is not within a call of a library. No jax.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import logging

from diffdis_jax.errors import INTERRUPTED, TERMINATED


class Terminated(KeyboardInterrupt):
  """SIGTERM or SIGHUP to a command that has nothing to save. It is cleaned up after as after Ctrl-C."""


def handle(handler: Callable[[int], None]) -> dict[int, Any]:
  """Call `handler` with the number of each ending signal from here on, and return what handled them before.

  A signal that is ignored stays so, as SIGHUP after `nohup`. Only the main thread may call this.
  """
  terminals = [output for output in (1, 2) if os.isatty(output)]

  def on_signal(number: int, _: object) -> None:
    if number == signal.SIGHUP:
      for output in terminals:  # each write to a closed terminal fails
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    handler(number)

  ending = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
  return {n: signal.signal(n, on_signal) for n in ending if signal.getsignal(n) is not signal.SIG_IGN}


@contextlib.contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
  """Call `handler` with the number of each ending signal within, if this is the main thread."""
  before = handle(handler) if threading.current_thread() is threading.main_thread() else {}
  try:
    yield
  finally:
    for number, handler_before in before.items():
      signal.signal(number, handler_before)


def end_on_signals() -> None:
  """Raise KeyboardInterrupt or Terminated in the main thread at a signal; end the process at once at a second one."""

  def end(number: int) -> None:
    kind = KeyboardInterrupt if number == signal.SIGINT else Terminated
    handle(lambda _: end_interrupted(kind))
    raise kind

  handle(end)


def end_interrupted(kind: type[BaseException] = KeyboardInterrupt) -> NoReturn:
  """End this process at once, with one line, after Ctrl-C, or after SIGTERM or SIGHUP if `kind` is Terminated."""
  terminated = issubclass(kind, Terminated)
  say("terminated" if terminated else "interrupted")
  exit_at_once(TERMINATED if terminated else INTERRUPTED)


def say(line: str) -> None:
  """Write a line to stderr from within a handler, which may have interrupted another write."""
  with contextlib.suppress(OSError):  # of a terminal that is closed
    os.write(2, f"{line}\n".encode())


def exit_at_once(code: int) -> NoReturn:
  """End as SIGKILL does, which every file of a run survives, but with this code and without the workers."""
  kill_workers()  # os._exit ends no children
  logging.flush()
  os._exit(code)


def kill_workers() -> None:
  """Kill the processes that multiprocessing started for this one."""
  for worker in multiprocessing.active_children():
    worker.kill()


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
  """Start processes within that do not hear of Ctrl-C from their first moment on; `begin_worker` goes on so."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a process that is started inherits
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(*_: int) -> None:
  """Leave it to the parent when this worker ends, except that it ends when the parent is killed.

  Ctrl-C in a terminal, and its closing, reach every process.
  """
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  parent: Any = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()
