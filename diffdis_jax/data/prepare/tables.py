"""Images in columns: parquet files as img2dataset and datasets write them, and arrow files of datasets' save_to_disk.

An image is encoded bytes, or a struct that has them as `bytes`. pyarrow, which reads them, comes with
tensorflow-datasets.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import pathlib
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffdis_jax.data.paths import leads_out
from diffdis_jax.data.prepare import parts
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
from diffdis_jax.data.prepare.parts import Part
from diffdis_jax.data.records import MOST_BYTES, TOO_LARGE, Unusable, texts_of
from diffdis_jax.errors import UserError

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture")  # the first that is there counts
KEY = "key"  # img2dataset's
BATCH = 32  # rows in memory at a time


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of a table in which a pair lies.

  Attributes:
    others: that become metadata.
  """

  image: str
  captions: tuple[str, ...]
  others: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
  """A file of rows, of one split of the source.

  Attributes:
    name: of its keys, which are NAME/KEY, or NAME/ROW where it has no column `key`.
    keys: of its rows.
  """

  path: pathlib.Path
  split: str
  name: str
  columns: Columns
  keys: Sequence[str]

  @property
  def whole(self) -> Sequence[int]:
    return range(len(self.keys))

  def digests(self) -> Iterator[bytes]:
    for row in _rows(self.path, Columns(self.columns.image, (), ()), self.whole):
      try:
        data = _bytes_of(row[self.columns.image])
      except Unusable:  # it is counted where its record is made
        data = None
      yield digest_of(data) if data else b""

  def captions(self, places: Sequence[int]) -> Iterator[list[str]]:
    without_images = dataclasses.replace(self, columns=dataclasses.replace(self.columns, image=""))
    return usable_captions(without_images.part("", self.split, places, {}))

  def part(self, name: str, split: str, places: Sequence[int], joined: Mapping[int, tuple[str, ...]]) -> Part:
    captions = {self.keys[place]: joined[place] for place in places if place in joined}
    return TablePart(name, split, self.path, self.columns, places, [self.keys[place] for place in places], captions)


@dataclasses.dataclass
class TablePart:
  """Some rows of a file.

  Attributes:
    joined: key -> captions, of the rows that have those of others with the same image too.
  """

  name: str
  split: str
  path: pathlib.Path
  columns: Columns
  places: Sequence[int]
  keys: Sequence[str]
  joined: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  truncated: bool = False

  def identity(self) -> list[Any]:
    digest = hashlib.blake2b(repr((list(self.places), self.joined)).encode(), digest_size=16).hexdigest()
    return [self.name, self.path.name, *parts.stamp(self.path), digest, *self.columns.captions]

  def few(self, count: int) -> Iterator[RawPair]:
    """The first of them: others would have to be read past these."""
    return iter(dataclasses.replace(self, places=self.places[:count], keys=self.keys[:count]))

  def __iter__(self) -> Iterator[RawPair]:
    for key, row in zip(self.keys, _rows(self.path, self.columns, self.places)):
      try:
        image = _bytes_of(row[self.columns.image]) if self.columns.image else None
        fields = {name: row[name] for name in self.columns.others if is_plain(row[name])}
        if texts := self.joined.get(key, ()):
          fields.pop(SEVERAL, None)
        pair = pair_of(key, image, texts or texts_of(row, self.columns.captions), fields)
        yield dataclasses.replace(pair, joined=bool(texts))
      except Unusable as error:
        yield RawPair(key, refused=str(error))


def parquet(source: pathlib.Path, names: Sequence[str], asked: Asked) -> list[Pairs]:
  """The parquet files of these names. Raises UserError: one that cannot be read, or without the columns."""
  return [_table(source / name, _split_of(name), posixpath.splitext(name)[0], asked) for name in names]


