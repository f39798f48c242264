"""Long-tailed sets by name: images with labels, and the sentences of their classes as tokens.

Places-LT and ImageNet-LT are read as published, by lists of images and their classes beside the whole sets' folders:
`NAME_{train,val,test}.txt` has a line `path label` an image; paths are below the folder of the lists.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import buckets
from diffdis_jax.data import corpus, records
from diffdis_jax.data.corpus import Corpus, Tokenizer, Tokens
from diffdis_jax.data.layouts.labelled import Labelled, LabelledSource, Origin
from diffdis_jax.errors import Gone, UserError


class LongTailed(NamedTuple):
  """A published long-tailed set: how its lists, labels.txt and wiki/ in a folder are read. Methods raise UserError for
  files that are not there, or are not as they were published."""

  prefix: str  # of its lists' names
  classes: int
  counts: Mapping[str, int]  # images of each split
  wordnet: bool  # as corpus.read_corpus has it
  pairs: tuple[str, ...] = ()  # splits that are trained on as pairs, not by their classes

  def open_split(self, folder: pathlib.Path, split: str) -> LabelledSource:
    """Open the images of a list."""
    rows = self._read_list(folder, split)
    # A path that begins with a slash would leave the folder.
    images = [folder / path.lstrip("/") for path, _ in rows]
    # Before anything is read of it: a run must not end at its first image of a folder that is not there. Each folder is
    # listed once: asking for every file would take minutes.
    there = {parent: {*os.listdir(parent)} if parent.is_dir() else set() for parent in {file.parent for file in images}}
    if missing := [file for file in images if file.name not in there[file.parent]]:
      raise UserError(
        f"{len(missing):,} of the {len(images):,} images that {self._list_of(folder, split)} names are missing, the"
        f" first {missing[0]}; put the folders train and val of the whole set beside the lists"
      )
    names = corpus.read_names(folder / "labels.txt", wordnet=self.wordnet)
    self._check_classes(folder, names)
    labels, origin = np.array([label for _, label in rows]), Origin("long_tailed", str(folder), split)
    return Labelled(images, labels, names, read=_read_listed, origin=origin)

  def open_corpus(self, *, path: str | os.PathLike[str] = "", **_: Any) -> Corpus:
    """Read the sentences of all classes. Takes what `sources.open_source` takes."""
    sentences = corpus.read_corpus(folder := buckets.local(path, "data.path"), wordnet=self.wordnet)
    self._check_classes(folder, sentences.classnames)
    return sentences

  def train_counts(self, *, path: str | os.PathLike[str] = "", **_: Any) -> Int[np.ndarray, " k"]:
    """Count each class's training images. Takes what `sources.open_source` takes."""
    # As long as there are classes: the last ones may have no image.
    rows = self._read_list(buckets.local(path, "data.path"), "train")
    return np.bincount([label for _, label in rows], minlength=self.classes)

  def _list_of(self, folder: pathlib.Path, split: str) -> pathlib.Path:
    return folder / f"{self.prefix}_{split}.txt"

  def _read_list(self, folder: pathlib.Path, split: str) -> list[tuple[str, int]]:
    """Return the path and the label of each image."""
    if split not in self.counts:
      raise UserError(f"{self.prefix.lower()} has no split {split!r}; there are {', '.join(self.counts)}")
    file = self._list_of(folder, split)
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
    if len(rows) != self.counts[split]:
      raise UserError(f"{file} names {len(rows):,} images, and should name {self.counts[split]:,}; download it again")
    if {int(label) for _, label in rows} != {*range(self.classes)}:
      raise UserError(f"{file} has other labels than 0 to {self.classes - 1}, each of them; download it again")
    return [(path, int(label)) for path, label in rows]

  def _check_classes(self, folder: pathlib.Path, classes: Sequence[str]) -> None:
    if len(classes) != self.classes:
      raise UserError(
        f"{folder / 'labels.txt'} names {len(classes)} classes, and {self.prefix.lower()} has {self.classes}; put its"
        " own text corpus there"
      )


# The counts of the lists as published, by which a cut-off download is found. A set of another kind has the methods
# `open_corpus` and `train_counts`, and `pairs`.
SETS: dict[str, Any] = {
  "places_lt": LongTailed("Places_LT", 365, {"train": 62_500, "val": 7_300, "test": 36_500}, wordnet=False),
  "imagenet_lt": LongTailed("ImageNet_LT", 1000, {"train": 115_846, "val": 20_000, "test": 50_000}, wordnet=True),
}


def is_sampled(*, name: str, split: str = "train", **_: Any) -> bool:
  """Say whether a split is trained on by classes: it is of a long-tailed set, and not read as pairs."""
  return name in SETS and split not in SETS[name].pairs


def tokens_of(sentences: Corpus, tokenizer: Tokenizer) -> Tokens:
  """Turn the corpus into tokens. A long sentence is cut, and its end token stays last."""
  return Tokens(tokenizer(sentences.flat), np.cumsum([0, *map(len, sentences.sentences)]))


def _read_listed(file: pathlib.Path) -> bytes:
  try:
    return records.read_file(file)
  except records.Unusable:
    if not file.parent.is_dir():  # of a disk that is away, rather than an image that never was there
      raise Gone(f"{file.parent} is not there") from None
    raise
