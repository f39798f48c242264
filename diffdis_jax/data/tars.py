"""Uncompressed tars as webdataset packs them, KEY.ENDING beside KEY.ENDING, indexed by their headers and read by place.

A tar's files may lie in any order: `tar cf` takes them as the folder happens to list them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Callable
from typing import Any, BinaryIO

from diffdis_jax.data.image_files import Unusable
from diffdis_jax.errors import Gone, UserError

IMAGE_ENDINGS = frozenset({"jpg", "jpeg", "png", "webp"})
_BLOCK = 512  # of a tar; two blocks of zeros end it


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
  """The place of a file's bytes in a tar."""

  path: pathlib.Path
  offset: int
  size: int

  def read(self) -> bytes:
    """Read the bytes. Raises Gone: the tar is not there any more; otherwise as `read_from`."""
    try:
      with open(self.path, "rb") as file:
        return self.read_from(file)
    except FileNotFoundError as error:
      raise Gone(f"{self.path} is not there") from error

  def read_from(self, file: BinaryIO) -> bytes:
    """Read the bytes from the open tar. Raises Unusable: it was cut off since it was indexed."""
    file.seek(self.offset)
    content = file.read(self.size)
    if len(content) < self.size:
      raise Unusable("unreadable record")
    return content


@dataclasses.dataclass(frozen=True)
class Index:
  """The content of a tar: key -> field -> its file, in the order in which the keys come first. A key is a path without
  its ending, which begins at the last dot. A tar that is not whole is cut off or damaged before its end mark."""

  samples: dict[str, dict[str, Member]]
  whole: bool


def is_hidden(name: str) -> bool:
  """Say whether a file or folder is a program's own, such as .git, or macOS's beside others; ..b is not."""
  return name.startswith((".", "__MACOSX")) and not name.startswith("..")


def index(path: pathlib.Path, field_of: Callable[[str], str | None]) -> Index:
  """Read a tar's headers. `field_of` says what a file of an ending, in small letters, is; None to pass over it. Raises
  UserError: two files of one field and key; OSError: the tar cannot be read."""
  samples: dict[str, dict[str, Member]] = {}
  with open(path, "rb") as file:
    end = os.fstat(file.fileno()).st_size
    try:
      # Uncompressed alone: in a compressed tar no file has a place.
      tar: Any = tarfile.open(fileobj=file, mode="r:")
      while (entry := tar.next()) is not None:
        if entry.size < 0 or tar.offset > end:  # damaged, and might lead back
          return Index(samples, whole=False)
        tar.members.clear()  # tarfile remembers every member otherwise
        key, ending = posixpath.splitext(entry.name)
        field = field_of(ending[1:].lower())
        # A link, a device or a sparse file is not stored whole where it stands. macOS packs hidden files beside others.
        if field is None or not entry.isfile() or entry.issparse() or is_hidden(posixpath.basename(key)):
          continue
        if field in (sample := samples.setdefault(key, {})):
          raise UserError(
            f"{path} has two files for {field} of {key!r}, the second of them {entry.name!r}; pack it again with one"
          )
        sample[field] = Member(path, entry.offset_data, entry.size)
      # To tarfile a tar that is cut off between two files has ended well; only blocks of zeros show that it has.
      file.seek(tar.offset)
      return Index(samples, whole=file.read(_BLOCK) == bytes(_BLOCK))
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError):  # of a damaged header
      return Index(samples, whole=False)
