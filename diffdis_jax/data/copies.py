"""Prepared data sets in a bucket, copied to this machine before they are read.

Records are read in random order, a few kB each, which a bucket answers in tens of milliseconds and a disk at once.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import pathlib
from typing import Any

import google_crc32c
from absl import logging
from fsspec.core import OpenFile, OpenFiles
from fsspec.implementations.cached import WholeFileCacheFileSystem

from diffdis_jax.common import buckets, files
from diffdis_jax.errors import Gone

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


def _checked() -> Any:
  """Return a file system of buckets whose listings are kept, and whose `get` raises Gone for a damaged copy."""
  from gcsfs import GCSFileSystem

  class Checked(GCSFileSystem):
    async def _get_file(self, rpath: str, lpath: str, **options: Any) -> None:
      await super()._get_file(rpath, lpath, **options)
      facts: Any = await self._info(rpath)
      there, digest = facts.get("crc32c"), google_crc32c.Checksum()
      with open(lpath, "rb") as copied:
        for _ in digest.consume(copied, 1 << 20):
          pass
      if there not in (None, base64.b64encode(digest.digest()).decode()):
        raise Gone(f"{rpath} arrived damaged")

  return Checked(use_listings_cache=True, skip_instance_cache=True)


@functools.cache
def _copied(url: str, split: str | None) -> pathlib.Path:
  system = _checked()
  there = {name: facts["size"] for name, facts in system.find(url, detail=True).items()}
  wanted = [name for name in there if _RECORDS not in name or f"-{split}{_RECORDS}" in name]
  # A hash: an address may be longer than a file's name, and has slashes.
  folder = pathlib.Path(files.user_cache("data")) / hashlib.sha256(url.encode()).hexdigest()[:32]
  folder.mkdir(parents=True, exist_ok=True)
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
