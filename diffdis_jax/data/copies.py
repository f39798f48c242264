"""Prepared data sets in a bucket, copied to this machine before their records are read, a few kB each in random order:
a bucket answers in tens of milliseconds."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from diffdis_jax.common import buckets, files

_AT_ONCE = 8  # files
_RECORDS = ".array_record"


def folder_of(path: str | os.PathLike[str], *, split: str | None = None) -> str:
  """Return the folder to read a data set from: its own, or for a bucket the copy in the user's cache directory, of its
  description and the records of `split`."""
  if not buckets.is_url(path):
    return os.fspath(path)
  return str(_copied(os.fspath(buckets.path(path)), split))  # with single slashes, as objects are named


class Copies:
  """Copies of the files of a data set in a bucket, which the processes of this machine share."""

  def __init__(self, url: str):
    self._url = url.rstrip("/")
    # A hash, since an address may be longer than a file's name.
    self.folder = pathlib.Path(files.user_cache("data"), hashlib.sha256(self._url.encode()).hexdigest()[:32])
    self.folder.mkdir(parents=True, exist_ok=True)

  def fetch(self, name: str) -> pathlib.Path:
    """Return the path of a file's copy, which is made if it is not there, or if the file has changed since."""
    copy, system, address = self.folder / name, buckets.checked(), f"{self._url}/{name}"
    facts, changed = system.info(address), system.modified(address).timestamp()
    with copy.with_name(f"{name}.lock").open("w") as lock:
      files.lock(lock, wait=True)
      if not copy.exists() or (copy.stat().st_size, copy.stat().st_mtime) != (facts["size"], changed):
        partial = copy.with_name(f"{name}.part")
        system.get_file(address, os.fspath(partial))
        os.utime(partial, (changed, changed))
        partial.replace(copy)
    return copy

  def drop(self, name: str) -> None:
    """Remove a copy. A process that still reads it keeps it open."""
    (self.folder / name).unlink(missing_ok=True)


@functools.cache
def _copied(url: str, split: str | None) -> pathlib.Path:
  there = {name: facts["size"] for name, facts in buckets.files_below(url).items()}
  wanted = [name for name in there if _RECORDS not in name or f"-{split}{_RECORDS}" in name]
  copies = Copies(url)
  if (size := sum(there[name] for name in wanted)) > 1e6:
    logging.info("reading %.2f GB of %s by copies in %s", size / 1e9, url, copies.folder)
  with ThreadPoolExecutor(_AT_ONCE) as pool:
    list(pool.map(copies.fetch, wanted))  # a list, which raises the first error
  return copies.folder
