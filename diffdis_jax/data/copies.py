"""Prepared data sets in a bucket, copied to this machine before they are read.

Records are read in random order, a few kB each, which a bucket answers in tens of milliseconds and a disk at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import UserError

IN_PLACE = "DIFFDIS_READ_IN_BUCKET"
PATIENCE = 30.0  # seconds
_AT_ONCE = 8  # files
_RECORDS = ".array_record"


def reads_in_place(path: str | os.PathLike[str]) -> bool:
  """Say whether records are read from the bucket itself, as DIFFDIS_READ_IN_BUCKET=1 asks for."""
  return buckets.is_url(path) and os.environ.get(IN_PLACE, "0") not in ("", "0")


def folder_of(path: str | os.PathLike[str], *, split: str | None = None) -> str:
  """Return the folder to read a data set from: its own, or for a bucket the copy in the user's cache directory.

  Args:
    path: of the data set.
    split: whose records are copied too; None for its description alone.

  Raises:
    UserError: there is no room for the copy.
  """
  if not buckets.is_url(path) or reads_in_place(path):
    return os.fspath(path)
  return str(_copied(os.fspath(buckets.path(path)), split))  # with single slashes, as objects are named


@functools.cache
def _copied(url: str, split: str | None) -> pathlib.Path:
  there = buckets.files_below(url)
  wanted = {name: facts for name, facts in there.items() if _RECORDS not in name or f"-{split}{_RECORDS}" in name}
  # A hash: an address may be longer than a file's name, and has slashes.
  folder = pathlib.Path(files.user_cache("data")) / hashlib.sha256(url.encode()).hexdigest()[:32]
  folder.mkdir(parents=True, exist_ok=True)
  with _one_process(folder):
    manifest = folder / "copied.json"
    known = files.read_json(manifest) if manifest.exists() else {}
    missing = [name for name, facts in wanted.items() if not _is_there(folder / name, known.get(name), facts)]
    files.sweep(folder, age=0)  # of a process that was killed: only one copies at a time
    _check_room(url, folder, sum(wanted[name]["size"] for name in missing))
    for start in range(0, len(missing), _AT_ONCE):
      some = missing[start : start + _AT_ONCE]
      buckets.download({f"{url}/{name}": folder / name for name in some})
      # After every few files: what a killed process has copied is not copied again.
      known |= {name: wanted[name]["etag"] for name in some}
      files.write_whole(manifest, json.dumps(known).encode())
  return folder


def _is_there(file: pathlib.Path, etag: str | None, facts: Mapping[str, Any]) -> bool:
  # The bucket's tag shows whether the bytes are still those; the size, whether the copy is whole.
  return etag == facts["etag"] and file.is_file() and file.stat().st_size == facts["size"]


def _check_room(url: str, folder: pathlib.Path, needed: int) -> None:
  if needed > (room := shutil.disk_usage(folder).free):
    raise UserError(
      f"the copy of {url} needs {needed / 1e9:.1f} GB in {folder}, which has {room / 1e9:.1f} GB left; set"
      f" XDG_CACHE_HOME to a larger disk, or {IN_PLACE}=1 to read the records from the bucket itself"
    )
  if needed > 1e6:
    logging.info("copying %.2f GB of %s to %s", needed / 1e9, url, folder)


@contextlib.contextmanager
def _one_process(folder: pathlib.Path) -> Iterator[None]:
  """Hold the lock of a copy, which the processes of this machine share."""
  with (folder / "lock").open("w") as lock:
    files.lock(lock, wait=True)
    yield


@contextlib.contextmanager
def naming_silence(sources: Collection[str], patience: float | None = None) -> Iterator[None]:
  """Name the sources whenever they have been silent for so many seconds, by default PATIENCE, while data are waited
  for."""
  if not sources:
    yield
    return
  done, seconds = threading.Event(), PATIENCE if patience is None else patience

  def watch() -> None:
    count = 1
    while not done.wait(seconds):
      logging.warning("no data for %.0f s from %s; still waiting", count * seconds, ", ".join(sources))
      count += 1

  thread = threading.Thread(target=watch, name="silence", daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
