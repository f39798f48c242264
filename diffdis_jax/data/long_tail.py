"""Long-tailed sets by name: images with labels, and the sentences of their classes as tokens.

Places-LT and ImageNet-LT are read as published, by lists of images and their classes beside the whole sets' folders:
`NAME_{train,val,test}.txt` has a line `path label` an image; paths are below the folder of the lists.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import buckets
from diffdis_jax.data import corpus, records, shapes_lt
from diffdis_jax.data.corpus import Corpus, Tokenizer, Tokens
from diffdis_jax.data.layouts.labelled import Labelled, Lazy, Origin
from diffdis_jax.errors import Gone, UserError


@runtime_checkable
class LabelledSource(Protocol):
  """A source whose classes are known without reading an image."""

  @property
  def labels(self) -> Int[np.ndarray, " n"]: ...

  @property
  def classnames(self) -> Sequence[str]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class LongTailed(NamedTuple):
  """A published long-tailed set."""

  prefix: str  # of its lists' names
  classes: int
  counts: Mapping[str, int]  # images of each split
  wordnet: bool  # as corpus.read_corpus has it


# The counts of the lists as published, by which a cut-off download is found.
SETS = {
  "places_lt": LongTailed("Places_LT", 365, {"train": 62_500, "val": 7_300, "test": 36_500}, wordnet=False),
  "imagenet_lt": LongTailed("ImageNet_LT", 1000, {"train": 115_846, "val": 20_000, "test": 50_000}, wordnet=True),
}
NAMES = ("shapes_lt", *SETS)


def is_sampled(*, name: str, split: str = "train", **_: Any) -> bool:
  """Say whether a split is trained on by classes: it is of a long-tailed set, and not read as pairs."""
  return name in NAMES and not (name == "shapes_lt" and split in shapes_lt.STARTS)


def open_corpus(*, name: str, path: str | os.PathLike[str] = "", seed: int = 0, **_: Any) -> Corpus:
  """Read the sentences of a set's classes. Takes what `sources.open_source` takes. Raises UserError: damaged data."""
  if name == "shapes_lt":
    return shapes_lt.make_corpus(seed)
  folder = buckets.local(path, "data.path")
  sentences = corpus.read_corpus(folder, wordnet=SETS[name].wordnet)
  _check_classes(folder, name, sentences.classnames)
  return sentences


def train_counts(*, name: str, path: str | os.PathLike[str] = "", seed: int = 0, **_: Any) -> Int[np.ndarray, " k"]:
  """Count each class's training images. Takes what `sources.open_source` takes. Raises UserError: damaged data."""
  if name == "shapes_lt":
    return shapes_lt.counts(seed)
  labels = _read_list(buckets.local(path, "data.path"), name, "train").labels
  # As long as there are classes: the last ones may have no image.
  return np.bincount(labels, minlength=SETS[name].classes)


def tokens_of(sentences: Corpus, tokenizer: Tokenizer) -> Tokens:
  """Turn the corpus into tokens. A long sentence is cut, and its end token stays last."""
  return Tokens(tokenizer(sentences.flat), np.cumsum([0, *map(len, sentences.sentences)]))


def open_split(folder: pathlib.Path, name: str, split: str) -> Labelled:
  """Open the images of a list.

  Args:
    folder: of the lists, of labels.txt and wiki/, and of the images' folders.
    name: of SETS.
    split: train, val or test.

  Raises:
    UserError: no such list, lines of another form, another number of images or classes than the published one, or
      images that are not there.
  """
  listed = _read_list(folder, name, split)
  # Before anything is read of it: a run must not end at its first image of a folder that is not there.
  if missing := _missing(listed.files):
    raise UserError(
      f"{len(missing):,} of the {len(listed.files):,} images that {listed.path} names are missing, the first"
      f" {missing[0]}; put the folders train and val of the whole set beside the lists"
    )
  names = corpus.read_names(folder / "labels.txt", wordnet=SETS[name].wordnet)
  _check_classes(folder, name, names)
  images = Lazy(listed.files, _read_listed)
  return Labelled(images, listed.labels, names, Origin("long_tailed", str(folder), split))


class _List(NamedTuple):
  """A published list: where it lies, its images, and their classes."""

  path: pathlib.Path
  files: list[pathlib.Path]
  labels: Int[np.ndarray, " n"]


def _read_list(folder: pathlib.Path, name: str, split: str) -> _List:
  known = SETS[name]
  if split not in known.counts:
    raise UserError(f"{name} has no split {split!r}; there are {', '.join(known.counts)}")
  file = folder / f"{known.prefix}_{split}.txt"
  try:
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    # Without a folder all is looked for where the command runs, which is hardly meant.
    how = "" if folder.parts else ", and name its folder, as in --config=places_lt:path=DIR"
    raise UserError(f"cannot read {file}: {error}; download the published list and put it there{how}") from error
  for row in rows:
    if len(row) != 2 or not row[1].isdecimal():
      raise UserError(f"{file} has the line {' '.join(row)!r}; a line should be a path and the number of a class")
  # A list that was cut off would be another set, and look like any.
  if len(rows) != known.counts[split]:
    raise UserError(f"{file} names {len(rows):,} images, and should name {known.counts[split]:,}; download it again")
  labels = np.array([int(label) for _, label in rows])
  if sorted({*labels.tolist()}) != [*range(known.classes)]:
    raise UserError(f"{file} has other labels than 0 to {known.classes - 1}, each of them; download it again")
  # A path that begins with a slash would leave the folder.
  return _List(file, [folder / path.lstrip("/") for path, _ in rows], labels)


def _check_classes(folder: pathlib.Path, name: str, classes: Sequence[str]) -> None:
  """Raise UserError where these are not as many classes as the set has."""
  if len(classes) != SETS[name].classes:
    raise UserError(
      f"{folder / 'labels.txt'} names {len(classes)} classes, and {name} has {SETS[name].classes}; put its own text"
      " corpus there"
    )


def _missing(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """Return the images that are not there. Each folder is listed once: asking for every file would take minutes."""
  there = {folder: {*os.listdir(folder)} if folder.is_dir() else set() for folder in {file.parent for file in files}}
  return [file for file in files if file.name not in there[file.parent]]


def _read_listed(file: pathlib.Path) -> bytes:
  try:
    return records.read_file(file)
  except records.Unusable:
    if not file.parent.is_dir():  # of a disk that is away, rather than an image that never was there
      raise Gone(f"{file.parent} is not there") from None
    raise
