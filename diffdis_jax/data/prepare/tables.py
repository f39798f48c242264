"""Tables of one's own pictures: images in columns, which pyarrow reads, and lists of files.

Lists in text are read by Python's csv and json, which leave a value as it is written: "007" stays no number 7, and a
date no time.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import pathlib
import posixpath
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffdis_jax.data import image_files
from diffdis_jax.data.prepare import parts
from diffdis_jax.data.prepare.parts import SPLITS, FilesPart, RawPair
from diffdis_jax.data.records import texts_of
from diffdis_jax.errors import UserError, not_installed, parse_json

SAVED = ("dataset_dict.json", "state.json")  # of datasets' save_to_disk
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of datasets' imagefolder
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture")  # the first that is there counts
CAPTIONS = ("caption", "text", "prompt", "description")  # columns, of which the first that is there counts
FILES = ("file_name", "filename", "file", "filepath", "file_path", "path", "image", "image_path", "image_file", "img")
HELD_OUT = 0.05
_AT_ONCE = 100  # rows, of which each may be a whole image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """The flags by which a folder is read."""

  caption_fields: tuple[str, ...] = ()  # columns whose texts are the captions; empty for the usual ones
  held_out: float = HELD_OUT  # share of `train` that becomes `val`; 0 for none
  captions: str = ""  # `filename` or `folder`, whose name is the caption then; empty for what lies there


def ending(name: str) -> str:
  """Return the ending of a file's name, in small letters, without the dot."""
  return posixpath.splitext(name)[1][1:].lower()


def is_picture(name: str) -> bool:
  return ending(name) in image_files.ENDINGS


@dataclasses.dataclass
class TablePart(FilesPart):
  """Pairs whose images are in a column of one table, with rising rows."""

  column: str

  def __iter__(self) -> Iterator[RawPair]:
    by_row = {pair.row: pair for pair in self.pairs}
    images = _rows(self.root / self.pairs[0].file, [self.column]) if by_row else ()
    for number, row in enumerate(itertools.islice(images, max(by_row, default=0) + 1)):
      if number in by_row:
        image = row[self.column]
        image = image.get("bytes") if isinstance(image, dict) else image
        yield dataclasses.replace(by_row[number], image=image)


def is_plain(value: Any) -> bool:
  """Say whether JSON and a reader of records have such a value: a text, a number, or a list of texts."""
  return isinstance(value, (str, int, float)) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
  """Make a UserError of whatever datasets and pyarrow raise for a damaged file."""
  try:
    yield
  except (GeneratorExit, UserError):
    raise
  except ImportError as error:
    raise not_installed(str(path), "datasets", "own") from error
  except Exception as error:
    raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}; copy it again") from error


def _open(path: pathlib.Path, columns: Sequence[str] | None = None) -> Any:
  """Open a parquet file, or an arrow file that datasets wrote, as a pyarrow.RecordBatchReader. Of a parquet file no
  other columns are read."""
  import pyarrow
  import pyarrow.parquet

  if path.suffix == ".arrow":
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
  file = pyarrow.parquet.ParquetFile(path)
  return pyarrow.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches(_AT_ONCE, columns=columns))


