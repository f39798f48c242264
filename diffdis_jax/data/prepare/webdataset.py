"""Streaming reader of webdataset tars in img2dataset's layout: KEY.jpg|.png|.webp, KEY.txt, KEY.json side by side."""

from __future__ import annotations

import os
import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any

from diffdis_jax.data.prepare.pairs import RawPair

FIELDS = {
  **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
  "txt": "caption",
  "json": "metadata",
}
_BLOCK = 512  # of a tar; two blocks of zeros end it
_SPLIT = re.compile(r"(?:(?:.*?-)??([A-Za-z]\w*)-)?\d+(?:-of-\d+)?\.tar")


class TarReader:
  """Iterates over the pairs of one tar, one in memory at a time.

  Attributes:
    truncated: known after iteration: the file ends, or is damaged, before the tar's end mark. A pair that was being
      read there is left out unless it has image and caption.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self.truncated = False

  def __iter__(self) -> Iterator[RawPair]:
    pair = None
    for key, field, data in self._files():
      if pair is None or key != pair.key:
        if pair is not None:
          yield pair
        pair = RawPair(key)
      setattr(pair, field, data)
    if pair is not None and (not self.truncated or (pair.image is not None and pair.caption is not None)):
      yield pair

  def _files(self) -> Iterator[tuple[str, str, bytes]]:
    tar: Any  # its annotations lack `members`
    with open(self.path, "rb") as file:
      try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
          while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile remembers every member otherwise
            key, _, extension = _split_name(member.name)
            field = FIELDS.get(extension.lower())
            if field and member.isfile():
              yield key, field, tar.extractfile(member).read()
          file.seek(tar.offset)
          self.truncated = file.read(_BLOCK) != bytes(_BLOCK)
      except tarfile.TarError:
        self.truncated = True


def _split_name(name: str) -> tuple[str, str, str]:
  """A member's path -> key, dot, extension. The key goes to the first dot of the file's name, as in webdataset."""
  folder, slash, base = name.rpartition("/")
  stem, dot, extension = base.partition(".")
  return folder + slash + stem, dot, extension


def split_of(path: pathlib.Path) -> str | None:
  """`val-00000.tar` and `cc3m-val-0000.tar` -> "val"; img2dataset's bare `00000.tar` -> "train"; else None."""
  match = _SPLIT.fullmatch(path.name)
  return match and (match[1] or "train")
