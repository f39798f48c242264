"""Long-tailed rendered shapes: Places-LT's stand-in for a laptop, with sentences of which half help and half distract.

All 64 pairs of colour and shape; of the r-th most frequent there are 200 · 0.01^(r / 63) training images, 200 to 2,
2,810 in all. Validation and test have 20 of each. None of it is the paper's. Of the 32 classes with at most 20 images,
27 to 29 (by seed) are among the pairs that `shapes` trains on, where nothing is rare. Split `start` leaves out all 32:
65,536 images of the other classes, from which a run may start that has not seen what is rare here. `start_all` has as
many, of all classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from diffdis_jax.data import long_tail, sources
from diffdis_jax.data.long_tail import Corpus
from diffdis_jax.data.shapes import CLASSNAMES, PAIRS, make_scene, render
from diffdis_jax.errors import UserError

MOST, RATIO = 200, 0.01  # images of the most frequent class, and the least frequent one's share of that
EACH = {"val": 20, "test": 20}
LOW = 20  # a class of at most so many training images is one of the low ones, as long-tailed recognition groups them
START = 2048  # images of each class of `start`
STARTS = ("start", "start_all")  # of pairs
SPLITS = ("train", *EACH, *STARTS)

_CORNERS = {
  "circle": "no corner",
  "square": "four corners",
  "triangle": "three corners",
  "star": "five points",
  "cross": "four arms",
  "ring": "a hole",
  "heart": "one tip",
  "crescent": "two tips",
}
# Of a class: 20 that are about it.
ABOUT = (
  *("The {colour} {shape} is {colour}.", "Every {shape} has {corners}.", "It has {corners}."),
  *("Its colour is {colour}.", "The colour of the {shape} is {colour}.", "Its shape is a {shape}."),
  *("You see a {shape} in {colour}.", "This is a {colour} thing with {corners}.", "A {shape}, all {colour}."),
  *("Here a {colour} {shape} is drawn.", "Someone drew one {colour} {shape}.", "The {shape} is filled with {colour}."),
  *("A {colour} figure with {corners}.", "The picture has one {shape}.", "The picture has one {colour} shape."),
  *("It is {colour}, and it is a {shape}.", "A plain {colour} {shape}.", "What is shown is a {shape}."),
  *("What is shown is {colour}.", "One large {colour} {shape}."),
)
# 20 that say nothing of the class, and 20 that are of another one.
NOTHING = (
  *("The ground is plain.", "It lies in the middle.", "It is turned a little.", "There is nothing else to see."),
  *(
    "Pictures like this are small.",
    "It may be large or small.",
    "The ground may be dark.",
    "The ground may be light.",
  ),
  *("It was drawn by a machine.", "No one knows its name.", "It is often seen.", "Some find it pretty."),
  *("It has no shadow.", "It does not move.", "The edges are smooth.", "It is flat.", "Read more below."),
  *("See also the list.", "This page was edited.", "A source is missing."),
)
OTHERS = 20


def counts(seed: int) -> Int[np.ndarray, " k"]:
  """Return how many training images each class has. Which class is frequent depends on the seed."""
  ranks = np.random.default_rng((seed, 0)).permutation(len(PAIRS))
  return np.round(MOST * RATIO ** (ranks / (len(PAIRS) - 1))).astype(np.int64)


class LongTailedShapes:
  """Random access source; each record is a function of (seed, split, index) alone.

  A record is {image: u8[h w 3], label: number of the class, class: "red star", caption: the same}.

  Attributes:
    labels: of all records.
    classnames: by their number.
  """

  classnames = CLASSNAMES

  def __init__(self, *, split: str, image_size: int, seed: int = 0):
    if split not in SPLITS:
      raise UserError(f"shapes_lt has no split {split!r}; there are {', '.join(SPLITS)}")
    if split == "train":
      own = counts(seed)
    elif split == "start":
      own = START * (counts(seed) > LOW)
    else:
      own = np.full(len(PAIRS), EACH.get(split, START // 2))
    self.labels = np.repeat(np.arange(len(PAIRS)), own)
    # 1, since 0 and 2 are the draws of `counts` and of the corpus: one seed must not make them alike.
    self._image_size, self._seed = image_size, (seed, 1, SPLITS.index(split))

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    fields = self.fields(index)
    colour, shape = PAIRS[fields["label"]]
    rng = np.random.default_rng((*self._seed, index))
    scene = make_scene(rng, colour=colour, shape=shape)
    return {**fields, "image": render(scene, image_size=self._image_size, rng=rng)}

  def fields(self, index: int) -> dict[str, Any]:
    """Return the record without its image."""
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} outside of {len(self)} images")
    label = int(self.labels[index])
    return {"label": label, "class": self.classnames[label], "caption": self.classnames[label]}


def make_corpus(seed: int) -> Corpus:
  """Make 140 sentences of each class: 80 prompts, 20 about it, 40 distractors; in half of the classes shuffled."""
  rng = np.random.default_rng((seed, 2))
  sentences = []
  for number, (colour, shape) in enumerate(PAIRS):
    fill = lambda template, pair: template.format(colour=pair[0], shape=pair[1], corners=_CORNERS[pair[1]])
    # From 1 on: 0 would be the class itself.
    others = [PAIRS[(number + rng.integers(1, len(PAIRS))) % len(PAIRS)] for _ in range(OTHERS)]
    wrong = [fill(template, other) for template, other in zip(ABOUT, others, strict=True)]
    own = [*long_tail.sentences_of(CLASSNAMES[number], ""), *(fill(template, (colour, shape)) for template in ABOUT)]
    own += [*NOTHING, *wrong]
    sentences.append(tuple(own[i] for i in rng.permutation(len(own))) if number % 2 else tuple(own))
  return Corpus(CLASSNAMES, tuple(sentences))


class _Set:
  """What `data.long_tail.SETS` has of the long-tailed shapes."""

  pairs = STARTS

  def open_corpus(self, *, seed: int = 0, **_: Any) -> Corpus:
    """Make the sentences of all classes."""
    return make_corpus(seed)

  def train_counts(self, *, seed: int = 0, **_: Any) -> Int[np.ndarray, " k"]:
    """Count each class's training images."""
    return counts(seed)


class Section(sources.Section):
  """The data source `shapes_lt` of a config; `split` is one of SPLITS."""

  LACKS, IS_RENDERED = ("num_images", "caption_fields"), True

  def open(self) -> LongTailedShapes:
    return LongTailedShapes(split=self.split, image_size=self.image_size, seed=self.seed)


def add() -> None:
  """Add the long-tailed shapes to the package's tables; a second call changes nothing."""
  sources.KINDS["shapes_lt"], long_tail.SETS["shapes_lt"] = Section, _Set()
