"""Signals that ask a command to end: Ctrl-C, and SIGTERM, which announces a preemption. No jax.

Python runs a signal's handler in the main thread, and only when that comes back from a compiler or a device, perhaps
minutes later. So a thread hears of each signal too, at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, NoReturn

from absl import logging

from diffdis_jax.errors import INTERRUPTED, TERMINATED

PATIENCE = 3.0  # seconds in which the main thread must hear of the signal, or the command ends without its clean-up
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class Listener:
  """Takes signals from `start` on, or within `listening`. Listeners nest: the one started last hears them.

  One that is ignored stays so, as SIGINT is in what a shell without job control runs in the background.

  Args:
    numbers: of the signals.
    handler: as `signal.signal` takes it, for the main thread.
    hear: is called with the number, at once, in another thread.
  """

  def __init__(
    self, numbers: Collection[int], handler: Callable[[int, FrameType | None], None], hear: Callable[[int], None]
  ):
    self._numbers, self._handler, self._hear = numbers, handler, hear
    self._before: dict[int, Any] = {}

  def start(self) -> None:
    """In the main thread."""
    reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)  # or else set_wakeup_fd refuses it
    for number in self._numbers:
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._handler)
    # No warning of a full pipe: what is in it already will be heard.
    self._writer_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
    threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Takes them within, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    self.start()
    try:
      yield
    finally:
      # First, so that no signal is written into a pipe that is closed; and closing it ends the thread.
      signal.set_wakeup_fd(self._writer_before)
      for number, handler in self._before.items():
        signal.signal(number, handler)
      os.close(self._writer)

  def _read(self, reader: int) -> None:
    with os.fdopen(reader, "rb", buffering=0) as numbers:
      while number := numbers.read(1):
        # The number also comes where somebody else has taken the signal meanwhile.
        if signal.getsignal(number[0]) == self._handler:
          self._hear(number[0])


class Terminated(KeyboardInterrupt):
  """SIGTERM to a command that has nothing to save. What cleans up after Ctrl-C does so after it too."""


class Ending:
  """Ctrl-C and SIGTERM for a command that has nothing to save: KeyboardInterrupt or Terminated in the main thread.

  A second one ends the process at once, and so does the first where the main thread does not hear of it in time.
  """

  def __init__(self) -> None:
    self._count = 0
    self._raised = threading.Event()

  def start(self) -> None:
    """From here to the end of the process."""
    Listener([signal.SIGINT, signal.SIGTERM], self._raise, self._hear).start()

  def _raise(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._raised.set()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated

  def _hear(self, number: int) -> None:
    kind = KeyboardInterrupt if number == signal.SIGINT else Terminated
    self._count += 1
    if self._count > 1:
      end_interrupted(kind)
    # By a thread, since the main one may be in a compiler.
    timer = threading.Timer(PATIENCE, lambda: self._raised.is_set() or end_interrupted(kind))
    timer.daemon = True
    timer.start()


def end_interrupted(kind: type[BaseException] = KeyboardInterrupt) -> NoReturn:
  """Ends this process at once, after Ctrl-C, or SIGTERM where `kind` is Terminated, with one line."""
  terminated = issubclass(kind, Terminated)
  sys.stderr.write("terminated\n" if terminated else "interrupted\n")
  exit_at_once(TERMINATED if terminated else INTERRUPTED)


def exit_at_once(code: int) -> NoReturn:
  """As SIGKILL would, which every file of a run survives, but with this code and without the workers."""
  kill_workers()  # or else they outlive it, since os._exit ends no children
  logging.flush()
  os._exit(code)


def kill_workers() -> None:
  """Of this process, those that multiprocessing started."""
  for worker in multiprocessing.active_children():
    worker.kill()


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
  """Processes that are started within do not hear of Ctrl-C from their first moment on, as by `leave_to_parent` later.

  This process does: another thread takes the signal, and the main one hears of it when it comes back.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which a process that is started inherits
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(*_: int) -> None:
  """In a worker: Ctrl-C in a terminal reaches it too, but its parent decides when it ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def begin_worker(*_: int) -> None:
  """In a worker: leaves Ctrl-C to its parent, and ends when that is killed, instead of waiting for ever."""
  leave_to_parent()
  parent = multiprocessing.parent_process()
  assert parent is not None  # a worker has one
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()


def while_importing() -> None:
  """What Ctrl-C does until a command, or a worker of one, runs its own code: imports take seconds.

  It ends the command; a worker leaves it to the command. Other programs that import the package keep theirs.
  """
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return
  if multiprocessing.parent_process() is not None:
    if _PACKAGE in pathlib.Path(sys.argv[0]).resolve().parents:
      leave_to_parent()
    return
  if is_command():
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def is_command() -> bool:
  """Whether this process is a command of the package, as the package is being imported."""
  name = pathlib.Path(sys.argv[0]).name  # `diffdis`, the script of an installed package
  if name == "-m" and "-m" in sys.orig_argv:  # of Python while it looks for the module, and imports its package
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1].partition(".")[0]
  return name in ("diffdis", _PACKAGE.name)
