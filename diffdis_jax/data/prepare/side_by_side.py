"""Pictures that lie as files, with captions in files beside them, or in Hugging Face's metadata.jsonl or .csv."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import hashlib
import os
import pathlib
import posixpath
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from diffdis_jax.data import image_files, records, tars
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.card import spread
from diffdis_jax.data.prepare.image_folder import SPLITS
from diffdis_jax.data.prepare.own_pairs import (
  SEVERAL,
  Asked,
  Pairs,
  caption_fields,
  is_plain,
  other_fields,
  pair_of,
  usable_captions,
)
from diffdis_jax.data.prepare.pairs import RawPair
from diffdis_jax.data.prepare.pairs import digest as digest_of
from diffdis_jax.data.prepare.parts import ITEMS, Part
from diffdis_jax.data.records import MOST_TEXT_BYTES, TOO_LARGE, Unusable, read_file
from diffdis_jax.errors import UserError, parse_json

TEXTS = ("txt", "caption")  # endings of a caption's file
FILE_NAME = "file_name"
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclasses.dataclass(frozen=True)
class Sample:
  """The place of a pair. Files are relative to the root, and empty where there is none.

  Attributes:
    captions: texts; or files, where `is_file`.
    metadata: its fields.
    metadata_file: a file with more of them.
    joined: whether the captions are those of several rows with the same image.
  """

  key: str
  image: str = ""
  captions: tuple[str, ...] = ()
  is_file: bool = False
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  metadata_file: str = ""
  joined: bool = False

  @property
  def is_whole(self) -> bool:
    """Say whether the sample seems to have image and caption."""
    return bool(self.image and any(self.captions))

  @property
  def folder(self) -> str:
    """The first one of its path, in lower case; empty where it lies in none."""
    first, slash, _ = self.key.partition("/")
    return first.lower() if slash else ""


@dataclasses.dataclass
class SamplesPart:
  """Pairs that lie as files under `root`."""

  name: str
  split: str
  root: pathlib.Path
  samples: Sequence[Sample]
  fields: tuple[str, ...] = ()
  truncated: bool = False

  def identity(self) -> list[Any]:
    # Of all of them, since a caption in the middle of a table may be mended before the same command is run again.
    digest = hashlib.blake2b(digest_size=16)
    for sample in self.samples:
      names = (sample.image, sample.metadata_file, *(sample.captions if sample.is_file else ()))
      stamps = [parts.stamp(self.root / name) for name in names if name]
      digest.update(f"{sample!r}{stamps}".encode())
    return [self.name, len(self.samples), digest.hexdigest(), *self.fields]

  def few(self, count: int) -> Iterator[RawPair]:
    """Yield at most so many pairs, from all over the part."""
    places = spread(len(self.samples), count)
    return iter(dataclasses.replace(self, samples=[self.samples[place] for place in places]))

  def __iter__(self) -> Iterator[RawPair]:
    for sample in self.samples:
      try:
        image = read_file(self.root / sample.image, within=self.root) if sample.image else None
        texts = [self._text(each) for each in sample.captions] if sample.is_file else sample.captions
        more = records.read_metadata(self._text(sample.metadata_file)) if sample.metadata_file else {}
        fields = {**sample.metadata, **more}
        if sample.joined or (self.fields and SEVERAL in more):  # `texts` are all captions, or those that were asked for
          fields.pop(SEVERAL, None)
        yield dataclasses.replace(pair_of(sample.key, image, texts, fields), joined=sample.joined)
      except Unusable as error:
        yield RawPair(sample.key, refused=str(error))

  def _text(self, name: str) -> bytes:
    """Read a small file. Raises Unusable: it has too many bytes, is no plain file, or lies outside."""
    path = self.root / name
    if path.is_file() and path.stat().st_size > MOST_TEXT_BYTES:
      raise Unusable(TOO_LARGE)
    return read_file(path, within=self.root)


@dataclasses.dataclass(frozen=True)
class Samples:
  """Pairs that lie as files, of one split."""

  split: str
  root: pathlib.Path
  samples: Sequence[Sample]
  fields: tuple[str, ...] = ()

  @property
  def keys(self) -> Sequence[str]:
    return [sample.key for sample in self.samples]

  @property
  def whole(self) -> Sequence[int]:
    return [i for i, sample in enumerate(self.samples) if sample.is_whole]

  def digests(self) -> Iterator[bytes]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(self.samples), ITEMS):  # so that few results wait in memory
        yield from pool.map(self._digest, self.samples[start : start + ITEMS])

  def _digest(self, sample: Sample) -> bytes:
    try:
      return digest_of(read_file(self.root / sample.image, within=self.root)) if sample.image else b""
    except (OSError, Unusable):  # it is counted, or named, where its record is made
      return b""

  def captions(self, places: Sequence[int]) -> Iterator[list[str]]:
    without_images = [dataclasses.replace(self.samples[place], image="") for place in places]
    return usable_captions(SamplesPart("", self.split, self.root, without_images, self.fields))

  def part(self, name: str, split: str, places: Sequence[int], joined: Mapping[int, tuple[str, ...]]) -> Part:
    samples = [_with_captions(self.samples[place], joined.get(place, ())) for place in places]
    return SamplesPart(name, split, self.root, samples, self.fields)


def _with_captions(sample: Sample, captions: tuple[str, ...]) -> Sample:
  return dataclasses.replace(sample, captions=captions, is_file=False, joined=True) if captions else sample


def _by_split(root: pathlib.Path, samples: Sequence[Sample], fields: tuple[str, ...]) -> list[Pairs]:
  """Group samples by their first folder, where all whole pairs lie in folders with names of splits. Other files, such
  as a README.txt or a folder `test` without captions, are counted in one of these."""
  whole = {sample.folder for sample in samples if sample.is_whole}
  if not whole or not whole <= SPLITS:
    _warn_of_mixed_splits(root, samples)
    return [Samples("train", root, samples, fields)]
  elsewhere = "train" if "train" in whole else min(whole)
  by_split: dict[str, list[Sample]] = {}
  for sample in samples:
    by_split.setdefault(sample.folder if sample.folder in whole else elsewhere, []).append(sample)
  return [Samples(split, root, of_split, fields) for split, of_split in sorted(by_split.items())]


def _warn_of_mixed_splits(root: pathlib.Path, samples: Sequence[Sample]) -> None:
  """Warn where --source is a folder too high, or has pairs beside its splits: held-out pairs would be trained on."""
  found: dict[str, set[str]] = {}
  for folders, is_whole in {(posixpath.dirname(sample.key), sample.is_whole) for sample in samples}:
    above = ""
    for name in folders.split("/"):
      if (above or is_whole) and name.lower() in SPLITS:
        found.setdefault(above, set()).add(name)
      above = posixpath.join(above, name)
  for above, names in found.items():
    if len(names) > 1:
      where = ("directly below --source", "give it as --source")
      if not above:
        where = ("where no pair lies beside them", "move the other pairs elsewhere")
      logging.warning(
        "%s has the folders %s, which are splits only %s, and parts of train here; if they are splits, %s",
        root / above,
        ", ".join(sorted(names)),
        *where,
      )


def beside(source: pathlib.Path, names: Sequence[str], asked: Asked) -> list[Pairs]:
  """x.jpg, or any of image_files.ENDINGS, with x.txt or x.caption; x.json beside them is its metadata."""
  endings = asked.caption_fields or TEXTS
  if unknown := {*endings} - {*TEXTS}:
    raise UserError(f"--caption_fields has {min(unknown)}; captions lie in files here, so it is some of txt,caption")
  found: dict[str, dict[str, str]] = {}
  for name in sorted(names, key=_is_of_a_rare_format):  # last, so that each finds the others of its key
    ending = _ending(name)
    field = "image" if is_picture(name) else ending
    if field not in ("image", "json", *endings):
      continue
    sample = found.setdefault(posixpath.splitext(name)[0], {})
    # Without --caption_fields either ending will do, and both are one caption too many.
    field = "caption" if field in TEXTS and not asked.caption_fields else field
    if _is_of_a_rare_format(name) and "image" in sample and not _is_of_a_rare_format(sample["image"]):
      continue  # x.tif, of which x.jpg was made
    if field in sample:
      raise UserError(f"{source} has {sample[field]} and {name}, two files for {field} of one key; keep one")
    sample[field] = name
  order = asked.caption_fields or ("caption",)
  samples = [
    Sample(
      key,
      files.get("image", ""),
      tuple(files[field] for field in order if field in files),
      is_file=True,
      metadata_file=files.get("json", ""),
    )
    for key, files in found.items()
    if files.keys() != {"json"}
  ]
  return _by_split(source, samples, asked.caption_fields)


def by_table(source: pathlib.Path, names: Sequence[str], asked: Asked) -> list[Pairs]:
  """Rows of metadata.jsonl and metadata.csv, each of the pictures below it."""
  samples: dict[str, Sample] = {}
  fields: tuple[str, ...] = ()
  there = {*names}
  for table in (name for name in names if posixpath.basename(name) in TABLES):
    fields = asked.caption_fields
    for number, row in enumerate(_rows(source / table)):
      if not number:
        fields = caption_fields(f"{source / table}", row, asked)
      name, folder = row.get(FILE_NAME), posixpath.dirname(table)
      if not isinstance(name, str) or not name:
        raise UserError(f"{source / table}, row {number + 1} has no {FILE_NAME}; its columns are {', '.join(row)}")
      key = _written_otherwise(posixpath.normpath(posixpath.join(folder, name)), there)
      if key.startswith(("../", "/")) or not _is_file_name(key):
        raise UserError(f"{source / table} names {name}, which is no picture below {source}")
      others = other_fields((field for field, value in row.items() if is_plain(value)), (FILE_NAME, *fields), asked)
      texts = tuple(records.texts_of(row, fields))
      sample = Sample(key, key, texts, metadata={field: row[field] for field in others})
      samples[key] = _with_row(samples[key], sample) if key in samples else sample
  # A picture that no row names is counted, as a pair without a caption.
  rest = [Sample(name, name) for name in names if is_picture(name) and name not in samples]
  if not samples:
    raise UserError(f"the metadata in {source} has no rows; each is a {FILE_NAME} and a caption")
  return _by_split(source, [*samples.values(), *rest], fields)


def _with_row(sample: Sample, row: Sample) -> Sample:
  """Return the sample with the captions of a further row of its picture, of which other fields are left out."""
  texts = [records.captions_of(each.metadata) or each.captions for each in (sample, row)]
  texts[0] = sample.captions if sample.joined else texts[0]
  return _with_captions(sample, tuple(dict.fromkeys([*texts[0], *texts[1]])))


def _written_otherwise(name: str, there: Collection[str]) -> str:
  """The file that a table of another system means, if there is none of this name: Windows parts folders by a backslash,
  and macOS writes an accent as a character of its own."""
  if name in there:
    return name
  slashes = posixpath.normpath(name.replace("\\", "/"))
  forms = (unicodedata.normalize(form, each) for each in (name, slashes) for form in ("NFC", "NFD"))
  return next((each for each in (slashes, *forms) if each in there), name)


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yield the rows of a table. Raises UserError: it cannot be read."""
  parts.check_plain(path)
  if path.suffix == ".csv":
    yield from _rows_of_csv(path)
    return
  with open(path, "rb") as file:
    for number, line in enumerate(parts.lines_of(file, path), 1):
      if line.strip():
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
          raise UserError(f"{path}, line {number} should be a JSON object with {FILE_NAME} and a caption")
        yield row


