"""Paths that users give: local ones, and gs://BUCKET/... on Google Cloud Storage.

In a bucket an object appears whole and at once, nothing can be appended to it, and there are no folders. Everything
here goes through gcsfs, which etils uses for `gs://`; STORAGE_EMULATOR_HOST points it at another server. TensorStore,
which reads and writes a checkpoint's arrays, has TENSORSTORE_GCS_HTTP_URL. Both try a request again for half a minute.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import logging as python_logging
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from typing import IO, Any

import google_crc32c
from absl import logging
from etils import epath

from diffdis_jax.errors import Gone, UserError

# If TensorFlow is installed, etils would read buckets with it; it decides at the first path.
os.environ.setdefault("EPATH_USE_TF", "false")
SCHEME = "gs://"
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]*):/+")  # also with one slash, since such a folder's name is unlikely
# Orbax cuts an address at the first two characters; for gcsfs the others are patterns, which could match other files.
_SPECIAL = re.compile(r"[#?*[]")
_AT_ONCE = 8  # files uploaded at a time; gcsfs holds 50 MB of each
EVERY = 30.0  # seconds between two copies of files that grow
LAST_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each try of the last copy


def is_url(path: epath.PathLike) -> bool:
  """Return whether this is an address rather than a path on this machine."""
  return "://" in os.fspath(path)


def path(where: epath.PathLike) -> epath.Path:
  """Return a local path, or one in a bucket. Raise UserError as `check` does."""
  if is_url(where):
    check(os.fspath(where))
  return epath.Path(where)


def absolute(where: epath.PathLike) -> epath.Path:
  """Return the absolute path; an address stays as it is."""
  return path(where) if is_url(where) else epath.Path(where).absolute()


def local(where: epath.PathLike, flag: str) -> pathlib.Path:
  """Return a path on this machine. Raise UserError if `flag` was given an address."""
  if is_url(where):
    how = "write it to this machine, and copy it there" if flag == "--out" else "copy it to this machine first"
    raise UserError(f"{flag}={os.fspath(where)} must be a local path; {how}")
  return pathlib.Path(where)


def check(where: str) -> None:
  """Raise UserError for an address other than gs://BUCKET/..., one with a special character or a missing package, or a
  ~ that the shell did not expand. A local path passes."""
  if where.startswith(("~/", "~")) and (meant := os.path.expanduser(where)) != where:
    raise UserError(f"the shell leaves the ~ of {where} as it is behind a =; give {meant}")
  if not (scheme := _ADDRESS.match(where)):
    return
  if not re.match(r"gs://[^/]+", where):
    how = f"/{where[scheme.end() :]}" if scheme[1].lower() == "file" else "a local path or gs://BUCKET/FOLDER"
    raise UserError(f"{where} is no address that can be read; give {how}")
  if special := _SPECIAL.search(where):
    raise UserError(f"{where} has a {special[0]}, which no address in a bucket may have; take another name")
  if importlib.util.find_spec("gcsfs") is None:
    raise UserError(f"{where} needs the package gcsfs: pip install gcsfs")
  _configure()


@functools.cache
def _configure() -> None:
  """Set up gcsfs before a bucket is opened."""
  from fsspec import config

  # Without credentials gcsfs would ask at each access which kind the bucket is. This is right for all but Rapid
  # buckets.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # It also raises whatever it logs with a traceback.
  python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)
  # A cached listing would hide what other processes write, and would cut a file off at its earlier length.
  config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _system(**options: bool) -> Any:
  import fsspec

  _configure()
  return fsspec.filesystem("gcs", **options)


def files_below(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
  """List a folder of a bucket as {name within it: gcsfs's metadata}, such as `size` (bytes) and `etag`."""
  url = os.fspath(path(folder)).rstrip("/")
  below = _system().find(url, detail=True)
  return {name.removeprefix(f"{url.removeprefix(SCHEME)}/"): facts for name, facts in below.items()}


def upload(folder: pathlib.Path, to: epath.PathLike, *, last: Collection[str] = ()) -> None:
  """Copy a local folder into a bucket; files named in `last` follow after the others, to mark the copy as complete."""
  paths = sorted(file for file in folder.rglob("*") if file.is_file())
  for is_mark in (False, True):
    if group := [file.relative_to(folder).as_posix() for file in paths if (file.name in last) == is_mark]:
      urls = [f"{os.fspath(path(to)).rstrip('/')}/{name}" for name in group]
      _system().put([os.fspath(folder / name) for name in group], urls, batch_size=_AT_ONCE)


@functools.cache
def _checked() -> Any:
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

  return Checked


def checked() -> Any:
  """Return a file system for buckets that caches listings and whose `get` raises Gone for a damaged copy."""
  _configure()
  return _checked()(use_listings_cache=True, skip_instance_cache=True)


def create(where: epath.Path, content: bytes) -> bool:
  """Write an object unless there is one already, and return whether it was written."""
  try:
    _system().pipe_file(os.fspath(where), content, mode="create")  # only if there is no object
  except FileExistsError:
    return False
  return True


def generation(where: epath.Path) -> int:
  """Return an object's generation, which each write changes; 0 if there is no object."""
  try:
    return int(_system().info(os.fspath(where))["generation"])
  except FileNotFoundError:
    return 0


def remove(where: epath.Path, *, generation: int) -> None:
  """Remove an object, unless it was written or removed since it had this generation."""
  with contextlib.suppress(FileNotFoundError):
    _system(version_aware=True).rm_file(f"{os.fspath(where)}#{generation}")


class Mirror:
  """A local folder whose files grow, and its copy in a bucket.

  A copy is made every EVERY seconds, and on request. A bucket that is unreachable for a while does not end the run: the
  next copy tries again.

  Args:
    to: the folder in the bucket.
    of: names of files that may already be there and will be appended to.
  """

  def __init__(self, to: epath.Path, *, of: Sequence[str] = ()):
    self._to, self._temporary = to, tempfile.TemporaryDirectory(prefix="diffdis")
    self.folder = pathlib.Path(self._temporary.name)
    for name in of:
      if (to / name).exists():
        checked().get_file(os.fspath(to / name), os.fspath(self.folder / name))
    self._copied = {file.name: file.stat().st_size for file in self.folder.iterdir()}
    self._last = time.monotonic()

  def copy_if_due(self) -> None:
    """Copy if the last copy is old enough."""
    if time.monotonic() - self._last >= EVERY:
      self.copy()

  def copy(self) -> bool:
    """Copy the files that have grown, and return whether all copies succeeded."""
    self._last, all_there = time.monotonic(), True
    for file in sorted(self.folder.iterdir()):
      size = file.stat().st_size
      if self._copied.get(file.name) != size:
        try:
          _system().put_file(os.fspath(file), os.fspath(self._to / file.name))
          self._copied[file.name] = size
        except Exception as error:  # of gcsfs or the network
          logging.warning("cannot write %s, which is tried again: %s", self._to / file.name, error)
          all_there = False
    return all_there

  def close(self) -> None:
    """Copy the rest, and wait for an unreachable bucket to come back."""
    if not any(time.sleep(pause) or self.copy() for pause in LAST_PAUSES):
      logging.error("the last lines of %s could not be written", self._to)
    self._temporary.cleanup()


@contextlib.contextmanager
def appended(file: epath.Path) -> Iterator[IO[bytes]]:
  """Open a file to append bytes. A file in a bucket is rewritten at the end, with its earlier content first."""
  if not is_url(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as opened:
      yield opened
    return
  with tempfile.TemporaryFile() as opened:
    try:
      yield opened
    finally:
      opened.seek(0)
      before = file.read_bytes() if file.exists() else b""
      file.write_bytes(before + opened.read())