def on_disk(source: pathlib.Path, asked: Asked) -> list[Pairs]:
  """Read the folder that datasets' save_to_disk wrote. Raises UserError: as `parquet`."""
  found: list[Pairs] = []
  for file, split in _arrow_files(source):
    name = posixpath.splitext(file.relative_to(source).as_posix())[0]
    found.append(_table(file, split, name, asked))
  if not found:
    raise UserError(f"{source} has no arrow files; write it again by save_to_disk")
  return found


def _arrow_files(source: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
  """List the arrow files and their splits. Raises UserError: the files that list them are not datasets' own."""
  try:
    splits = [""]
    if (source / "dataset_dict.json").exists():
      splits = parts.read_json(source / "dataset_dict.json")["splits"]
    states = {split: parts.read_json(_below(source, posixpath.join(split, "state.json"))) for split in splits}
    return [
      (_below(source, posixpath.join(split, each["filename"])), split or _saved_split(state.get("_split")))
      for split, state in states.items()
      for each in state.get("_data_files") or ()
    ]
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(f"{source} is not as datasets' save_to_disk writes it: {error!r}; write it again") from error


def _saved_split(said: Any) -> str:
  """`train` where datasets calls a part or a sum of its splits train[:10%] or train+test, and where it has no name."""
  name = str(said or "train")
  part = re.match(r"(\w+)\s*[\[+]", name)
  return part[1] if part else name


def _below(source: pathlib.Path, name: str) -> pathlib.Path:
  """Return the path of a file below the source. Raises UserError: it lies elsewhere."""
  if leads_out(source / name, source):
    raise UserError(f"{source} names {name}, which is not below it; write it again by save_to_disk")
  return source / name


def _split_of(name: str) -> str:
  """`train` of data/train-00000-of-00001.parquet, or the folder's name; img2dataset's 00000.parquet is `train`."""
  words = [re.split(r"[-_.]", posixpath.basename(name))[0], posixpath.basename(posixpath.dirname(name))]
  return next((word for word in map(str.lower, words) if word in SPLITS), "train")


def _table(path: pathlib.Path, split: str, name: str, asked: Asked) -> Table:
  parts.check_plain(path)
  with _readable(path):
    schema = _schema(path)
    columns = _columns(path, schema, asked)
    keys = [str(row) for row in range(_length(path))]
    if KEY in schema.names and not _is_image(schema.field(KEY).type):
      keys = [str(row[KEY]) for row in _rows(path, Columns("", (), (KEY,)), range(len(keys)))]
  keys = [f"{name}/{key}" for key in keys]
  if len({*keys}) < len(keys):
    twice, _ = collections.Counter(keys).most_common(1)[0]
    raise UserError(f"{path} has the key {twice.removeprefix(f'{name}/')} twice; give each row its own")
  return Table(path, split, name, columns, keys)


def _columns(path: pathlib.Path, schema: Any, asked: Asked) -> Columns:
  import pyarrow as pa

  images = [field.name for field in schema if _is_image(field.type)]
  image = next((name for name in IMAGES if name in images), images[0] if len(images) == 1 else "")
  if not image:
    raise UserError(
      f"{path} has no column with an image, its bytes or a struct that has them; its columns are"
      f" {', '.join(schema.names) or 'none'}"
    )
  captions = caption_fields(str(path), schema.names, asked)
  # No JSON has times, and Python not all of them.
  left_out = {*images, *(field.name for field in schema if pa.types.is_temporal(field.type))}
  return Columns(
    image, captions, other_fields((name for name in schema.names if name not in left_out), captions, asked)
  )


def _is_image(kind: Any) -> bool:
  import pyarrow as pa

  if pa.types.is_struct(kind):
    return any(field.name == "bytes" and _is_image(field.type) for field in kind)
  return str(kind) in ("binary", "large_binary", "binary_view")  # the last since pyarrow 16


def _bytes_of(value: Any) -> bytes | None:
  """Return the bytes of an image. Raises Unusable: they are too many."""
  data = value.get("bytes") if isinstance(value, dict) else value
  if data is not None and len(data) > MOST_BYTES:
    raise Unusable(TOO_LARGE)
  return data


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
  """Makes a UserError of what pyarrow raises for a damaged file."""
  import pyarrow as pa

  try:
    yield
  except (pa.ArrowException, OSError) as error:
    raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}; copy it again") from error