def _rows_of_csv(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  csv.field_size_limit(MOST_TEXT_BYTES)  # instead of 131,072 characters
  first = 1  # line of a row, which goes over several where a quoted text does
  try:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
      # Strictly: a quote without its end would make one caption of all rows that follow.
      rows = csv.DictReader(parts.lines_of(file, path), strict=True)
      first += bool(rows.fieldnames)
      for row in rows:
        more: Any = row.pop(None, ())  # under no name
        if any(value.strip() for value in more):
          raise UserError(
            f"{path}, line {rows.line_num} has more values than the first line has names; put quotes around a text with"
            " a comma in it"
          )
        first = rows.line_num + 1
        yield row
  except csv.Error as error:
    raise UserError(
      f"{path} is no table of comma-separated values: {error}, from line {first} on; a quoted text ends in a quote, and"
      " has two for each one in it"
    ) from error


def _is_file_name(name: str) -> bool:
  """Say whether a file can have this name. JSON may hold halves of characters, which no name has."""
  try:
    return "\0" not in os.fsdecode(os.fsencode(name))
  except UnicodeEncodeError:
    return False


def _ending(name: str) -> str:
  return posixpath.splitext(name)[1][1:].lower()


def has_pair(names: Sequence[str]) -> bool:
  """Say whether there is a picture with a caption beside it."""
  keys = [{posixpath.splitext(name)[0] for name in names if is_one(name)} for is_one in (is_picture, is_text)]
  return bool(keys[0] & keys[1])


def is_picture(name: str) -> bool:
  return _ending(name) in image_files.ENDINGS


def _is_of_a_rare_format(name: str) -> bool:
  """Say whether a picture is of a format that webdataset tars do not have."""
  return is_picture(name) and _ending(name) not in tars.IMAGE_ENDINGS


def is_text(name: str) -> bool:
  return _ending(name) in TEXTS
