"""Prepared data sets in a bucket, copied to this machine before they are read.

Records are read in random order, a few kB each, which a bucket answers in tens of milliseconds and a disk at once.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

from absl import logging
from fsspec.core import OpenFile, OpenFiles
from fsspec.implementations.cached import WholeFileCacheFileSystem

from diffdis_jax.common import buckets, files

_AT_ONCE = 8  # files
_RECORDS = ".array_record"


def folder_of(path: str | os.PathLike[str], *, split: str | None = None) -> str:
  """Return the folder to read a data set from: its own, or for a bucket the copy in the user's cache directory.

  Args:
    path: of the data set.
    split: whose records are copied too; None for its description alone.
  """
  if not buckets.is_url(path):
    return os.fspath(path)
  return str(_copied(os.fspath(buckets.path(path)), split))  # with single slashes, as objects are named


class ShardCopies:
  """Copies of single shards of a data set in a bucket, which the processes of this machine share.

  Args:
    url: of the data set.
    names: of its shards.
  """

  def __init__(self, url: str, names: Sequence[str]):
    self._url, self._names = url.rstrip("/"), names

  def fetch(self, shard: int) -> pathlib.Path:
    """Copy a shard to this machine, if it is not there, and return its path."""
    copy, system, address = self._path(shard), buckets.checked(), f"{self._url}/{self._names[shard]}"
    with copy.with_name(f"{copy.name}.lock").open("w") as lock:
      files.lock(lock, wait=True)
      if not copy.exists() or copy.stat().st_size != system.info(address)["size"]:
        partial = copy.with_name(f"{copy.name}.part")
        system.get_file(address, os.fspath(partial))
        partial.replace(copy)
    return copy

  def drop(self, shard: int) -> None:
    """Remove the copy of a shard. A process that still reads it keeps it open."""
    self._path(shard).unlink(missing_ok=True)

  def _path(self, shard: int) -> pathlib.Path:
    return _cache_of(self._url) / self._names[shard]


def _cache_of(url: str) -> pathlib.Path:
  """Make the folder for copies of a data set. A hash, since an address may be longer than a file's name."""
  folder = pathlib.Path(files.user_cache("data")) / hashlib.sha256(url.encode()).hexdigest()[:32]
  folder.mkdir(parents=True, exist_ok=True)
  return folder


@functools.cache
def _copied(url: str, split: str | None) -> pathlib.Path:
  system = buckets.checked()
  there = {name: facts["size"] for name, facts in system.find(url, detail=True).items()}
  wanted = [name for name in there if _RECORDS not in name or f"-{split}{_RECORDS}" in name]
  folder = _cache_of(url)
  with (folder / "lock").open("w") as lock:
    files.lock(lock, wait=True)  # which the processes of this machine share
    if (size := sum(there[name] for name in wanted)) > 1e6:
      logging.info("reading %.2f GB of %s by copies in %s", size / 1e9, url, folder)
    # What has changed in the bucket is copied again, by its etag, and nothing ever for its age.
    cache = WholeFileCacheFileSystem(
      fs=system, cache_storage=str(folder), same_names=True, check_files=True, expiry_time=0, skip_instance_cache=True
    )
    # A few at a time: what a killed process has copied is not copied again.
    for start in range(0, len(wanted), _AT_ONCE):
      some = [OpenFile(cache, name) for name in wanted[start : start + _AT_ONCE]]
      with OpenFiles(some, fs=cache):
        pass
  return folder