def _rows(path: pathlib.Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
  with _readable(path):
    for batch in _open(path, columns):
      for start in range(0, batch.num_rows, _AT_ONCE):  # datasets writes 1,000 rows a batch
        yield from batch.select(columns or batch.schema.names).slice(start, _AT_ONCE).to_pylist()


def parquet(source: pathlib.Path, name: str, asked: Asked) -> TablePart:
  """Read the captions of a parquet file, whose name or folder begins with the split."""
  words = [re.split(r"[-_.]", posixpath.basename(name))[0], posixpath.basename(posixpath.dirname(name))]
  split = next((word for word in map(str.lower, words) if word in SPLITS), "train")
  return _table(source, name, split, asked)


def saved(source: pathlib.Path, asked: Asked) -> list[TablePart]:
  """Read the folder that datasets' save_to_disk wrote."""
  with _readable(source):
    import datasets

    loaded: Any = datasets.load_from_disk(str(source))
    # datasets calls a part or a sum of its splits train[:10%] or train+test.
    by_split = loaded if isinstance(loaded, dict) else {re.split(r"\W", str(loaded.split or "train"))[0]: loaded}
    files = [(pathlib.Path(file["filename"]), split) for split, of in by_split.items() for file in of.cache_files]
  return [_table(source, path.relative_to(source).as_posix(), split, asked) for path, split in files]


def _table(source: pathlib.Path, name: str, split: str, asked: Asked) -> TablePart:
  """Read the pairs of a table. Keys are TABLE/KEY, or TABLE/ROW where it has no column `key`."""
  path, prefix = source / name, posixpath.splitext(name)[0]
  with _readable(path):
    schema = _open(path).schema
  images = [field.name for field in schema if _is_image(field.type)]
  column = next((column for column in IMAGES if column in images), images[0] if len(images) == 1 else "")
  if not column:
    raise UserError(
      f"{path} has no column with an image, its bytes or a struct that has them; its columns are"
      f" {', '.join(schema.names) or 'none'}"
    )
  rest = [column for column in schema.names if column not in images]
  captions = caption_fields(str(path), rest, asked)
  rows = enumerate(_rows(path, rest))
  pairs = [_pair(f"{prefix}/{row.get('key', i)}", row, captions, asked, file=name, row=i) for i, row in rows]
  return TablePart("", split, source, pairs, column)


def _pair(key: str, values: Mapping[str, Any], captions: Sequence[str], asked: Asked, **how: Any) -> RawPair:
  """Make the pair of a row of these values. Those that JSON can hold become metadata, without those that training would
  take instead of the captions that were asked for."""
  left_out = {*captions, "captions"} if asked.caption_fields else {*captions}
  fields = {name: value for name, value in values.items() if name not in left_out and is_plain(value)}
  return parts.captioned_pair(key, texts_of(values, captions), fields, **how)


def _is_image(kind: Any) -> bool:
  """Say whether a column of this type has bytes, or structs with a field `bytes`, as datasets stores them."""
  return re.match(r"(struct<(.*, )?bytes: )?\w*binary", str(kind)) is not None


def caption_fields(where: str, columns: Sequence[str], asked: Asked) -> tuple[str, ...]:
  """Return the columns with the captions. Raise UserError: they are not among these."""
  usual = [name for name in CAPTIONS if name in columns][:1]
  missing = [name for name in asked.caption_fields if name not in columns]
  if missing or not (asked.caption_fields or usual):
    what = f"column {missing[0]}" if missing else f"column {' or '.join(CAPTIONS)}"
    example = f", such as --caption_fields={shlex.quote(columns[0])}" if columns else ""
    raise UserError(
      f"{where} has no {what}; name those with captions by --caption_fields, of {', '.join(columns)}{example}"
    )
  return asked.caption_fields or tuple(usual)


def listed_pairs(source: pathlib.Path, lists: Sequence[str], names: Sequence[str], asked: Asked) -> list[RawPair]:
  """Read lists of files, each of pictures in its folder or below. A picture that no row names is one without a
  caption."""
  # Windows parts folders by a backslash, and macOS writes an accent as a character of its own.
  form = lambda name: unicodedata.normalize("NFC", name.replace("\\", "/"))
  there = {form(name): name for name in names if is_picture(name)}
  pairs: list[RawPair] = []
  for name in lists:
    table, folder, column, captions = source / name, posixpath.dirname(name), "", ()
    for number, row in enumerate(_list(table), 1):
      if not column:
        usual = [field for field in FILES if field in row]
        in_folder = (field for field in (*usual, *row) if form(posixpath.join(folder, f"{row[field]}")) in there)
        if not (column := next(in_folder, next(iter(usual), ""))):
          raise UserError(f"{table} has no column of files, such as {FILES[0]}; its columns are {', '.join(row)}")
        # The longest text first, which is the likeliest caption.
        others = sorted((field for field in row if field != column), key=lambda field: -len(str(row[field])))
        is_clear = len(others) == 1 and not asked.caption_fields
        captions = tuple(others) if is_clear else caption_fields(f"{table}", others, asked)
      file = row.get(column)
      if not isinstance(file, str) or not file:
        raise UserError(f"{table}, row {number} has no {column}; its columns are {', '.join(row)}")
      key = posixpath.normpath(posixpath.join(folder, file))
      key = there.get(form(key), key)
      del row[column]
      pairs.append(_pair(key, row, captions, asked, file=key))
  if not pairs:
    raise UserError(f"{source / lists[0]} has no rows; each is a {FILES[0]} and a caption")
  named = {pair.file for pair in pairs}
  return pairs + [parts.file_pair(name) for name in names if is_picture(name) and name not in named]


def _list(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yield the rows of a list. Raise UserError: it cannot be read."""
  if path.suffix == ".parquet":
    yield from _rows(path)
  elif path.suffix == ".csv":
    yield from _rows_of_csv(path)
  else:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
      if line.strip():
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
          raise UserError(f"{path}, line {number} should be a JSON object with {FILES[0]} and a caption")
        yield row


def _rows_of_csv(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  csv.field_size_limit(2**22)  # instead of 131,072 characters
  first = 1  # line of a row, which goes over several where a quoted text does
  try:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
      # Strictly: a quote without its end would make one caption of all rows that follow.
      rows = csv.DictReader(file, strict=True)
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
    raise UserError(f"{path} is no table of comma-separated values: {error}, in the row after line {first}") from error
