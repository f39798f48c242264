"""A folder of one's own pictures with captions, in the layouts in which people have them.

| what lies there, at any depth | captions |
|---|---|
| what Hugging Face datasets' save_to_disk wrote, not deeper | columns |
| metadata.csv, .jsonl or .parquet, or another .csv or .jsonl, with a column of file names | columns beside it |
| x.jpg, .png or any of image_files.ENDINGS, with x.txt or x.caption | that file |
| x.parquet with images, as datasets and img2dataset write it | columns |
| CLASS/x.jpg or SPLIT/CLASS/x.jpg | the folder's name |

Rows of a split whose images have the same bytes are one record with all their captions. Splits that the source names
stay. Where none is `val`, a share of `train` is held out, by a hash of each image's bytes: no image is on both sides,
and more pictures move none to the other side.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from diffdis_jax.data import records
from diffdis_jax.data.prepare import parts, tables
from diffdis_jax.data.prepare.parts import ITEMS, SPLITS, FilesPart, Part, RawPair, digest
from diffdis_jax.data.prepare.tables import Asked, TablePart
from diffdis_jax.data.prepare.write import DataSet
from diffdis_jax.errors import UserError

OWN = DataSet("files", "A folder of pictures with captions.")
CLASSES = DataSet(
  "folder", "Images in class folders. The caption is the class's name; label and class are fields of a record."
)
TEXTS = ("txt", "caption")  # endings of a caption's file
LAYOUTS = (
  "x.jpg with x.txt or x.caption, CLASS/x.jpg, a .csv or .jsonl with file names and captions, parquet files with images"
  " and captions, or a folder of datasets' save_to_disk"
)


def _find(source: pathlib.Path, asked: Asked) -> Sequence[FilesPart]:
  """Find out which layout it is, and return the parts of the source, uncut and by their splits' own names."""
  parts.check_folder(source, f"a folder of {LAYOUTS}")
  names = list(parts.names_below(source))
  pictures = [name for name in names if tables.is_picture(name)]
  texts = [name for name in names if tables.ending(name) in TEXTS]
  stem = lambda name: posixpath.splitext(name)[0]
  if asked.captions == "folder":
    return _of_classes(source)
  if asked.captions == "filename":
    return _by_split(source, [parts.file_pair(name, _words(name)) for name in pictures])
  if {*names} & {*tables.SAVED}:
    return tables.saved(source, asked)
  if listed := [name for name in names if posixpath.basename(name) in tables.LISTS]:
    return _by_split(source, tables.listed_pairs(source, listed, names, asked))
  if {*map(stem, pictures)} & {*map(stem, texts)}:
    return _by_split(source, _beside(source, names, asked))
  if tar := next((name for name in names if name.endswith(".tar")), ""):
    # First: beside them img2dataset puts parquet files without images.
    folder = source / posixpath.dirname(tar)
    raise UserError(
      f"{folder} holds tars; type: diffdis prepare_data pairs --source={shlex.quote(str(folder))} --out=DIR"
    )
  if parquet := [name for name in names if name.endswith(".parquet")]:
    return [tables.parquet(source, name, asked) for name in parquet]
  if table := next((name for name in names if tables.ending(name) in ("csv", "jsonl")), ""):
    return _by_split(source, tables.listed_pairs(source, [table], names, asked))
  if pictures and not texts and all("/" in name for name in pictures):
    return _of_classes(source)
  example = f", such as {pictures[0]!r:.100}" if pictures else ""
  raise UserError(
    f"{source} has {len(pictures)} pictures{example}, and {len(texts)} captions, none for the other; --source is a"
    f" folder of {LAYOUTS}, itself and not one above it. --captions=filename takes the files' names"
  )


def _words(name: str) -> str:
  """Make a caption of a file's name: red_apple-01.jpg -> "red apple"."""
  stem = posixpath.splitext(posixpath.basename(name))[0]
  text = re.sub(r"[\W_]+", " ", stem).strip()
  return re.sub(r"\s*\d+$", "", text) or text


