"""Places-LT and ImageNet-LT as published: lists of images and their classes beside the whole sets' folders.

`NAME_{train,val,test}.txt` has a line `path label` an image; paths are below the folder of the lists.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from diffdis_jax.data import corpus
from diffdis_jax.data.corpus import Corpus
from diffdis_jax.data.layouts.labelled import Labelled, Origin, image_files
from diffdis_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LongTailed:
  """A published long-tailed set.

  Attributes:
    prefix: of its lists' names.
    classes: how many.
    counts: images of each split.
    wordnet: as corpus.read_corpus has it.
  """

  prefix: str
  classes: int
  counts: Mapping[str, int]
  wordnet: bool


# The counts of the lists as published, by which a cut-off download is found.
SETS = {
  "places_lt": LongTailed("Places_LT", 365, {"train": 62_500, "val": 7_300, "test": 36_500}, wordnet=False),
  "imagenet_lt": LongTailed("ImageNet_LT", 1000, {"train": 115_846, "val": 20_000, "test": 50_000}, wordnet=True),
}


def train_labels(path: pathlib.Path, name: str) -> Int[np.ndarray, " n"]:
  """Read the class of each training image from the list alone. Raises UserError: as `open_split`, but for missing
  images."""
  return _read_split(path, name, "train").labels


def open_split(path: pathlib.Path, name: str, split: str) -> Labelled:
  """Open the images of a list.

  Args:
    path: folder of the lists, of labels.txt and wiki/, and of the images' folders.
    name: of SETS.
    split: train, val or test.

  Raises:
    UserError: no such list, lines of another form, another number of images or classes than the published one, or
      images that are not there.
  """
  listed = _read_split(path, name, split)
  # Before anything is read of it: a run must not end at its first image of a folder that is not there.
  if missing := _missing(listed):
    raise UserError(
      f"{len(missing):,} of the {len(listed.files):,} images that {listed.path} names are missing, the first"
      f" {missing[0]}; put the folders train and val of the whole set beside the lists"
    )
  names = corpus.read_names(path / "labels.txt", wordnet=SETS[name].wordnet)
  _expect(path, name, names)
  return Labelled(image_files(listed.files), listed.labels, names, Origin("long_tailed", str(path), split))


class _List(NamedTuple):
  """A published list: where it lies, its images, and their classes."""

  path: pathlib.Path
  files: list[pathlib.Path]
  labels: Int[np.ndarray, " n"]


def _read_split(path: pathlib.Path, name: str, split: str) -> _List:
  known = SETS[name]
  if split not in known.counts:
    raise UserError(f"{name} has no split {split!r}; there are {', '.join(known.counts)}")
  file = path / f"{known.prefix}_{split}.txt"
  listed = _read_list(file, path)
  # A list that was cut off would be another set, and look like any.
  if (count := len(listed.files)) != known.counts[split]:
    raise UserError(f"{file} names {count:,} images, and should name {known.counts[split]:,}; download it again")
  labels = listed.labels
  if (absent := np.setdiff1d(np.arange(known.classes), labels)).size or labels.max() >= known.classes:
    wrong = f"the label {labels.max()}" if labels.max() >= known.classes else f"no image of class {absent[0]}"
    raise UserError(f"{file} has {wrong}; {name} has {known.classes} classes, from 0; download it again")
  return listed


def open_corpus(path: pathlib.Path, name: str) -> Corpus:
  """Read the sentences of its classes. Raises UserError: as `read_corpus`, or of another number of classes."""
  found = corpus.read_corpus(path, wordnet=SETS[name].wordnet)
  _expect(path, name, found.classnames)
  return found


def _expect(path: pathlib.Path, name: str, classes: Sequence[str]) -> None:
  """Raise UserError where these are not as many classes as the set has."""
  if len(classes) != SETS[name].classes:
    raise UserError(
      f"{path / 'labels.txt'} names {len(classes)} classes, and {name} has {SETS[name].classes}; put its own text"
      " corpus there"
    )


def _read_list(file: pathlib.Path, root: pathlib.Path) -> _List:
  try:
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    # Without a folder all is looked for where the command runs, which is hardly meant.
    how = "" if root.parts else ", and name its folder, as in --config=places_lt:path=DIR"
    raise UserError(f"cannot read {file}: {error}; download the published list and put it there{how}") from error
  for row in rows:
    if len(row) != 2 or not row[1].isdecimal():
      raise UserError(f"{file} has the line {' '.join(row)!r}; a line should be a path and the number of a class")
  if not rows:
    raise UserError(f"{file} is empty; download it again")
  # A path that begins with a slash would leave the root.
  return _List(file, [root / name.lstrip("/") for name, _ in rows], np.array([int(label) for _, label in rows]))


def _missing(listed: _List) -> list[pathlib.Path]:
  """Return the images that are not there. Each folder is listed once: asking for every file would take minutes."""
  wanted: dict[pathlib.Path, set[str]] = {}
  for each in listed.files:
    wanted.setdefault(each.parent, set()).add(each.name)
  absent = {
    folder / name
    for folder, names in wanted.items()
    for name in names.difference(os.listdir(folder) if folder.is_dir() else ())
  }
  # In the list's order, so that the first one named is the first line that is wrong.
  return [each for each in listed.files if each in absent]
