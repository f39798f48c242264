"""`lock.json`, the lock of a workdir, which lets one process at a time write there.

On a disk, the holder keeps the file locked, and the system unlocks it when the holder dies. A bucket creates an object
only if there is none; a holder counts as dead if it has not written its object again for PATIENCE seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, files, signals
from diffdis_jax.errors import PREEMPTED, UserError

BEAT = 5.0  # seconds between two signs of life, by which report and status see that a run is running
PATIENCE = 20.0  # seconds without a sign of life after which a holder in a bucket counts as dead
ENDING = 3.0  # seconds to wait for a live holder to end


class InUse(UserError):
  """The error that another live process holds the workdir. Launchers start the command again."""

  code = PREEMPTED


class Lock:
  """Hold a workdir during a `with` block.

  Raises:
    InUse: a live process holds it.
    UserError: the workdir cannot be written.
    OSError: its storage is unreachable, or its disk is full.
  """

  def __init__(self, path: epath.PathLike):
    self._workdir, self._path = path, buckets.path(path) / "lock.json"
    self._owner = secrets.token_hex(8)
    own = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    self._content = json.dumps(own).encode()
    self._file: io.FileIO | None = None  # the open, locked file on a disk
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)

  def __enter__(self) -> Lock:
    begin = changed = time.monotonic()
    seen, lives = None, not buckets.is_url(self._path)
    with files.writing(f"to --workdir={self._workdir}"):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      while not self._take():
        now = time.monotonic()
        if buckets.is_url(self._path) and (generation := buckets.generation(self._path)) != seen:
          seen, changed, lives = generation, now, seen is not None
        elif seen is not None and now - changed > PATIENCE:
          buckets.remove(self._path, generation=seen)
        if lives and now - begin > ENDING:
          holder = self._there()
          raise InUse(
            f"--workdir={self._workdir} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for it,"
            " stop it, or take another --workdir"
          )
        time.sleep(0.2)
    self._thread.start()
    return self

  def _take(self) -> bool:
    if buckets.is_url(self._path):
      return buckets.create(self._path, self._content)
    create = lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666)
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(io.FileIO(os.fspath(self._path), "r+", opener=create))
      with contextlib.suppress(BlockingIOError):
        files.lock(file, wait=False)
        # Between the two calls, the holder may have removed the file, and another process may have created a new one.
        if os.path.exists(self._path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
          os.ftruncate(file.fileno(), 0)
          file.write(self._content)
          self._file = file
          stack.pop_all()  # the file stays open and locked
    return self._file is not None

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()  # a beat in progress would write the object again
    if self._file is not None:
      with self._file:
        os.unlink(self._path)  # while the file is locked
    elif self._there().get("owner") == self._owner:
      buckets.remove(self._path, generation=buckets.generation(self._path))

  def _keep_beating(self) -> None:
    while not self._done.wait(BEAT):
      try:
        if self._file is not None:
          os.pwrite(self._file.fileno(), self._content, 0)
        elif self._there().get("owner", self._owner) == self._owner:  # also if it cannot be read now
          self._path.write_bytes(self._content)
        else:
          sys.stderr.write(f"error: --workdir={self._workdir} was taken over by another process\n")
          signals.exit_at_once(PREEMPTED)  # another write would mix two runs
      except Exception as error:  # storage may raise anything, and be reachable again at the next beat
        logging.warning("cannot renew %s: %s", self._path, error)

  def _there(self) -> dict[str, Any]:
    return files.read_object(self._path)
