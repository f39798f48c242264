"""Long-tailed sets by name: images with labels, and the sentences of their classes as tokens.

Places-LT and ImageNet-LT are read as published, by lists of images and their classes beside the whole sets' folders:
`NAME_{train,val,test}.txt` has a line `path label` an image; paths are below the folder of the lists. Sentences are
prompts with the class's name and the text of its Wikipedia page, as VL-LTR (Tian et al., ECCV 2022) reads them:
`labels.txt` names the classes, `wiki/desc_<number>.txt` has a page each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import buckets
from diffdis_jax.data import records
from diffdis_jax.data.layouts import class_lists
from diffdis_jax.data.layouts.labelled import Labelled, LabelledSource, Origin
from diffdis_jax.errors import Gone, UserError

LEFT_OUT = ("External links", "References", "Further reading", "Bibliography")
# After a full stop or question mark, before white space or a capital; not after an initial or the like of "e.g."
_BORDER = re.compile(r"(?<=[.?])(?<![A-Z]\.)(?<!\w\.\w[.?])(?=[\sA-Z])")
_SUMMARY = "summary"
Tokenizer = Callable[[Sequence[str]], Int[np.ndarray, "n l"]]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The sentences of every class, in the order of the classes' numbers."""

  classnames: tuple[str, ...]  # as they stand in prompts
  sentences: tuple[tuple[str, ...], ...]  # of each class, in the order of its text

  @property
  def flat(self) -> list[str]:
    """Return all sentences, class by class."""
    return [sentence for own in self.sentences for sentence in own]

  @property
  def labels(self) -> Int[np.ndarray, " m"]:
    """Return the class of each of `flat`."""
    return np.repeat(np.arange(len(self.sentences)), [len(own) for own in self.sentences])


@dataclasses.dataclass(frozen=True)
class Tokens:
  """A corpus as token ids."""

  ids: Int[np.ndarray, "m l"]  # of all sentences, class by class
  starts: Int[np.ndarray, " k1"]  # where each class's begin; last, how many there are

  def draw(self, label: int, rng: np.random.Generator) -> Int[np.ndarray, " l"]:
    """Sample one of the class's sentences, uniformly."""
    return self.ids[rng.integers(self.starts[label], self.starts[label + 1])]


def read_corpus(path: pathlib.Path, *, wordnet: bool) -> Corpus:
  """Read a corpus from a folder with `labels.txt` and `wiki/`.

  `wordnet` says how a line of labels.txt reads. Places: name first, number last. ImageNet: WordNet number first, name
  last, classes in the order of their WordNet numbers. Raises UserError: no labels.txt, a line of another form, a class
  without text, or a text in neither UTF-8 nor GBK.
  """
  names = read_names(path / "labels.txt", wordnet=wordnet)
  files = [(name, path / "wiki" / f"desc_{number}.txt") for number, name in enumerate(names)]
  # Looked for before any is read: a corpus that is half there says how much is missing.
  if missing := [f"{name!r}: no file {file}" for name, file in files if not file.is_file()]:
    raise UserError(
      f"{len(missing)} of {len(names)} classes have no text, the first {missing[0]}; put the whole text corpus there"
    )
  return Corpus(tuple(names), tuple(sentences_of(name, _read_page(file)) for name, file in files))


def sentences_of(name: str, text: str) -> tuple[str, ...]:
  """Return OpenAI's 80 prompts with the class's name, and the sentences of its text. As in VL-LTR the name has a space
  behind it, and the text follows the last prompt without one, so that it must begin with a capital to be a sentence."""
  filled = [template.replace("{}", f"{name} ") for template in class_lists.load()["imagenet1k"].templates]
  return split_sentences("\n".join(filled) + text)


def split_sentences(text: str) -> tuple[str, ...]:
  """Split a text into sentences, without white space around them."""
  return tuple(sentence.strip() for sentence in _BORDER.split(text) if sentence.strip())


def page_text(page: str) -> str:
  """Return a page's summary and sections, without their titles `== Title ==`, and without the sections of LEFT_OUT. Of
  two sections of one title the later text stands in the earlier one's place, as in VL-LTR."""
  sections, title = {_SUMMARY: []}, _SUMMARY
  for line in filter(None, (line.strip() for line in page.splitlines())):
    # Subsections, which begin with more signs, are sections too.
    if line.startswith("=="):
      title = line.strip("= ")
      sections[title] = []
    else:
      sections[title].append(line)
  return "\n".join("\n".join(lines) for title, lines in sections.items() if title not in LEFT_OUT)


def _read_page(file: pathlib.Path) -> str:
  # UTF-8 first, which refuses what is none; GBK takes almost any bytes for some characters.
  for encoding in ("utf-8", "gbk"):
    with contextlib.suppress(UnicodeDecodeError):
      if (text := page_text(file.read_text(encoding))).strip():
        return text
      raise UserError(f"{file} has no text; a class needs a page, put the whole text corpus there")
  raise UserError(f"{file} is neither UTF-8 nor GBK; download the text corpus again")


def read_names(file: pathlib.Path, *, wordnet: bool) -> list[str]:
  """Read class names in the order of their numbers. Raises UserError: a file that cannot be read, or a gap in them."""
  try:
    rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if wordnet:
      return [row[-1].replace("_", " ") for row in sorted(rows, key=lambda row: row[0])]
    by_number = {int(row[-1]): row[0].replace("_", " ").replace("/", " ") for row in rows}
  except (OSError, ValueError) as error:  # the latter of bytes that are not UTF-8, and of what is no number
    how = "it should name the classes, one a line" + ("" if wordnet else ", with their numbers last")
    raise UserError(f"cannot read {file}: {error}; {how}") from error
  # Images name a class by its number: a gap would shift every class behind it.
  if sorted(by_number) != [*range(len(rows))]:
    raise UserError(f"{file} has {len(rows)} lines, whose numbers should be 0 to {len(rows) - 1}, each once")
  return [by_number[number] for number in range(len(rows))]


class LongTailed(NamedTuple):
  """A published long-tailed set: how its lists, labels.txt and wiki/ in a folder are read. Methods raise UserError for
  files that are not there, or are not as they were published."""

  prefix: str  # of its lists' names
  classes: int
  counts: Mapping[str, int]  # images of each split
  wordnet: bool  # as read_corpus has it
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
    names = read_names(folder / "labels.txt", wordnet=self.wordnet)
    self._check_classes(folder, names)
    labels, origin = np.array([label for _, label in rows]), Origin("long_tailed", str(folder), split)
    return Labelled(images, labels, names, read=_read_listed, origin=origin)

  def open_corpus(self, *, path: str | os.PathLike[str] = "", **_: Any) -> Corpus:
    """Read the sentences of all classes. Takes what `sources.open_source` takes."""
    sentences = read_corpus(folder := buckets.local(path, "data.path"), wordnet=self.wordnet)
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