def _rows(path: pathlib.Path, columns: Columns, places: Sequence[int]) -> Iterator[dict[str, Any]]:
  """The rows at these places, which rise. Raises UserError: the file cannot be read."""
  wanted = [name for name in (columns.image, *columns.captions, *columns.others) if name]
  places = list(places)
  next_place, first = 0, 0
  with _readable(path):
    for batch in _batches(path, wanted, places):
      while next_place < len(places) and places[next_place] < first + batch.num_rows:
        yield _row(batch.slice(places[next_place] - first, 1))
        next_place += 1
      first += batch.num_rows


def _row(batch: Any) -> dict[str, Any]:
  """Read a batch of one row. Bytes that are not UTF-8 stay as those of a text file do, and are refused where they are
  used."""
  try:
    return batch.to_pylist()[0]
  except UnicodeDecodeError:  # pyarrow does not look at what a column of texts holds
    return {name: _value(column[0]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _value(scalar: Any) -> Any:
  import pyarrow as pa

  try:
    return scalar.as_py()
  except UnicodeDecodeError:
    if isinstance(scalar, pa.StructScalar):  # of an image, whose path it is
      return {name: _value(each) for name, each in scalar.items()}
    if isinstance(scalar, pa.DictionaryScalar):
      return _value(scalar.value)
    if isinstance(scalar, pa.ListScalar):
      return [_value(each) for each in scalar.values]
    return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def _batches(path: pathlib.Path, columns: list[str], places: Sequence[int]) -> Iterator[Any]:
  """All rows in turn, of which those without a wanted one may lack their columns."""
  if path.suffix != ".parquet":
    yield from (batch.select(columns) for batch in _arrow(path))
    return
  import pyarrow as pa
  import pyarrow.parquet as pq

  with pq.ParquetFile(path) as file:
    first = 0
    for group in range(file.metadata.num_row_groups):
      length = file.metadata.row_group(group).num_rows
      if any(first <= place < first + length for place in places):
        yield from file.iter_batches(batch_size=BATCH, row_groups=[group], columns=columns)
      else:  # not read: only its length counts
        yield pa.RecordBatch.from_arrays([pa.nulls(length)], names=["none"])
      first += length


def _arrow(path: pathlib.Path) -> Iterator[Any]:
  import pyarrow as pa

  # Not mapped: where a file became shorter meanwhile, that ends the process.
  with pa.OSFile(str(path)) as source:
    reader = _reader(source)
    # A stream's reader iterates, a file's has its batches by number.
    numbers = range(getattr(reader, "num_record_batches", 0))
    yield from (reader.get_batch(i) for i in numbers) if numbers else reader


def _reader(source: Any) -> Any:
  """datasets writes streams; a file that ends in a list of its batches is read too."""
  import pyarrow as pa

  is_file = source.read(6) == b"ARROW1"
  source.seek(0)
  return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _schema(path: pathlib.Path) -> Any:
  import pyarrow as pa
  import pyarrow.parquet as pq

  if path.suffix == ".parquet":
    return pq.read_schema(path)
  with pa.OSFile(str(path)) as source:
    return _reader(source).schema


def _length(path: pathlib.Path) -> int:
  if path.suffix == ".parquet":
    import pyarrow.parquet as pq

    length, size = pq.read_metadata(path).num_rows, path.stat().st_size
    if length > size:  # a damaged number of rows, each of which would be asked for
      raise UserError(f"{path} says that it has {length:,} rows, in {size:,} bytes; copy it again")
    return length
  return sum(batch.num_rows for batch in _arrow(path))
