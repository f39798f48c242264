"""Handle signals that end a command: Ctrl-C, SIGTERM (a preemption), and SIGHUP (a closed terminal).

Python calls a handler in the main thread, once that is not inside a library call. No jax.
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
  """SIGTERM or SIGHUP for a command that has nothing to save. The clean-up is the same as after Ctrl-C."""


def handle(handler: Callable[[int], None]) -> dict[int, Any]:
  """Install `handler` for all ending signals, and return the earlier handlers.

  An ignored signal, such as SIGHUP after `nohup`, stays ignored. Only the main thread may call this.
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
  """Call `handler` with the number of each ending signal during the block, if this is the main thread."""
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
  """Write a line to stderr from a signal handler, which may have interrupted another write."""
  with contextlib.suppress(OSError):  # the terminal may be closed
    os.write(2, f"{line}\n".encode())


def exit_at_once(code: int) -> NoReturn:
  """End as abruptly as by SIGKILL, which all files of a run survive, but with this code and without leaving workers."""
  kill_workers()  # os._exit does not end children
  logging.flush()
  os._exit(code)


def kill_workers() -> None:
  """Kill the processes that multiprocessing started for this one."""
  for worker in multiprocessing.active_children():
    worker.kill()


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
  """Start processes in the block that ignore Ctrl-C from their first moment on; `begin_worker` continues this."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a process inherits this mask
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(*_: int) -> None:
  """Let the parent decide when this worker ends, and end it if the parent is killed.

  Ctrl-C in a terminal, and closing it, would otherwise end every process.
  """
  for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  parent: Any = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()
