"""Raw pairs, each of which becomes a record or the reason why it cannot be one, in parts that are each read on their
own, in any process: loose files, and webdataset tars."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from absl import logging
from PIL import Image

from diffdis_jax.data import image_files, records
from diffdis_jax.data import tars as tar_files
from diffdis_jax.data.records import Unusable, read_file
from diffdis_jax.data.transforms import Decoded
from diffdis_jax.errors import UserError

ITEMS = 2000  # of a part of loose files
# Splits by the words that folders and files have for them.
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_TAR_FIELDS = {**dict.fromkeys(tar_files.IMAGE_ENDINGS, "image"), "txt": "caption", "json": "metadata"}
# The last word before the number is the split, whatever stands before it.
_TAR_NAME = re.compile(r"(?:(?:.*?-)??([A-Za-z]\w*)-)?\d+(?:-of-\d+)?\.tar")
MAX_CAPTION = 2000  # characters kept; CLIP reads 77 tokens
JPEG_QUALITY = 92  # of images that are stored smaller; not stated by the paper
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")


@dataclasses.dataclass
class RawPair:
  """The files of one key, as stored. None marks a file that is not there."""

  key: str
  image: bytes | None = None
  caption: bytes | None = None
  metadata: bytes | None = None
  refused: str = ""  # why one of them was not read, one of records.REASONS
  file: str = ""  # that has the image, where it is still to be read
  row: int = 0  # of the image there, if it is a table


def mend(caption: str) -> str:
  """Return a caption without control characters, which become spaces, and without its end if it is too long. Raises
  Unusable: nothing remains."""
  if not (caption := _CONTROL.sub(" ", caption).strip()[:MAX_CAPTION].rstrip()):
    raise Unusable("missing caption")
  return caption


def shrink(image: Decoded, short_side: int) -> bytes:
  """Return a JPEG of the image with its short side reduced to `short_side` pixels."""
  scale = short_side / min(image.width, image.height)
  width, height = (max(short_side, round(side * scale)) for side in (image.width, image.height))
  file = io.BytesIO()
  small = image.image.resize((width, height), Image.Resampling.BICUBIC, box=(0, 0, *image.sides))
  small.save(file, "JPEG", quality=JPEG_QUALITY)
  return file.getvalue()


def to_record(pair: RawPair, *, short_side: int | None = None) -> dict[str, Any]:
  """Return the fields {image, caption, metadata} of a pair's record. Raises Unusable, with the first reason found.

  Images whose short side is longer than `short_side` are stored as JPEG of that short side. None keeps the bytes of all
  images but AVIF and HEIC, which become JPEG.
  """
  if pair.refused:
    raise Unusable(pair.refused)
  if pair.image is None:
    raise Unusable("missing image")
  caption = mend(records.read_caption(pair.caption))
  # Read for its errors alone: it is stored as it is, so that no number is written differently.
  records.read_metadata(pair.metadata)
  # Decoded even where its bytes are kept: what cannot be read in training is left out here, and counted. For errors
  # alone an eighth of the pixels will do: the file is read to its end for any number of them.
  image, data = records.read_image(pair.image, at_least=short_side or 1), pair.image
  side = min(image.width, image.height)
  if side > (short_side or side) or image_files.is_of_a_phone(data):  # so that training needs no extra
    data = shrink(image, min(side, short_side or side))
  try:
    metadata = (pair.metadata or b"{}").decode()
  except UnicodeDecodeError as error:
    raise Unusable("corrupt json") from error
  return {"image": data, "caption": caption, "metadata": metadata}


def digest(data: bytes) -> bytes:
  """Return 16 bytes that tell an image's content, as downloaded."""
  return hashlib.blake2b(data, digest_size=16).digest()


@runtime_checkable
class Part(Protocol):
  """A part of a raw data set, which iterates over RawPair, or over what its stage takes. Its name is that of a file
  without its ending, unique in the data set."""

  name: str
  split: str

  def __iter__(self) -> Iterator[Any]: ...

  def identity(self) -> list[Any]:
    """Return JSON that differs when the part does, so that a preparation is not resumed with another source."""
    ...


@dataclasses.dataclass
class FilesPart:
  """Pairs whose images lie as files under `root`. A file that is not there leaves its pair without an image."""

  name: str
  split: str
  root: pathlib.Path
  pairs: Sequence[RawPair]

  def identity(self) -> list[Any]:
    # All pairs count: a class that is taken out of another split moves the labels of this one.
    digest = hashlib.blake2b(digest_size=16)
    for pair in self.pairs:
      digest.update(repr(pair).encode("utf-8", "surrogatepass"))
    for file in sorted({pair.file for pair in self.pairs if pair.file}):
      digest.update(repr(stamp(self.root / file)).encode())
    return [self.name, len(self.pairs), digest.hexdigest()]

  def __iter__(self) -> Iterator[RawPair]:
    for pair in self.pairs:
      try:
        image = read_file(self.root / pair.file) if pair.file else None
      except Unusable as error:
        yield dataclasses.replace(pair, refused=str(error))
      else:
        yield dataclasses.replace(pair, image=image)


