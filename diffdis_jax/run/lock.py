"""The right to write into a workdir, for one process at a time: `lock.json`.

On a disk its holder keeps the file locked, and the system frees it when that process dies. A bucket creates an object
only where there is none; a holder that is dead is one that has not written its object again for PATIENCE seconds.
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

BEAT = 5.0  # seconds between two signs of life, by which report and status know that a run is running
PATIENCE = 20.0  # seconds without a sign of life after which a holder in a bucket is dead
ENDING = 3.0  # seconds that a live holder is given to end


class InUse(UserError):
  """Another live process holds the workdir. Launchers start the command again."""

  code = PREEMPTED


class Lock:
  """Holds a workdir within `with`.

  Raises:
    InUse: a live process holds it.
    UserError: the workdir cannot be written.
    OSError: its storage is away, or its disk is full.
  """

  def __init__(self, path: epath.PathLike):
    self._workdir, self._path = path, buckets.path(path) / "lock.json"
    self._owner = secrets.token_hex(8)
    own = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    self._content = json.dumps(own).encode()
    self._file: io.FileIO | None = None  # on a disk, open and locked
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
        # Its holder may have removed it between the two calls, and another process may have created it again.
        if os.path.exists(self._path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
          os.ftruncate(file.fileno(), 0)
          file.write(self._content)
          self._file = file
          stack.pop_all()  # it stays open, and locked
    return self._file is not None

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()  # a beat under way would write the object again
    if self._file is not None:
      with self._file:
        os.unlink(self._path)  # while it is locked
    elif self._there().get("owner") == self._owner:
      buckets.remove(self._path, generation=buckets.generation(self._path))

  def _keep_beating(self) -> None:
    while not self._done.wait(BEAT):
      try:
        if self._file is not None:
          os.pwrite(self._file.fileno(), self._content, 0)
        elif self._there().get("owner", self._owner) == self._owner:  # or it cannot be read just now
          self._path.write_bytes(self._content)
        else:
          sys.stderr.write(f"error: --workdir={self._workdir} was taken over by another process\n")
          signals.exit_at_once(PREEMPTED)  # each further write would mix two runs
      except Exception as error:  # of whatever storage it is, which may be back at the next beat
        logging.warning("cannot renew %s: %s", self._path, error)

  def _there(self) -> dict[str, Any]:
    return files.read_object(self._path)
