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

# Where TensorFlow is installed, etils would read buckets by it, as it decides at the first path.
os.environ.setdefault("EPATH_USE_TF", "false")
SCHEME = "gs://"
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]*):/+")  # with one slash too, which nobody means for a folder of that name
# Orbax cuts an address off at the first two; to gcsfs the others are patterns, which would match another run's files.
_SPECIAL = re.compile(r"[#?*[]")
_AT_ONCE = 8  # files that are uploaded, of each of which gcsfs holds 50 MB
EVERY = 30.0  # seconds between two copies of files that are appended to
LAST_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each try of the last copy


def is_url(path: epath.PathLike) -> bool:
  """Say whether this is an address rather than a path on this machine."""
  return "://" in os.fspath(path)


def path(where: epath.PathLike) -> epath.Path:
  """Return a local path, or one in a bucket. Raise UserError as `check`."""
  if is_url(where):
    check(os.fspath(where))
  return epath.Path(where)


def absolute(where: epath.PathLike) -> epath.Path:
  """Return the path from the root; an address stands for itself."""
  return path(where) if is_url(where) else epath.Path(where).absolute()


def local(where: epath.PathLike, flag: str) -> pathlib.Path:
  """Return a path on this machine. Raise UserError: it is an address, which `flag` was given."""
  if is_url(where):
    how = "write it to this machine, and copy it there" if flag == "--out" else "copy it to this machine first"
    raise UserError(f"{flag}={os.fspath(where)} must be a local path; {how}")
  return pathlib.Path(where)


def check(where: str) -> None:
  """Raise UserError for an address other than gs://BUCKET/..., one with a special character or of a missing package, or
  a ~ that the shell has left. A local path passes."""
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

  # Without credentials gcsfs would ask at each access which kind the bucket is. This is right for all but Rapid ones.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # What it logs with a traceback it raises too, for whoever asked.
  python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)
  # A kept listing hides what other processes write, and cuts an object off at the length that it had before.
  config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _system(**options: bool) -> Any:
  import fsspec

  _configure()
  return fsspec.filesystem("gcs", **options)


def files_below(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
  """List a folder of a bucket: name within it -> gcsfs's facts, among them `size` (bytes) and `etag`."""
  url = os.fspath(path(folder)).rstrip("/")
  below = _system().find(url, detail=True)
  return {name.removeprefix(f"{url.removeprefix(SCHEME)}/"): facts for name, facts in below.items()}


def upload(folder: pathlib.Path, to: epath.PathLike, *, last: Collection[str] = ()) -> None:
  """Copy a local folder into a bucket; files named as in `last` after all others, as marks that those are there."""
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
  """Return a file system of buckets whose listings are kept, and whose `get` raises Gone for a damaged copy."""
  _configure()
  return _checked()(use_listings_cache=True, skip_instance_cache=True)


def create(where: epath.Path, content: bytes) -> bool:
  """Write an object unless there is one already, and return whether it was written."""
  try:
    _system().pipe_file(os.fspath(where), content, mode="create")  # only at generation 0
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
  """A local folder, in which files are appended to, and its copy in a bucket.

  A copy is made every EVERY seconds, and whenever it is asked for. A bucket that is away for a while ends no run: what
  fails is tried again at the next copy.

  Args:
    to: the folder in the bucket.
    of: files there to append to.
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
    """Copy, if the last time was long enough ago."""
    if time.monotonic() - self._last >= EVERY:
      self.copy()

  def copy(self) -> bool:
    """Copy the files that have grown, and say whether all of them are there now."""
    self._last, all_there = time.monotonic(), True
    for file in sorted(self.folder.iterdir()):
      size = file.stat().st_size
      if self._copied.get(file.name) != size:
        try:
          _system().put_file(os.fspath(file), os.fspath(self._to / file.name))
          self._copied[file.name] = size
        except Exception as error:  # of gcsfs or of the network below it
          logging.warning("cannot write %s, which is tried again: %s", self._to / file.name, error)
          all_there = False
    return all_there

  def close(self) -> None:
    """Copy what is left, while a bucket that is away may come back."""
    if not any(time.sleep(pause) or self.copy() for pause in LAST_PAUSES):
      logging.error("the last lines of %s could not be written", self._to)
    self._temporary.cleanup()


@contextlib.contextmanager
def appended(file: epath.Path) -> Iterator[IO[bytes]]:
  """Open a file to append bytes to. One in a bucket is rewritten at the end, after what was in it."""
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
