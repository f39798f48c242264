"""Conceptual Captions 3M, and other sets downloaded alike: webdataset tars, or tables of captions with image files."""

from __future__ import annotations

import csv
import pathlib
import re
from collections.abc import Iterator

from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.builder import CaptionedImages
from diffdis_jax.data.prepare.parts import Item, Part
from diffdis_jax.data.records import MOST_TEXT_BYTES
from diffdis_jax.errors import UserError

SHORT_SIDE = 288  # pixels: squares of 256 px are still made smaller, never larger
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
CAPTIONS = ("caption", "title", "text")
FILES = ("filepath", "image", "file", "path")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a text, as csv and pandas write it where it has quotes in it


class Cc3m(CaptionedImages):
  """Conceptual Captions 3M."""

  name = "cc3m"
  DESCRIPTION = (
    "Conceptual Captions: images from the web with their alternative texts, cleaned; about 3.3 million pairs when "
    "published, of which 2,905,954 for training were still to be had in img2dataset's layout."
  )
  CITATION = (
    "@inproceedings{sharma2018conceptual, title = {Conceptual Captions: A Cleaned, Hypernymed, Image Alt-text Dataset "
    "For Automatic Image Captioning}, author = {Sharma, Piyush and Ding, Nan and Goodman, Sebastian and Soricut, "
    "Radu}, booktitle = {Proceedings of ACL}, year = {2018}}"
  )
  HOMEPAGE = "https://ai.google.com/research/ConceptualCaptions"


def find_parts(source: pathlib.Path) -> list[Part]:
  """The tars of the folder, or where there are none its tables `train.tsv`, `val.tsv`, ...

  Splits of either have the names of SPLITS: published tars, `cc3m-validation-0000.tar`, are of `val`.

  A table's first line names its columns: one of caption, title, text, and one of filepath, image, file, path, which
  holds the image's path relative to the folder. Other columns become metadata.

  Raises:
    UserError: neither tars nor tables, or a table that cannot be read so.
  """
  parts.check_folder(source, "a folder of webdataset tars, or of .tsv files and images")
  tables = parts.listed(source, "*.tsv")
  if not tables or parts.listed(source, "*.tar"):
    of_tars = parts.tars(source)
    for part in of_tars:
      part.split = SPLITS.get(part.split, part.split)
    return of_tars
  found: dict[str, list[Part]] = {}
  for table in tables:
    split = _split_of(table)
    if split in found:
      raise UserError(f"{table.name} is a second table of split {split}; give each split one")
    found[split] = parts.files(_rows(table), split=split, root=source)
    if not found[split]:
      raise UserError(f"{table} has no rows")
  return [part for group in found.values() for part in group]


def _split_of(table: pathlib.Path) -> str:
  # By words, so that Train_GCC-training.tsv and cc3m_val.tsv are known as well.
  for word in re.split(r"[^a-z]+", table.stem.lower()):
    if word in SPLITS:
      return SPLITS[word]
  raise UserError(f"cannot tell the split of {table.name}; name it train.tsv, val.tsv or test.tsv")


def _rows(table: pathlib.Path) -> Iterator[Item]:
  import json

  parts.check_plain(table)
  csv.field_size_limit(MOST_TEXT_BYTES)  # instead of 131,072 characters
  with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
    # Without quotes: captions have single ones, at which csv would read on to the end of the file.
    rows = csv.DictReader(parts.lines_of(file, table), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = {name.strip().lower(): name for name in rows.fieldnames or ()}
    caption = next((columns[name] for name in CAPTIONS if name in columns), None)
    path = next((columns[name] for name in FILES if name in columns), None)
    if caption is None or path is None:
      raise UserError(
        f"{table}: the first line must name a column caption and a column filepath, not {', '.join(columns) or 'none'}"
      )
    opened = 0  # the line in which a quoted text began that no line has ended yet
    for row in rows:
      values = [value for value in row.values() if isinstance(value, str)]
      if opened and any(value.endswith('"') and not value.startswith('"') for value in values):
        raise UserError(f"{table}, line {opened}: a quoted text goes on in the next line; write it in one line")
      if None not in row.values():
        opened = 0
      elif values[-1].startswith('"') and values[-1].count('"') % 2:
        opened = rows.line_num
      row = {name: _unquoted(value) for name, value in row.items() if isinstance(value, str)}
      other = {name: value for name, value in row.items() if name not in (caption, path)}
      yield Item(row.get(path, ""), row.get(caption, ""), json.dumps(other, ensure_ascii=False))


def _unquoted(text: str) -> str:
  """Remove the quotes around a text in which each quote is doubled."""
  return text[1:-1].replace('""', '"') if '""' in text[1:-1] and _QUOTED.fullmatch(text) else text
