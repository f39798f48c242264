"""Reader of webdataset tars in img2dataset's layout: KEY.jpg|.png|.webp, KEY.txt, KEY.json, in any order."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from diffdis_jax.data import tars
from diffdis_jax.data.prepare.pairs import RawPair
from diffdis_jax.data.records import MOST_BYTES, MOST_TEXT_BYTES, Unusable
from diffdis_jax.errors import UserError

FIELDS = {**dict.fromkeys(tars.IMAGE_ENDINGS, "image"), "txt": "caption", "json": "metadata"}
# The last word before the number is the split, whatever stands before it.
_SPLIT = re.compile(r"(?:(?:.*?-)??([A-Za-z]\w*)-)?\d+(?:-of-\d+)?\.tar")


@dataclasses.dataclass
class TarPart:
  """A tar's pairs, in the order in which their keys come first; one in memory at a time. Keys are TAR/KEY.

  A file that cannot be read whole, or is too large, makes its pair a refused one. Iterating raises UserError where a
  key has two images, captions or jsons, or the tar changes meanwhile.

  Attributes:
    truncated: known after iteration: the file ends, or is damaged, before the tar's end mark. Pairs are left out then
      unless they have image and caption, since what they lack may have lain behind that.
    passed_over: known after iteration: ending -> how many files have it and are neither image, caption nor json.
  """

  path: pathlib.Path
  split: str
  truncated: bool = False
  passed_over: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    return self.path.stem

  def identity(self) -> list[Any]:
    # Not a hash, which would read all of a data set before each start.
    status = self.path.stat()
    return [self.path.name, status.st_size, status.st_mtime_ns]

  def __iter__(self) -> Iterator[RawPair]:
    # One open file for all members: a tar has thousands.
    with open(self.path, "rb") as file:
      before = _state(os.fstat(file.fileno()))
      index = tars.index(self.path, FIELDS.get)
      self.truncated, self.passed_over = not index.whole, index.passed_over
      for key, members in index.samples.items():
        # What a pair of a damaged tar lacks may lie behind the damage; without image and caption it is none.
        if index.whole or {"image", "caption"} <= members.keys():
          pair = RawPair(f"{self.name}/{key}")
          try:
            for field, member in members.items():
              most = MOST_BYTES if field == "image" else MOST_TEXT_BYTES
              setattr(pair, field, member.read(most, file))
          except Unusable as error:
            pair.refused = str(error)
          yield pair
      # The places of its files were those of another tar.
      if _state(os.stat(self.path)) != before:
        raise UserError(f"{self.path} changed while it was read; run the same command again when it is whole")


def _state(status: os.stat_result) -> tuple[int, ...]:
  """Return what tells which file it is, and when it was written."""
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def split_of(path: pathlib.Path) -> str | None:
  """`val-00000.tar` and `cc3m-val-0000.tar` -> "val"; img2dataset's bare `00000.tar` -> "train"; else None."""
  match = _SPLIT.fullmatch(path.name)
  return match and (match[1] or "train")
