"""A folder of one's own pictures with captions, in the layouts in which people have them: which one it is, its parts.

| what lies there, at any depth | captions |
|---|---|
| not deeper, dataset_dict.json or state.json of datasets' save_to_disk | columns of the arrow files (tables.py) |
| metadata.jsonl or metadata.csv, as Hugging Face's ImageFolder reads | columns beside `file_name` |
| x.jpg, .png or any of image_files.ENDINGS | x.txt or x.caption beside it |
| x.parquet, as img2dataset or datasets write | columns (tables.py) |

Rows of a split whose images have the same bytes are one record with all their captions. Splits that the source names
stay, `validation` and `valid` as `val`. Where none is `val`, a share of `train` is held out, by a hash of each image's
bytes: no image is on both sides, and more pictures move none to the other side.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import operator
import pathlib
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8

from diffdis_jax.data.prepare import parts, side_by_side, tables
from diffdis_jax.data.prepare.builder import CaptionedImages
from diffdis_jax.data.prepare.card import TILE, spread
from diffdis_jax.data.prepare.image_folder import CALLED
from diffdis_jax.data.prepare.own_pairs import Asked, Pairs
from diffdis_jax.data.prepare.pairs import RawPair, to_record
from diffdis_jax.data.prepare.parts import ITEMS, Part
from diffdis_jax.data.prepare.side_by_side import is_picture, is_text
from diffdis_jax.data.prepare.staging import Report
from diffdis_jax.data.records import Unusable, read_image
from diffdis_jax.data.transforms import resize
from diffdis_jax.errors import UserError

ON_DISK = ("dataset_dict.json", "state.json")
LAYOUTS = (
  "x.jpg with x.txt or x.caption, a metadata.jsonl or metadata.csv with file_name and caption, parquet files with"
  " images and captions, or a folder of datasets' save_to_disk"
)


class OwnPictures(CaptionedImages):
  """Pictures of one's own."""

  name = "files"
  DESCRIPTION = "A folder of pictures with captions."


def find_parts(source: pathlib.Path, asked: Asked) -> list[Part]:
  """Return the parts of the folder, `train` and what is held out of it among them. All images are read once for this.

  Raises:
    UserError: nothing there that can be read so, a key that is there twice, or too few pairs.
  """
  found = _find(source, asked)
  return _cut(source, found, _join(found), asked.held_out)


def preview_parts(source: pathlib.Path, asked: Asked) -> list[Part]:
  """Return the parts of the folder before rows are joined and images held out, for which no image has to be read.

  Raises:
    UserError: as `find_parts`, except for too few pairs.
  """
  found = _find(source, asked)
  rows = [_Rows(_called(pairs), [], {}, [*range(len(pairs.keys))]) for pairs in found]
  return _cut(source, found, rows, held_out=0.0)


def _find(source: pathlib.Path, asked: Asked) -> list[Pairs]:
  parts.check_folder(source, f"a folder of {LAYOUTS}")
  names = list(parts.names_below(source))
  there = {posixpath.basename(name) for name in names}
  if {*names} & {*ON_DISK}:
    found = tables.on_disk(source, asked)
  elif there & {*side_by_side.TABLES}:
    found = side_by_side.by_table(source, names, asked)
  elif side_by_side.has_pair(names):  # of one name: beside tables may lie a LICENSE.txt and a picture of its README
    found = side_by_side.beside(source, names, asked)
  elif tar := next((name for name in names if name.endswith(".tar")), ""):
    # First: beside them img2dataset puts parquet files without images.
    raise UserError(f"{source / posixpath.dirname(tar)} holds tars; prepare_data pairs reads those")
  elif parquet := [name for name in names if name.endswith(".parquet")]:
    found = tables.parquet(source, parquet, asked)
  else:
    raise _nothing(source, names)
  return found


class Shown(NamedTuple):
  """Pairs for a look: squares of card.TILE pixels, and their captions."""

  images: UInt8[np.ndarray, "n h w 3"]
  captions: list[str]


def look(found: Sequence[Part], count: int) -> Shown:
  """Read at most so many pairs of the first split, from all over it, as they would be stored.

  Raises:
    UserError: none of those looked at can be used.
  """
  images, captions, left_out = [], [], Report()
  for pair in _few([part for part in found if part.split == found[0].split], count):
    try:
      record = to_record(pair)
      images.append(np.asarray(resize(read_image(record.fields["image"]), TILE)))
      captions.append(record.fields["caption"])
    except Unusable as error:
      left_out.skip(pair.key, str(error))
  if not images:
    raise UserError(f"no pair to show: {left_out.reasons() or 'there is none'}")
  return Shown(np.stack(images[:count]), captions[:count])


