"""A folder of one's own pictures with captions, in the layouts in which people have them: which one it is, its parts.

| what lies there, at any depth | captions |
|---|---|
| not deeper, dataset_dict.json or state.json of datasets' save_to_disk | columns of the arrow files (tables.py) |
| metadata.jsonl or metadata.csv, as Hugging Face's ImageFolder reads | columns beside `file_name` |
| x.jpg, .png or any of image_files.ENDINGS | x.txt or x.caption beside it |
| x.parquet, as img2dataset or datasets write | columns (tables.py) |

Splits that the source names stay, `validation` and `valid` as `val`. Where none is `val`, a share of `train` is held
out, by a hash of each key: more pictures, or the same ones again, move no pair to the other side.
"""

from __future__ import annotations

import hashlib
import pathlib
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
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
  """The parts of the folder, `train` and what is held out of it among them.

  Raises:
    UserError: nothing there that can be read so, a picture or a key that is there twice, or too few pairs.
  """
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
  return _cut(source, found, asked.held_out)


class Shown(NamedTuple):
  """Pairs for a look: squares of card.TILE pixels, and their captions."""

  images: UInt8[np.ndarray, "n h w 3"]
  captions: list[str]


def look(found: Sequence[Part], count: int) -> Shown:
  """At most so many pairs of the first split, from all over it, as they would be stored.

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


def _cut(source: pathlib.Path, found: Sequence[Pairs], held_out: float) -> list[Part]:
  """Parts of ITEMS pairs, `train` first."""
  splits = [CALLED.get(pairs.split, pairs.split) for pairs in found]
  keys = [pairs.keys for pairs in found]
  chosen: list[set[int]] = [set() for _ in found]
  if held_out and "train" in splits and "val" not in splits:
    of_train = [i for i, split in enumerate(splits) if split == "train"]
    count = sum(len(keys[i]) for i in of_train)
    hashes = {(i, place): _hash(keys[i][place]) for i in of_train for place in found[i].whole}
    if count < 2 or len(hashes) == 1:
      there = "one pair" if count else "no pair"
      there += " with picture and caption" if count > 1 else ""
      raise UserError(f"{source} has {there}; give at least two, of which one is held out, or --held_out=0")
    in_order = sorted(hashes, key=hashes.__getitem__)
    # One at least, and one at least stays.
    held = [where for where in in_order if hashes[where] < held_out] or in_order[:1]
    for i, place in held[: len(in_order) - 1]:
      chosen[i].add(place)
  by_split: dict[str, list[Part]] = {}
  for held in (False, True):
    for pairs, of_pairs, split, apart in zip(found, keys, splits, chosen, strict=True):
      places = [place for place in range(len(of_pairs)) if (place in apart) == held]
      split = "val" if held else split
      of_split = by_split.setdefault(split, []) if places else []
      for first in range(0, len(places), ITEMS):
        of_split.append(pairs.part(f"{split}-{len(of_split):05d}", split, places[first : first + ITEMS]))
  return [part for split in sorted(by_split, key=lambda split: split != "train") for part in by_split[split]]


def _hash(key: str) -> float:
  """Of a key, evenly from 0 to 1."""
  digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
  return int.from_bytes(digest, "big") / 2**64


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