def _beside(source: pathlib.Path, names: Sequence[str], asked: Asked) -> list[RawPair]:
  """Read x.txt or x.caption for x.jpg; x.json beside them is its metadata."""
  if asked.caption_fields:
    raise UserError("--caption_fields names columns of a table, and captions lie in files here; leave it out")
  by_key: dict[str, dict[str, str]] = {}
  for name in names:
    ending = tables.ending(name)
    field = "image" if tables.is_picture(name) else "caption" if ending in TEXTS else ending
    if field in ("image", "caption", "json"):
      files = by_key.setdefault(posixpath.splitext(name)[0], {})
      if field in files:
        raise UserError(f"{source} has {files[field]} and {name}, two files for {field} of one key; keep one")
      files[field] = name
  return [_read_beside(source, key, files) for key, files in by_key.items() if files.keys() != {"json"}]


def _read_beside(source: pathlib.Path, key: str, files: Mapping[str, str]) -> RawPair:
  file = files.get("image", "")
  try:
    read = {field: records.read_file(source / name) for field, name in files.items() if field != "image"}
    fields = records.read_metadata(read.pop("json", None))
  except records.Unusable as error:
    return RawPair(key, refused=str(error), file=file)
  return parts.captioned_pair(key, [*read.values()], fields, file=file)


def _by_split(root: pathlib.Path, pairs: Sequence[RawPair]) -> list[FilesPart]:
  """Group pairs by their first folder, where all whole pairs lie in folders with names of splits. Other files, such
  as a README.txt or a folder `test` without captions, are counted in one of these."""
  first = lambda pair: posixpath.dirname(pair.key).lower().partition("/")[0]
  whole = {first(pair) for pair in pairs if pair.file and (pair.caption or pair.refused)}
  if not whole or not whole <= SPLITS.keys():
    return [FilesPart("", "train", root, pairs)]
  elsewhere = "train" if "train" in whole else min(whole)
  by_split = collections.defaultdict[str, list[RawPair]](list)
  for pair in pairs:
    by_split[first(pair) if first(pair) in whole else elsewhere].append(pair)
  return [FilesPart("", split, root, of_split) for split, of_split in sorted(by_split.items())]


def classes(source: pathlib.Path) -> list[Part]:
  """Find the parts of CLASS/IMAGE, or of SPLIT/CLASS/IMAGE with splits of the usual names.

  Classes are numbered by `in_order` over all splits. A record has the number as `label` and the folder's name as
  `class`. Raises UserError: no folder of images; splits mixed with classes, in one of them, or twice.
  """
  parts.check_folder(source, "a folder of class folders")
  return [part for of in _of_classes(source) for part in parts.files(of.pairs, split=SPLITS[of.split], root=source)]


def _of_classes(source: pathlib.Path) -> list[FilesPart]:
  paths = [name.split("/") for name in parts.names_below(source) if tables.is_picture(name)]
  children = {path[0] for path in paths if len(path) > 1}
  splits = {name for name in children if name.lower() in SPLITS}
  # A class may be called `test`: only where all folders are splits are they taken for such.
  if splits and splits != children:
    raise UserError(
      f"{source} mixes splits and classes: {', '.join(sorted(children)[:10])}; if all are classes, move them into one"
      " new folder, train"
    )
  if len({SPLITS[name.lower()] for name in splits}) < len(splits):
    raise UserError(f"{source} has {' and '.join(sorted(splits))}, two of one split; leave one of them")
  depth = 1 if splits else 0
  paths = [path for path in paths if len(path) > depth + 1]
  # Over all splits, so that a class which one of them lacks moves no other's number.
  labels = {name: label for label, name in enumerate(in_order({path[depth] for path in paths}))}
  # Of --source one folder too high each data set would be a class, its test images among them.
  inside = sorted({(path[depth], path[depth + 1]) for path in paths if path[depth + 1].lower() in SPLITS})
  for (name, split), (other_name, other) in itertools.pairwise(inside):
    if name == other_name:
      raise UserError(f"{source / name} has the folders {split}, {other}; if they are splits, give it as --source")
  by_split = collections.defaultdict[str, list[RawPair]](list)
  for path in sorted(paths, key=lambda path: (path[:depth], labels[path[depth]], path)):
    name = path[depth]
    pair = parts.file_pair("/".join(path), name.replace("_", " "), **{"label": labels[name], "class": name})
    by_split[path[0].lower() if splits else "train"].append(pair)
  if not by_split:
    raise UserError(f"no images in class folders in {source}; it should hold CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg")
  return [FilesPart("", split, source, pairs) for split, pairs in by_split.items()]


def in_order(names: Iterable[str]) -> list[str]:
  """Sort class names by their numbers where all of them are whole numbers; else by string, as torchvision does."""
  by_string = sorted(names)
  return sorted(by_string, key=int) if all(name.isdecimal() for name in by_string) else by_string


