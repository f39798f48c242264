"""Uncompressed tars as webdataset packs them, KEY.ENDING beside KEY.ENDING, indexed by their headers and read by place.

A tar's files may lie in any order: `tar cf` takes them as the folder happens to list them.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from diffdis_jax.data import paths
from diffdis_jax.data.records import NOT_PLAIN, TOO_LARGE, Unusable
from diffdis_jax.errors import Gone, UserError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "webp"})
_BLOCK = 512  # of a tar; two blocks of zeros end it
_HEADER = 2**20  # bytes that a header of a long name, or of further fields, may have


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
  """The place of a file's bytes in a tar.

  Attributes:
    size: bytes; None for what is not stored whole where it stands: a sparse file, a link, a device.
  """

  path: pathlib.Path
  offset: int
  size: int | None

  def read(self, most: int, file: BinaryIO | None = None) -> bytes:
    """The bytes.

    Args:
      most: of them.
      file: the tar, where it is open already.

    Raises:
      Unusable: before anything is read, a file of more bytes, or one that is not stored whole; or the tar was cut off
        since it was indexed.
      Gone: the tar, which was there when it was indexed.
    """
    if self.size is None:
      raise Unusable(NOT_PLAIN)
    if self.size > most:
      raise Unusable(TOO_LARGE)
    if file is None:
      try:
        with open(self.path, "rb") as file:
          return self.read(most, file)
      except FileNotFoundError as error:
        raise Gone(f"{self.path} is not there") from error
    file.seek(self.offset)
    found = file.read(self.size)
    if len(found) < self.size:
      raise Unusable("unreadable record")
    return found


@dataclasses.dataclass(frozen=True)
class Index:
  """The content of a tar.

  Attributes:
    samples: key -> field -> its file, in the order in which the keys come first. A key is a path without its ending,
      which begins at the last dot.
    whole: whether the tar's end mark was reached; otherwise it is cut off or damaged there, and the rest is not known.
    passed_over: ending, or `hidden` -> how many such files are none of the fields.
  """

  samples: dict[str, dict[str, Member]]
  whole: bool
  passed_over: dict[str, int]


def index(path: pathlib.Path, field_of: Callable[[str], str | None]) -> Index:
  """Reads a tar's headers. It takes some hundred bytes of memory a sample.

  Args:
    path: of the tar.
    field_of: what a file's ending, in small letters, says that it is; None to pass over it.

  Raises:
    UserError: two files of one field and key.
    OSError: the tar cannot be read.
  """
  samples: dict[str, dict[str, Member]] = {}
  passed_over = collections.Counter[str]()
  with open(path, "rb") as file:
    entries = _Entries(file)
    for entry in entries:
      if entry.isdir():
        continue
      key, ending = posixpath.splitext(entry.name)
      field = field_of(ending[1:].lower())
      hidden = paths.is_hidden(posixpath.basename(entry.name))  # such as macOS packs beside each file
      if field is None or hidden:
        passed_over["hidden" if hidden else ending.lower() or "without an ending"] += 1
        continue
      sample = samples.setdefault(key, {})
      if field in sample:
        raise UserError(
          f"{path} has two files for {field} of {key!r}, the second of them {entry.name!r}; pack it again with one"
        )
      plain = entry.isfile() and not entry.issparse()
      sample[field] = Member(path, entry.offset_data, entry.size if plain else None)
  return Index(samples, entries.whole, dict(passed_over))


class _Entries:
  """The headers of an open tar, as far as they and what belongs to them can be read; then, whether that was all."""

  def __init__(self, file: BinaryIO):
    self._file = file
    self.whole = False

  def __iter__(self) -> Iterator[tarfile.TarInfo]:
    end, reached = os.fstat(self._file.fileno()).st_size, -1
    headers: Any = _Headers(self._file)
    try:
      # Uncompressed alone: in a compressed tar no file has a place.
      tar: Any = tarfile.open(fileobj=headers, mode="r:")
      while (entry := tar.next()) is not None:
        if not reached < tar.offset <= end or entry.size < 0:  # such a header could lead back
          return
        reached = tar.offset
        tar.members.clear()  # tarfile remembers every member otherwise
        yield entry
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):  # a damaged header leads tarfile into any
      return
    # To tarfile a tar that is cut off between two files has ended well; only blocks of zeros show that it has.
    self._file.seek(tar.offset)
    self.whole = self._file.read(_BLOCK) == bytes(_BLOCK)


class _Headers:
  """A file of which no more is read at once than a header can have."""

  def __init__(self, file: BinaryIO):
    self.seek, self.tell, self._file = file.seek, file.tell, file

  def read(self, size: int) -> bytes:
    if not 0 <= size <= _HEADER:
      raise tarfile.ReadError(f"a header of {size} bytes")
    return self._file.read(size)