@dataclasses.dataclass
class TarPart:
  """The pairs of a tar as img2dataset writes it: KEY.jpg, .png or .webp, KEY.txt, KEY.json, in any order.

  Keys are TAR/KEY, in the order in which they come first. After iteration `truncated` says that the file ends, or is
  damaged, before the tar's end mark. Pairs without image or caption are left out then, since these may have followed.
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
              setattr(pair, field, member.read_from(file))
          except Unusable as error:
            pair.refused = str(error)
          yield pair
      # The places of its files were those of another tar.
      if stamp(self.path) != before:
        raise UserError(f"{self.path} changed while it was read; run the same command again when it is whole")


def file_pair(file: str, caption: str = "", **fields: Any) -> RawPair:
  """Make the pair of an image file, whose name is the key, with its caption and further fields."""
  return RawPair(file, None, encode(caption), encode(json.dumps(fields, ensure_ascii=False)), file=file)


def captioned_pair(key: str, captions: Sequence[bytes | str], fields: Mapping[str, Any], **how: Any) -> RawPair:
  """Make a pair with these captions, of which empty ones do not count; several become the field `captions`. `how` has
  further fields of RawPair."""
  raw = [text if isinstance(text, bytes) else encode(text) for text in captions]
  raw = [text for text in raw if text.strip()]
  if len(raw) > 1:
    try:
      fields = {**fields, "captions": [records.read_caption(text) for text in raw]}
    except Unusable as error:
      return RawPair(key, refused=str(error), **how)
  return RawPair(key, caption=raw[0] if raw else None, metadata=encode(json.dumps(fields, ensure_ascii=False)), **how)


def reading(part: Iterable[Any]) -> Iterator[Any]:
  """Yield what a part holds. Raise UserError: a file of it cannot be read."""
  try:
    yield from part
  except OSError as error:
    name = f"part {part.name} of " if isinstance(part, Part) and part.name else ""
    raise UserError(f"cannot read {name}--source: {error}; put it right and run it again") from error


def stamp(path: pathlib.Path) -> list[int]:
  """Return a file's size and time of change, which show that it was edited; nothing where there is no such file."""
  with contextlib.suppress(OSError, ValueError):  # it is counted where it is read
    return [(status := path.stat()).st_size, status.st_mtime_ns]
  return []


def encode(text: str) -> bytes:
  """Encode a text, whose bytes that were not UTF-8 stay as they were. Half a character, which JSON may hold, becomes no
  UTF-8 either."""
  try:
    return text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return text.encode("utf-8", "surrogatepass")


def tars(source: pathlib.Path) -> list[Part]:
  """Find the tars of a folder, by split and name. Raises UserError: no folder, no tars in it, or a tar whose name gives
  no split."""
  check_folder(source, "a folder of webdataset tars")
  by_split = collections.defaultdict(list)
  # Without hidden ones, such as macOS leaves on other disks.
  for path in sorted(path for path in source.glob("*.tar") if not tar_files.is_hidden(path.name)):
    match = _TAR_NAME.fullmatch(path.name)
    split = match and (match[1] or "train")
    # `all` is TFDS's own name for the union of splits.
    if split is None or split == "all":
      raise UserError(f"cannot tell the split of {path.name}; name tars SPLIT-00000.tar, SPLIT not 'all', or 00000.tar")
    by_split[split].append(TarPart(path, split))
  if not by_split:
    raise UserError(f"no .tar files in {source}; --source is a folder of webdataset tars, such as img2dataset writes")
  return [part for parts in by_split.values() for part in parts]


def files(
  pairs: Sequence[RawPair], *, split: str, root: pathlib.Path, part: Callable[..., FilesPart] = FilesPart
) -> list[Part]:
  """Cut loose files of one split into parts, in order."""
  return [
    part(f"{split}-{number:05d}", split, root, pairs[start : start + ITEMS])
    for number, start in enumerate(range(0, len(pairs), ITEMS))
  ]


def names_below(folder: pathlib.Path, inside: str = "") -> Iterator[str]:
  """Yield files at any depth, relative, in order; without hidden ones, and what a link to a folder leads to. Raises
  OSError: a folder cannot be read."""
  for entry in sorted(os.scandir(folder / inside), key=lambda entry: (entry.is_dir(), entry.name)):
    path = f"{inside}{entry.name}"
    if tar_files.is_hidden(entry.name):
      continue
    if not entry.is_dir():
      yield path
    elif not entry.is_symlink():
      yield from names_below(folder, f"{path}/")
    else:  # which might lead around in a circle
      logging.warning("%s is a link to a folder, and left out; copy or mount it there", folder / path)


def check_folder(source: pathlib.Path, what: str) -> None:
  """Raise UserError for a folder that is not there."""
  if not source.is_dir():
    raise UserError(f"no folder {source}; --source is {what}")
