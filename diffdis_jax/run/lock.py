"""The right to write into a workdir, for one process at a time: `lock.json`, which is created exclusively."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from diffdis_jax.common import buckets, signals
from diffdis_jax.errors import PREEMPTED, UserError
from diffdis_jax.run import history, workdir

BEAT = 5.0  # seconds between two signs of life of the process that holds a workdir
PATIENCE = 20.0  # seconds without a sign of life after which a holder on another machine is dead
ENDING = 3.0  # seconds that a live holder is given to end


class InUse(UserError):
  """Another live process holds the workdir. Launchers start the command again."""

  code = PREEMPTED


class _Seen(NamedTuple):
  """lock.json at one moment."""

  content: dict[str, Any]
  sign: int  # another one after each sign of life
  version: int  # another one when the file is another one
  is_locked: bool  # by its holder, which therefore lives
  has_locks: bool  # the file's system has locks, so that a free one on this machine says that its holder is dead


class Lock:
  """Holds a workdir within `with`; a file that a killed process left is taken over.

  On this machine the holder's lock on the file tells at once whether it lives. Elsewhere, and in a bucket, it is dead
  when the file has not changed for PATIENCE seconds. A holder that was taken for dead ends as soon as it notices.

  Raises:
    InUse: a live process holds it.
    UserError: the workdir cannot be written.
    OSError: its storage is away, or its disk is full.
  """

  def __init__(self, path: epath.PathLike):
    self._workdir, self._folder = path, buckets.path(path)
    self._own = {"owner": secrets.token_hex(8), "host": socket.gethostname(), "machine": _machine()}
    self._own |= {"pid": os.getpid(), "time": time.time()}
    self._content = json.dumps(self._own).encode()
    self._file = (_Object if buckets.is_url(path) else _File)(self._folder / "lock.json")
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._keep_beating, name="lock", daemon=True)

  def __enter__(self) -> Lock:
    with workdir.writing(self._workdir):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._take()
    self._thread.start()
    return self

  def _take(self) -> None:
    begin, sign, signs = time.monotonic(), None, 0
    while not self._file.create(self._content):
      with self._file.seen() as seen:
        if seen is None:  # released just now
          continue
        if seen.content.get("owner") == self._own["owner"]:  # created by a request that was sent twice
          return
        now = time.monotonic()
        if seen.sign != sign:
          sign, since, signs = seen.sign, now, signs + 1
        here = seen.has_locks and seen.content.get("machine") == self._own["machine"]
        if not seen.is_locked and (here or now - since > PATIENCE):
          self._file.remove(seen)
          continue
      if (seen.is_locked or signs > 1) and now - begin > ENDING:
        who = f"--workdir={self._workdir} is in use by {_named(seen)}"
        raise InUse(f"{who}; wait for it, stop it, or take another --workdir")
      time.sleep(0.2)

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()  # a beat under way would write the file again
    try:
      with self._file.seen() as seen:
        if seen and seen.content.get("owner") == self._own["owner"]:
          self._file.remove(seen)
    except Exception as error:  # of a disk or a bucket, which must not take the place of why the run ended
      logging.warning("cannot remove %s/lock.json: %s", self._folder, getattr(error, "strerror", None) or error)

  def _keep_beating(self) -> None:
    while not self._done.wait(BEAT):
      try:
        with self._file.seen() as seen:
          pass
        if seen is None:  # somebody has removed it
          self._file.create(self._content)
        elif seen.content.get("owner", self._own["owner"]) == self._own["owner"]:
          self._file.beat(self._content)
        else:
          sys.stderr.write(f"error: --workdir={self._workdir} was taken over by {_named(seen)}\n")
          signals.exit_at_once(PREEMPTED)  # each further write would mix two runs
      except Exception as error:  # of whatever storage it is, which may be back at the next beat
        logging.warning("cannot renew %s/lock.json: %s", self._folder, error)


class _File:
  """lock.json on a disk. Its holder keeps it locked, so that its death frees it."""

  def __init__(self, path: epath.Path):
    self._path = os.fspath(path)
    self._held = -1

  def create(self, content: bytes) -> bool:
    try:
      self._held = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
      return False
    with contextlib.suppress(OSError):  # file systems without locks have signs of life alone
      fcntl.flock(self._held, fcntl.LOCK_EX)
    try:
      os.write(self._held, content)
    except BaseException:
      os.unlink(self._path)
      os.close(self._held)
      raise
    return True

  @contextlib.contextmanager
  def seen(self) -> Iterator[_Seen | None]:
    """Look at the file, which no other process removes within, if it is free."""
    try:
      file = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)  # which waits for nobody at the end of a pipe either
    except FileNotFoundError:
      yield None
      return
    try:
      status, is_locked, has_locks = os.fstat(file), False, True
      if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{self._path} is no file; remove it")
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        is_locked = True
      except OSError:
        has_locks = False
      yield _Seen(history.parse(os.pread(file, 2**16, 0)), status.st_mtime_ns, status.st_ino, is_locked, has_locks)
    finally:
      os.close(file)

  def remove(self, seen: _Seen) -> None:
    """Remove the file that was seen, within `seen`, and not one that is there since."""
    with contextlib.suppress(FileNotFoundError):
      if os.stat(self._path).st_ino == seen.version:
        os.unlink(self._path)

  def beat(self, content: bytes) -> None:
    os.pwrite(self._held, content, 0)


class _Object:
  """lock.json in a bucket, which knows each object's generation."""

  def __init__(self, path: epath.Path):
    self._path = path

  def create(self, content: bytes) -> bool:
    return buckets.create(self._path, content)

  @contextlib.contextmanager
  def seen(self) -> Iterator[_Seen | None]:
    """Look at the object as it is at this moment."""
    generation = buckets.generation(self._path)
    content = history.parse(self._path.read_bytes()) if generation else {}
    yield _Seen(content, generation, generation, is_locked=False, has_locks=False) if generation else None

  def remove(self, seen: _Seen) -> None:
    buckets.remove(self._path, generation=seen.version)

  def beat(self, content: bytes) -> None:
    self._path.write_bytes(content)


def _named(seen: _Seen) -> str:
  return f"process {seen.content.get('pid')} on {seen.content.get('host')}"


def _machine() -> str:
  """Name this boot of the machine, whose kernel keeps the locks."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return socket.gethostname()