def _few(found: Sequence[Part], count: int) -> Iterator[RawPair]:
  for place in spread(len(found), count):
    part: Any = found[place]
    yield from part.few(-(-count // len(found)))


class _Rows(NamedTuple):
  """The rows of one `Pairs` by place, once rows with equal image bytes are one record.

  Attributes:
    split: what the data set calls it.
    units: the digest of each row's image, or the row's key where no image can be read.
    joined: place -> captions, for the records that have those of several rows.
    places: the places of the records.
  """

  split: str
  units: list[bytes]
  joined: dict[int, tuple[str, ...]]
  places: list[int]


def _join(found: Sequence[Pairs]) -> list[_Rows]:
  """Make one record of all usable rows of a split that have the same image bytes: the first, with the captions of all.

  The images are read once for this. Their digests stay in memory, and the captions of rows with the same image.
  """
  logging.info("reading %d images, to find equal ones", sum(len(pairs.keys) for pairs in found))
  rows: list[_Rows] = []
  seen = collections.defaultdict[str, dict[bytes, tuple[int, int]]](dict)  # split -> digest -> the first such row
  groups: dict[tuple[int, int], list[tuple[int, int]]] = {}  # the first row -> all of its image
  for i, pairs in enumerate(found):
    own = _Rows(_called(pairs), [], {}, [])
    rows.append(own)
    for place, (key, digest) in enumerate(zip(pairs.keys, pairs.digests(), strict=True)):
      own.units.append(digest or key.encode("utf-8", "surrogateescape"))
      first = seen[own.split].setdefault(digest, (i, place)) if digest else (i, place)
      if first != (i, place):
        groups.setdefault(first, [first]).append((i, place))
  captions: dict[tuple[int, int], list[str]] = {}
  in_order = sorted(itertools.chain.from_iterable(groups.values()))
  for i, of_pairs in itertools.groupby(in_order, key=operator.itemgetter(0)):
    places = [place for _, place in of_pairs]
    captions |= {(i, place): texts for place, texts in zip(places, found[i].captions(places), strict=True)}
  dropped: set[tuple[int, int]] = set()
  for group in groups.values():
    # A row whose captions cannot be used stays a record of its own, which the preparation skips and counts.
    usable = [where for where in group if captions[where]]
    if len(usable) > 1:
      first, place = usable[0]
      rows[first].joined[place] = tuple(dict.fromkeys(text for where in usable for text in captions[where]))
      dropped.update(usable[1:])
  if dropped:
    logging.info("%d rows have the same image as another; each image is one record with all captions", len(dropped))
  for i, (own, pairs) in enumerate(zip(rows, found, strict=True)):
    own.places.extend(place for place in range(len(pairs.keys)) if (i, place) not in dropped)
  return rows


def _called(pairs: Pairs) -> str:
  """Return what the data set calls the split."""
  return CALLED.get(pairs.split, pairs.split)


def _cut(source: pathlib.Path, found: Sequence[Pairs], rows: Sequence[_Rows], held_out: float) -> list[Part]:
  """Cut the records into parts of ITEMS, `train` first."""
  held: set[bytes] = set()
  if held_out and (splits := {own.split for own in rows}) >= {"train"} and "val" not in splits:
    held = _held_out(source, [(own, pairs) for own, pairs in zip(rows, found) if own.split == "train"], held_out)
  by_split: dict[str, list[Part]] = {}
  for apart in (False, True):
    for own, pairs in zip(rows, found, strict=True):
      of_train = bool(held) and own.split == "train"
      places = [place for place in own.places if (of_train and own.units[place] in held) == apart]
      split = "val" if apart else own.split
      of_split = by_split.setdefault(split, []) if places else []
      for first in range(0, len(places), ITEMS):
        name = f"{split}-{len(of_split):05d}"
        of_split.append(pairs.part(name, split, places[first : first + ITEMS], own.joined))
  return [part for split in sorted(by_split, key=lambda split: split != "train") for part in by_split[split]]


def _held_out(source: pathlib.Path, train: Sequence[tuple[_Rows, Pairs]], share: float) -> set[bytes]:
  """Choose the images that become `val` by the hash of their bytes, so that none is in both splits."""
  count = sum(len(own.places) for own, _ in train)
  hashes = {own.units[place]: share_of(own.units[place]) for own, pairs in train for place in pairs.whole}
  if count < 2 or len(hashes) == 1:
    there = "one pair" if count else "no pair"
    there += " with picture and caption" if count > 1 else ""
    raise UserError(f"{source} has {there}; give at least two, of which one is held out, or --held_out=0")
  in_order = sorted(hashes, key=hashes.__getitem__)
  # One at least, and one at least stays.
  held = [unit for unit in in_order if hashes[unit] < share] or in_order[:1]
  return {*held[: len(in_order) - 1]}


def share_of(unit: bytes) -> float:
  """Map bytes evenly to numbers from 0 to 1; those below the share that is held out become `val`."""
  return int.from_bytes(hashlib.blake2b(unit, digest_size=8).digest(), "big") / 2**64


def _nothing(source: pathlib.Path, names: Sequence[str]) -> UserError:
  saved = next((name for name in names if posixpath.basename(name) in ON_DISK), "")
  if saved and any(name.endswith(".arrow") for name in names):
    return UserError(f"what save_to_disk wrote lies in {source / posixpath.dirname(saved)}; give that as --source")
  pictures, texts = (sum(map(is_one, names)) for is_one in (is_picture, is_text))
  if pictures and texts:
    return UserError(
      f"{source} has {pictures} pictures and {texts} captions, none for the other; put x.txt into the folder of x.jpg"
    )
  if pictures:
    return UserError(
      f"{source} has {pictures} pictures and no caption; put x.txt or x.caption beside x.jpg, or a metadata.csv with"
      " file_name and caption above them"
    )
  if texts:
    return UserError(f"{source} has {texts} captions and no picture; put x.jpg, .png or .webp beside x.txt")
  return UserError(f"no pictures in {source}; --source is a folder of {LAYOUTS}")
