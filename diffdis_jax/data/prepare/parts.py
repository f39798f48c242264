"""Raw data sets, cut into parts that are each read on their own, in any process: loose files, and webdataset tars."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from absl import logging

from diffdis_jax.data import paths, records
from diffdis_jax.data import tars as tar_files
from diffdis_jax.data.prepare.pairs import RawPair
from diffdis_jax.data.records import MOST_BYTES, MOST_TEXT_BYTES, Unusable, read_file
from diffdis_jax.errors import UserError

ITEMS = 2000  # of a part of loose files
# Splits by the words that folders and files have for them.
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_TAR_FIELDS = {**dict.fromkeys(tar_files.IMAGE_ENDINGS, "image"), "txt": "caption", "json": "metadata"}
# The last word before the number is the split, whatever stands before it.
_TAR_NAME = re.compile(r"(?:(?:.*?-)??([A-Za-z]\w*)-)?\d+(?:-of-\d+)?\.tar")


@runtime_checkable
class Part(Protocol):
  """A part of a raw data set, which iterates over RawPair, or over what its stage takes.

  Attributes:
    name: a file name without its ending, unique in the data set.
    split: of the data set.
  """

  name: str
  split: str

  def __iter__(self) -> Iterator[Any]: ...

  def identity(self) -> list[Any]:
    """Return JSON that differs when the part does, so that a preparation is not resumed with another source."""
    ...


@dataclasses.dataclass(frozen=True)
class Item:
  """An image file, relative to the root, with a caption and JSON.

  Attributes:
    file: empty where there is none.
    key: of the record; by default the file.
    refused: why what belongs to it cannot be used, one of records.REASONS.
  """

  file: str
  caption: str = ""
  metadata: str = "{}"
  key: str = ""
  refused: str = ""


@dataclasses.dataclass
class FilesPart:
  """Images that lie as files under `root`. A file that is not there is a pair without an image."""

  name: str
  split: str
  root: pathlib.Path
  items: Sequence[Item]

  def identity(self) -> list[Any]:
    # Of all of them: a class that is taken out of another split moves the labels of this one.
    digest = hashlib.blake2b(digest_size=16)
    for item in self.items:
      digest.update(f"{item!r}{stamp(self.root / item.file)}".encode("utf-8", "surrogatepass"))
    return [self.name, len(self.items), digest.hexdigest()]

  def at(self, places: Sequence[int]) -> FilesPart:
    """Return the part of these items alone."""
    return dataclasses.replace(self, items=[self.items[place] for place in places])

  def __iter__(self) -> Iterator[RawPair]:
    for item in self.items:
      pair = RawPair(item.key or item.file, None, encode(item.caption), encode(item.metadata), item.refused)
      try:
        pair.image = read_file(self.root / item.file, within=self.root) if item.file else None
      except Unusable as error:
        pair.refused = str(error)
      yield pair


@dataclasses.dataclass
class TarPart:
  """The pairs of a tar as img2dataset writes it: KEY.jpg, .png or .webp, KEY.txt, KEY.json, in any order.

  Keys are TAR/KEY, in the order in which they come first. A file that is too large, or not whole, makes its pair a
  refused one.

  Attributes:
    truncated: known after iteration: the file ends, or is damaged, before the tar's end mark. Pairs are left out then
      unless they have image and caption, since what they lack may have lain behind that.
  """

  path: pathlib.Path
  split: str
  truncated: bool = False

  @property
  def name(self) -> str:
    return self.path.stem

  def identity(self) -> list[Any]:
    # Not a hash, which would read all of a data set before each start.
    return [self.path.name, *stamp(self.path)]

  def __iter__(self) -> Iterator[RawPair]:
    # One open file for all members: a tar has thousands.
    with open(self.path, "rb") as file:
      before = stamp(self.path)
      index = tar_files.index(self.path, _TAR_FIELDS.get)
      self.truncated = not index.whole
      for key, members in index.samples.items():
        if index.whole or {"image", "caption"} <= members.keys():
          pair = RawPair(f"{self.name}/{key}")
          try:
            for field, member in members.items():
              setattr(pair, field, member.read(MOST_BYTES if field == "image" else MOST_TEXT_BYTES, file))
          except Unusable as error:
            pair.refused = str(error)
          yield pair
      # The places of its files were those of another tar.
      if stamp(self.path) != before:
        raise UserError(f"{self.path} changed while it was read; run the same command again when it is whole")


def pair_of(key: str, image: bytes | None, captions: Sequence[bytes | str], fields: Mapping[str, Any]) -> RawPair:
  """Make a pair with these captions, of which empty ones do not count; several become the field `captions`.

  A caption that is not UTF-8 is the reason why the pair is refused, where it is one of several.
  """
  raw = [text if isinstance(text, bytes) else encode(text) for text in captions]
  raw = [text for text in raw if text.strip()]
  if len(raw) > 1:
    try:
      fields = {**fields, "captions": [records.read_caption(text) for text in raw]}
    except Unusable as error:
      return RawPair(key, image, refused=str(error))
  return RawPair(key, image, raw[0] if raw else None, encode(json.dumps(fields, ensure_ascii=False)))


def item_of(pair: RawPair, file: str) -> Item:
  """Make an item of a pair whose image is this file."""
  caption, metadata = (
    data.decode("utf-8", "surrogateescape") for data in (pair.caption or b"", pair.metadata or b"{}")
  )
  return Item(file, caption, metadata, pair.key, pair.refused)


def reading(part: Iterable[Any]) -> Iterator[Any]:
  """Yield what a part holds. Raise UserError: a file of it cannot be read."""
  try:
    yield from part
  except OSError as error:
    name = f"part {part.name} of " if isinstance(part, Part) and part.name else ""
    raise UserError(f"cannot read {name}--source: {error}; put it right and run it again") from error


def stamp(path: pathlib.Path) -> list[int]:
  """Return a file's size and time of change, which show that it was edited; nothing where there is no such file."""
  try:
    status = path.stat()
  except (OSError, ValueError):  # it is counted where it is read
    return []
  return [status.st_size, status.st_mtime_ns]