@dataclasses.dataclass(slots=True)
class _Row:
  """A row of the source that begins a record."""

  part: int  # its number in the source
  split: str
  pair: RawPair  # without the image
  unit: bytes  # the digest of its image, or its key where no image can be read
  is_whole: bool  # whether it has an image and a caption
  captions: list[str]  # of all rows of the split that have the same image
  rows: int = 1  # how many those are

  def joined(self) -> RawPair:
    """Return the pair, with the captions of all rows."""
    if self.rows == 1:
      return self.pair
    fields = {name: value for name, value in json.loads(self.pair.metadata or b"{}").items() if name != "captions"}
    captions = [*dict.fromkeys(self.captions)]
    return parts.captioned_pair(self.pair.key, captions, fields, file=self.pair.file, row=self.pair.row)


def find_parts(source: pathlib.Path, asked: Asked) -> list[Part]:
  """Find the parts of the folder, `train` first, and what is held out of it among them. Raises UserError: nothing there
  that can be read so, or too few pairs.

  All images are read once for this. Their digests and captions stay in memory. All usable rows of a split that have the
  same image bytes are one record: the first row, with the captions of all.
  """
  uncut = _find(source, asked)
  rows = _read_rows(uncut)
  held = _held_out(source, rows, asked.held_out)
  chosen = collections.defaultdict[tuple[int, str], list[RawPair]](list)
  for row in rows:
    chosen[row.part, "val" if row.split == "train" and row.unit in held else row.split].append(row.joined())
  by_split: dict[str, list[Part]] = {"train": []}
  for (number, split), pairs in chosen.items():
    # A table is one part for each split, since it is read from its start.
    size = len(pairs) if isinstance(uncut[number], TablePart) else ITEMS
    same, part = by_split.setdefault(split, []), dataclasses.replace(uncut[number], split=split)
    for start in range(0, len(pairs), size):
      same.append(dataclasses.replace(part, name=f"{split}-{len(same):05d}", pairs=pairs[start : start + size]))
  return [part for of_split in by_split.values() for part in of_split]


def _read_rows(uncut: Sequence[FilesPart]) -> list[_Row]:
  """Read all images, and return the rows that begin a record."""
  rows: list[_Row] = []
  first: dict[tuple[str, bytes], _Row] = {}  # split and image -> the first usable row
  for number, part in enumerate(uncut):
    split = SPLITS.get(part.split, part.split)
    for pair in parts.reading(part):
      unit = digest(pair.image) if pair.image else b""
      # A row whose captions cannot be used stays a record of its own, which the preparation skips and counts.
      captions = _usable_captions(pair) if unit else []
      if captions and (row := first.get((split, unit))):
        row.captions += captions
        row.rows += 1
        continue
      is_whole = bool(pair.image and pair.caption)
      pair.image = None  # all images would not fit the memory
      rows.append(_Row(number, split, pair, unit or parts.encode(pair.key), is_whole, captions))
      if captions:
        first[split, unit] = rows[-1]
  return rows


def _usable_captions(pair: RawPair) -> list[str]:
  """Return the captions of a pair; none where they cannot be used."""
  try:
    metadata = records.read_metadata(pair.metadata)
    return [] if pair.refused else records.captions_of(metadata) or [records.read_caption(pair.caption)]
  except records.Unusable:
    return []


def _held_out(source: pathlib.Path, rows: Sequence[_Row], share: float) -> set[bytes]:
  """Choose the images that become `val` by the hash of their bytes, so that none is in both splits; none where the
  source has a `val`, or no `train`."""
  splits = {row.split for row in rows} or {"train"}
  if not share or "train" not in splits or "val" in splits:
    return set()
  # Evenly from 0 to 1.
  hash_of = lambda unit: int.from_bytes(hashlib.blake2b(unit, digest_size=8).digest(), "big") / 2**64
  hashes = {row.unit: hash_of(row.unit) for row in rows if row.split == "train" and row.is_whole}
  if len(hashes) < 2:
    there = "one pair" if hashes else "no pair"
    raise UserError(
      f"{source} has {there} with picture and caption; give at least two, of which one is held out, or --held_out=0"
    )
  in_order = sorted(hashes, key=hashes.__getitem__)
  # One at least, and one at least stays.
  held = [unit for unit in in_order if hashes[unit] < share] or in_order[:1]
  return {*held[: len(in_order) - 1]}
