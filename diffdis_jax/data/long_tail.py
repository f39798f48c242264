"""Long-tailed sets by name: images with labels, and the sentences of their classes as tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from diffdis_jax.common import buckets
from diffdis_jax.data import shapes_lt
from diffdis_jax.data.corpus import Corpus, Tokenizer, Tokens
from diffdis_jax.data.layouts import long_tailed

NAMES = ("shapes_lt", *long_tailed.SETS)


@runtime_checkable
class LabelledSource(Protocol):
  """A source whose classes are known without reading an image."""

  @property
  def labels(self) -> Int[np.ndarray, " n"]: ...

  @property
  def classnames(self) -> Sequence[str]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def is_sampled(*, name: str, split: str = "train", **_: Any) -> bool:
  """Say whether a split is trained on by classes: it is of a long-tailed set, and not read as pairs."""
  return name in NAMES and not (name == "shapes_lt" and split in shapes_lt.STARTS)


def open_corpus(*, name: str, path: str | os.PathLike[str] = "", seed: int = 0, **_: Any) -> Corpus:
  """Read the sentences of a set's classes. Takes what `sources.open_source` takes. Raises UserError: damaged data."""
  if name == "shapes_lt":
    return shapes_lt.make_corpus(seed)
  return long_tailed.open_corpus(buckets.local(path, "data.path"), name)


def train_counts(*, name: str, path: str | os.PathLike[str] = "", seed: int = 0, **_: Any) -> Int[np.ndarray, " k"]:
  """Count each class's training images. Takes what `sources.open_source` takes. Raises UserError: damaged data."""
  if name == "shapes_lt":
    return shapes_lt.counts(seed)
  labels = long_tailed.train_labels(buckets.local(path, "data.path"), name)
  # As long as there are classes: the last ones may have no image.
  return np.bincount(labels, minlength=long_tailed.SETS[name].classes)


def tokens_of(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
  """Turn the corpus into tokens. A long sentence is cut, and its end token stays last."""
  return Tokens(tokenizer(corpus.flat), np.cumsum([0, *map(len, corpus.sentences)]))
