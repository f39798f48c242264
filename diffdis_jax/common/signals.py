"""Signals that end a command: Ctrl-C, SIGTERM, which announces a preemption, and SIGHUP, of a terminal that is closed.

Python runs a signal's handler in the main thread, and only when that comes back from a compiler or a device, perhaps
minutes later. So a thread hears of each signal too, at once. No jax.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from absl import logging

from diffdis_jax.errors import INTERRUPTED, TERMINATED

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
PATIENCE = 3.0  # seconds in which the main thread must hear of the signal, or the command ends without its clean-up
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class Listener:
  """Takes the ENDING signals from `start` on, or within `listening`. The one started last hears them.

  A signal that is ignored stays so, as SIGHUP after `nohup`.

  Args:
    handler: is called in the main thread, as `signal.signal` takes it.
    hear: is called with the signal's number in another thread, at once.
  """

  def __init__(self, handler: Callable[[int, FrameType | None], None], hear: Callable[[int], None]):
    self._handler, self._hear = handler, hear
    self._before: dict[int, Any] = {}

  def start(self) -> None:
    """Listen from here on. Only the main thread may call this."""
    reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)  # set_wakeup_fd refuses a blocking one
    self._terminals = [output for output in (1, 2) if os.isatty(output)]
    for number in ENDING:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._handler)
    self._writer_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Listen within, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    self.start()
    try:
      yield
    finally:
      signal.set_wakeup_fd(self._writer_before)  # first, so that no signal is written into a closed pipe
      for number, handler in self._before.items():
        signal.signal(number, handler)
      os.close(self._writer)  # which ends the thread

  def _read(self, reader: int) -> None:
    with os.fdopen(reader, "rb", buffering=0) as numbers:
      while number := numbers.read(1):
        if number[0] == signal.SIGHUP:
          for output in self._terminals:  # each write to a closed terminal fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        if signal.getsignal(number[0]) == self._handler:  # another listener may have taken it meanwhile
          self._hear(number[0])


class Terminated(KeyboardInterrupt):
  """SIGTERM or SIGHUP to a command that has nothing to save. It is cleaned up after as after Ctrl-C."""


def end_on_signals() -> None:
  """Raise KeyboardInterrupt or Terminated in the main thread at a signal, from here to the end of the process.

  A second signal ends the process at once, and so does the first if the main thread does not hear of it in time.
  """
  heard, raised = threading.Event(), threading.Event()
  kind = lambda number: KeyboardInterrupt if number == signal.SIGINT else Terminated

  def handle(number: int, frame: FrameType | None) -> None:
    del frame
    raised.set()
    raise kind(number)

  def hear(number: int) -> None:
    if heard.is_set():
      end_interrupted(kind(number))
    heard.set()
    timer = threading.Timer(PATIENCE, lambda: raised.is_set() or end_interrupted(kind(number)))
    timer.daemon = True
    timer.start()

  Listener(handle, hear).start()


def end_interrupted(kind: type[BaseException] = KeyboardInterrupt) -> NoReturn:
  """End this process at once, with one line, after Ctrl-C, or after SIGTERM or SIGHUP if `kind` is Terminated."""
  terminated = issubclass(kind, Terminated)
  with contextlib.suppress(OSError):  # of a terminal that is closed
    sys.stderr.write("terminated\n" if terminated else "interrupted\n")
  exit_at_once(TERMINATED if terminated else INTERRUPTED)


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
  """Processes that are started within do not hear of Ctrl-C from their first moment on; `begin_worker` goes on so."""
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
  parent = multiprocessing.parent_process()
  assert parent is not None  # a worker has one
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()


def while_importing() -> None:
  """Let Ctrl-C end a command in silence until it runs its own code: imports take seconds. A worker ignores it.

  Other programs that import the package keep their handler.
  """
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return
  if multiprocessing.parent_process() is not None:
    if _PACKAGE in pathlib.Path(sys.argv[0]).resolve().parents:
      signal.signal(signal.SIGINT, signal.SIG_IGN)
    return
  name = pathlib.Path(sys.argv[0]).name  # `diffdis`, the script of an installed package
  if name == "-m" and "-m" in sys.orig_argv:  # while Python looks for the module, and imports its package
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1].partition(".")[0]
  if name in ("diffdis", _PACKAGE.name):
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
