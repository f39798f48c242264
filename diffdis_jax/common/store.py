"""What takes long to make, kept on disk by a digest of all that it depends on: code, settings and input."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import DTypeLike

from diffdis_jax.common import files
from diffdis_jax.errors import UserError, parse_json

_MARK = b"\ncrc32 "  # before a file's own CRC of what stands before, by which a flipped bit is seen


class Store:
  """A folder of files, each named by the digest of its key.

  A key holds everything that the content depends on, so that no file is ever out of date. A damaged file is warned of
  and made again. A folder that cannot be written is warned of, and nothing is kept.

  Args:
    folder: created when something is kept.
    what: is kept, for the warnings.
    limit: bytes that the folder may hold before the files that were not used for longest go; None for any number.
  """

  def __init__(self, folder: str | os.PathLike[str], what: str, *, limit: int | None = None):
    self._folder, self._what, self._limit = pathlib.Path(folder), what, limit

  def file(self, key: bytes, ending: str) -> pathlib.Path:
    """Where the content of this key is, or would be."""
    return self._folder / f"{hashlib.sha256(key).hexdigest()}{ending}"

  def read_array(self, key: bytes, *, rows: int, dtype: DTypeLike) -> Any | None:
    """The array of this key; None where there is none, or it does not have so many rows of this type."""

    def decode(content: bytes) -> np.ndarray:
      # No pickles, which could run anything: the folder may be another's.
      found = np.load(io.BytesIO(content), allow_pickle=False)
      if len(found) != rows or found.dtype != dtype:
        raise ValueError(f"{len(found)} rows of {found.dtype} instead of {rows} of {np.dtype(dtype)}")
      return found

    return self._read(self.file(key, ".npy"), decode)

  def write_array(self, key: bytes, array: Any) -> None:
    """Keeps an array."""
    content = io.BytesIO()
    np.save(content, array)
    self._write(self.file(key, ".npy"), content.getvalue())

  def read_json(self, key: bytes) -> Any | None:
    """The value of this key; None where there is none."""
    return self._read(self.file(key, ".json"), lambda content: parse_json(content, "it"))

  def write_json(self, key: bytes, value: Any) -> None:
    """Keeps a value that JSON can hold."""
    self._write(self.file(key, ".json"), json.dumps(value).encode())

  def _read(self, file: pathlib.Path, decode: Callable[[bytes], Any]) -> Any | None:
    try:
      content = file.read_bytes()
    except OSError:
      return None  # not made yet, or no file of this user's: in both cases it is made
    content, _, digest = content.rpartition(_MARK)
    try:
      if digest != _digest(content):
        raise ValueError("it holds other bytes than were written")
      found = decode(content)
    except (ValueError, EOFError, TypeError, UserError) as error:
      logging.warning("%s is damaged (%s), and is made again", file, error)
      return None
    if self._limit is not None:
      # A file's date says when it was used last, which is how room is made. Another process may have removed it for
      # that meanwhile, and it may be another user's.
      with contextlib.suppress(OSError):
        os.utime(file)
    return found

  def _write(self, file: pathlib.Path, content: bytes) -> None:
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      files.sweep(self._folder)
      files.write_whole(file, content + _MARK + _digest(content))
      self._make_room(file.suffix)
    except OSError as error:
      logging.warning("%s are not kept in %s: %s", self._what, self._folder, error.strerror or error)

  def _make_room(self, ending: str) -> None:
    kept = []
    for file in self._folder.glob(f"*{ending}") if self._limit is not None else ():
      with contextlib.suppress(FileNotFoundError):  # another process may make room too
        kept.append((file.stat(), file))
    size = 0
    for status, file in sorted(kept, key=lambda each: each[0].st_mtime, reverse=True):
      size += status.st_size
      if size > (self._limit or 0):
        file.unlink(missing_ok=True)


def _digest(content: bytes) -> bytes:
  return b"%08x" % zlib.crc32(content)