def encode(text: str) -> bytes:
  """Encode a text, whose bytes that were not UTF-8 stay as they were. Half a character, which JSON may hold, becomes no
  UTF-8 either."""
  try:
    return text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return text.encode("utf-8", "surrogatepass")


def tars(source: pathlib.Path) -> list[Part]:
  """Find the tars of a folder, by split and name.

  Raises:
    UserError: no folder, no tars in it, or a tar whose name gives no split.
  """
  check_folder(source, "a folder of webdataset tars")
  by_split = collections.defaultdict(list)
  # Without hidden ones, such as macOS leaves on other disks.
  for path in sorted(path for path in source.glob("*.tar") if not paths.is_hidden(path.name)):
    check_file(path)
    match = _TAR_NAME.fullmatch(path.name)
    split = match and (match[1] or "train")
    # `all` is TFDS's own name for the union of splits.
    if split is None or split == "all":
      raise UserError(f"cannot tell the split of {path.name}; name tars SPLIT-00000.tar, SPLIT not 'all', or 00000.tar")
    by_split[split].append(TarPart(path, split))
  if not by_split:
    raise UserError(f"no .tar files in {source}; --source is a folder of webdataset tars, such as img2dataset writes")
  return [part for parts in by_split.values() for part in parts]


def files(items: Iterable[Item], *, split: str, root: pathlib.Path) -> list[Part]:
  """Cut loose files of one split into parts, in order."""
  # Cut as they are read: a table may have millions of rows.
  items, found = iter(items), []
  while chunk := tuple(itertools.islice(items, ITEMS)):
    found.append(FilesPart(f"{split}-{len(found):05d}", split, root, chunk))
  return found


def names_below(folder: pathlib.Path) -> Iterator[str]:
  """Yield files at any depth, relative, in order; without hidden ones, and what a link to a folder leads to.

  Raises:
    OSError: a folder cannot be read.
  """

  def stop(error: OSError) -> None:
    raise error

  for path, below, names in os.walk(folder, onerror=stop):
    below[:] = sorted(name for name in below if not paths.is_hidden(name))
    for name in below:
      if os.path.islink(os.path.join(path, name)):  # which might lead around in a circle
        logging.warning("%s is a link to a folder, and left out; copy or mount it there", os.path.join(path, name))
    inside = pathlib.Path(path).relative_to(folder).as_posix()
    yield from (posixpath.normpath(f"{inside}/{name}") for name in sorted(names) if not paths.is_hidden(name))


def check_file(path: pathlib.Path) -> None:
  """Refuse a pipe, a device or a folder in the place of a file. Raises UserError."""
  if path.exists() and not path.is_file():
    raise UserError(f"{path} is no plain file; put one in its place, or take it out of --source")


def check_folder(source: pathlib.Path, what: str) -> None:
  """Refuse a folder that is not there. Raises UserError."""
  if not source.is_dir():
    raise UserError(f"no folder {source}; --source is {what}")
