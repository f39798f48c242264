"""Raw data sets, cut into parts that are each read on their own, in any process.

A part iterates over RawPair; afterwards its attribute `truncated` says whether it ended before its end.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, AnyStr, Protocol, runtime_checkable

from absl import logging

from diffdis_jax.common import files as run_files
from diffdis_jax.data import paths
from diffdis_jax.data.prepare.pairs import RawPair
from diffdis_jax.data.prepare.webdataset import TarPart, split_of
from diffdis_jax.data.records import MOST_TEXT_BYTES, Unusable, read_file
from diffdis_jax.errors import UserError

ITEMS = 2000  # of a part of loose files
USUAL = ("train", "training", "val", "valid", "validation", "test")  # splits that a tar's name is known to mean


@runtime_checkable
class Part(Protocol):
  """`name` is a file name without its ending, unique in the data set. What it iterates over is its stage's affair."""

  name: str
  split: str
  truncated: bool

  def __iter__(self) -> Iterator[Any]: ...

  def identity(self) -> list[Any]:
    """JSON that differs when the part does, so that a preparation is not resumed with another source."""
    ...


@dataclasses.dataclass(frozen=True)
class Item:
  """An image file and what belongs to it."""

  file: str
  caption: str
  metadata: str = "{}"


@dataclasses.dataclass
class FilesPart:
  """Images that lie as files under `root`. A file that is not there is a pair without an image. Keys are the paths."""

  name: str
  split: str
  root: pathlib.Path
  items: Sequence[Item]
  truncated: bool = False

  def identity(self) -> list[Any]:
    # Of all of them: a class that is taken out of another split moves the labels of this one.
    digest = hashlib.blake2b(digest_size=16)
    for item in self.items:
      facts = f"{item.file}\0{item.caption}\0{item.metadata}\0{stamp(self.root / item.file)}\0"
      digest.update(facts.encode("utf-8", "surrogatepass"))
    return [self.name, len(self.items), digest.hexdigest()]

  def __iter__(self) -> Iterator[RawPair]:
    for item in self.items:
      pair = RawPair(item.file, None, encode(item.caption), encode(item.metadata))
      try:
        pair.image = read_file(self.root / item.file, within=self.root)
      except Unusable as error:
        pair.refused = str(error)
      yield pair


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
  """The tars of a folder, by split and name.

  Raises:
    UserError: no folder, no tars in it, or a tar whose name gives no split.
  """
  check_folder(source, "a folder of webdataset tars")
  by_split = collections.defaultdict(list)
  for path in listed(source, "*.tar"):
    check_plain(path)
    split = split_of(path)
    # `all` is TFDS's own name for the union of splits.
    if split is None or split == "all":
      raise UserError(f"cannot tell the split of {path.name}; name tars SPLIT-00000.tar, SPLIT not 'all', or 00000.tar")
    by_split[split].append(TarPart(path, split))
  if not by_split:
    raise UserError(f"no .tar files in {source}; --source is a folder of webdataset tars, such as img2dataset writes")
  if by_split.keys().isdisjoint(USUAL):
    logging.warning(
      "by the word before their number these tars are of split %s; training reads train, for which they are called"
      " train-00000.tar, unless data.split says otherwise",
      ", ".join(by_split),
    )
  return [part for parts in by_split.values() for part in parts]


def files(items: Iterable[Item], *, split: str, root: pathlib.Path) -> list[Part]:
  """Loose files of one split, in order, cut into parts."""
  # Cut as they are read: a table may have millions of rows.
  items, found = iter(items), []
  while chunk := tuple(itertools.islice(items, ITEMS)):
    found.append(FilesPart(f"{split}-{len(found):05d}", split, root, chunk))
  return found


def listed(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """Files of a name directly in the folder, in order; without hidden ones, such as macOS leaves on other disks."""
  return sorted(path for path in folder.glob(pattern) if not paths.is_hidden(path.name))


def names_below(folder: pathlib.Path) -> Iterator[str]:
  """Files at any depth, relative, in order; without hidden ones, and what a link to a folder leads to.

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


def check_folder(source: pathlib.Path, what: str) -> None:
  """Refuse a folder that is not there. Raises UserError."""
  if not source.is_dir():
    raise UserError(f"no folder {source}; --source is {what}")


def check_plain(path: pathlib.Path) -> None:
  """Refuse what is no plain file, such as a pipe, which might never end. Raises UserError."""
  if path.exists() and not path.is_file():
    raise UserError(f"{path} is no plain file; remove it, or put the file there")


def lines_of(file: IO[AnyStr], path: pathlib.Path) -> Iterator[AnyStr]:
  """The lines of a table. Raises UserError: one is longer than a caption's file may be."""
  for number in itertools.count(1):
    line = file.readline(MOST_TEXT_BYTES + 1)
    if len(line) > MOST_TEXT_BYTES:
      raise UserError(f"{path}, line {number} has more than {MOST_TEXT_BYTES:,} characters; it is no table, or damaged")
    if not line:
      return
    yield line


def read_json(path: pathlib.Path) -> Any:
  """Read a JSON file of the source. Raises UserError: it cannot be read."""
  check_plain(path)
  try:
    return run_files.read_json(path)
  except UserError as error:
    raise UserError(f"{error}; download it again") from error
